"""What a run writes is on storage that all of its nodes share, or the run is refused with the node and the path."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from lockstep.cluster.launch.capacity import living_nodes
from lockstep.cluster.launch.plan import RunPlan
from lockstep.cluster.launch.shared_storage import NotShared, check_places, check_shared
from lockstep.cluster.recipe.load import parse
from lockstep.distributed.checkpoint.storage import Folder, storage_of
from tests.cluster.cli_process import write_recipe
from tests.cluster.hosts import PYTHON, Hosts, connected, needs_hosts
from tests.cluster.launch.test_placement import in_own_process

MOST_S = 60
PROGRAM = """
import sys, time
from pathlib import Path
import ray
from lockstep.cluster.launch.capacity import living_nodes
from lockstep.cluster.launch.shared_storage import NotShared, check_places
from lockstep.distributed.checkpoint.storage import storage_of
ray.init("auto", log_to_driver=False)
nodes = living_nodes()[1:]
for place in sys.argv[1:]:
    began = time.monotonic()
    try:
        check_places({"run": storage_of(place)}, nodes)
        print("shared", flush=True)
    except NotShared as error:
        print(f"{error} [{time.monotonic() - began:.0f} s]", flush=True)
"""


def one_node(folder: Path) -> None:
    """The only node stands for another one, and has what the driver has."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=1)
    try:
        nodes = living_nodes()
        places = {"run": Folder(folder), "checkpoints.at": storage_of(f"file://{folder}/store/")}
        check_places(places, nodes)
        assert sorted(path.name for path in folder.rglob("*")) == ["store"], "nothing is left"
        with pytest.raises(
            NotShared, match=r"node .* has its own memory://store, which checkpoints.at names: put it on"
        ):
            check_places({"checkpoints.at": storage_of("memory://store/")}, nodes)
        (folder / "file").touch()
        with pytest.raises(NotShared, match=r"the driver cannot use .*file/inside, which run names: "):
            check_places({"run": Folder(folder / "file" / "inside")}, nodes)
        check_shared(RunPlan.of(parse({"run": "/proc/nowhere"})), nodes)  # nobody but the driver: nothing is written
    finally:
        ray.shutdown()


@pytest.mark.exhaustive
def test_a_node_that_has_the_same_storage_is_let_in_and_nothing_is_left(tmp_path: Path) -> None:
    in_own_process(one_node, tmp_path)


@pytest.fixture(scope="module")
def two() -> Iterator[Hosts]:
    """Two hosts with Ray."""
    with connected(2) as hosts:
        hosts.start_ray(0, 2)
        hosts.start_ray(1, 2)
        yield hosts


@needs_hosts
@pytest.mark.exhaustive
def test_a_disk_of_a_node_is_named_within_seconds(two: Hosts, tmp_path: Path) -> None:
    (two[1].disk / "only-there").mkdir()
    places = [tmp_path, two[0].local, f"file://{two[0].local}/store/"]
    code, said = two[0].run(PYTHON, "-c", PROGRAM, *map(str, places), timeout=200, RAY_ADDRESS=two.cluster)
    shared, own, store = [line for line in said.splitlines() if line.startswith(("shared", "node"))]
    assert code == 0, said
    assert shared == "shared"
    assert own.startswith(
        f"node {two[1].address} has its own {two[0].local}, which run names: put it on storage that all"
    )
    assert store.startswith(
        f"node {two[1].address} has its own file://{two[0].local}/store, which run names: put it on"
    )
    assert all(int(line.split("[")[1].split(" s]")[0]) < MOST_S for line in (own, store))
    assert not [path for host in (two[0], two[1]) for path in host.disk.rglob("*canary*")]


@needs_hosts
@pytest.mark.exhaustive
def test_a_run_on_a_disk_of_one_node_is_refused_before_anything_is_written(
    two: Hosts, tmp_path: Path, tiny_folder: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_folder)
    lockstep = (PYTHON, "-m", "lockstep", "train", recipe)
    spread = ("--set", "roles.policy.cpus=2", "--set", "layout.data=2")
    code, said = two[0].run(
        *lockstep, *spread, "--set", f"run={two[0].local}/run", timeout=200, RAY_ADDRESS=two.cluster
    )
    assert code == 2, said
    assert f"node {two[1].address} has its own {two[0].local}, which run names" in said
    assert not list(two[0].disk.glob("run*"))
