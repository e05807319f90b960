"""A run waits for the nodes that an autoscaler brings, says so, and is refused where it may not bring them."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.cluster.cli_process import until
from tests.cluster.heads import free_port

PROGRAM = """
import sys
import ray
from lockstep.cluster.launch.placement import Placement, PlacementError
from lockstep.cluster.launch.plan import RunPlan
from lockstep.cluster.recipe.load import parse
ray.init(sys.argv[1], log_to_driver=False)
for tensor in sys.argv[2:]:
    roles = {"policy": {"cpus": 2}, "wait": 240}
    run = RunPlan.of(parse({"layout": {"data": 2, "tensor": int(tensor)}, "roles": roles}))
    try:
        with Placement(run, lambda words: print(words, flush=True)) as placement:
            print("placed on", len({node.id for node in placement.nodes}), "of", len(ray.nodes()), flush=True)
    except PlacementError as error:
        print("refused:", error, flush=True)
"""
FAKE = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
"""As `external`, since Ray's wheel has no defaults for its own name."""
_LISTS = ("setup", "head_setup", "worker_setup", "initialization", "head_start_ray", "worker_start_ray")
EMPTY: dict[str, object] = {
    **{f"{name}_commands": [] for name in _LISTS},
    **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    **{name: {} for name in ("auth", "file_mounts", "docker")},
    "file_mounts_sync_continuously": False,
    "upscaling_speed": 10.0,
}
"""What Ray wants to be said, and its defaults do not say."""


@contextmanager
def autoscaling(version: int) -> Iterator[str]:
    """A head without cores to give, whose autoscaler may start two nodes of two cores; KubeRay's is of version 2."""
    port, head = free_port(), "f" * 51 + "00000"
    types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    provider = {"type": "external", "module": FAKE, "head_node_id": head, "launch_multiple": True}
    with tempfile.TemporaryDirectory(prefix="ls", dir="/tmp", ignore_cleanup_errors=True) as own:
        address = subprocess.check_output(["hostname", "-I"], text=True).split()[0]
        config = {
            "cluster_name": "pretended",
            "max_workers": 2,
            "idle_timeout_minutes": 5,
            "provider": provider | {"gcs_address": f"{address}:{port}"},
            "available_node_types": types,
            "head_node_type": "ray.head.default",
            **EMPTY,
        }
        (Path(own) / "autoscaler.json").write_text(json.dumps(config))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_AUTH_MODE": "disabled"}
        environment |= {"RAY_enable_autoscaler_v2": str(version - 1), "RAY_CLOUD_INSTANCE_ID": head}
        environment |= {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": head}
        command = [
            Path(sys.executable).with_name("ray"),
            "start",
            "--head",
            "--block",
            f"--port={port}",
            "--num-cpus=0",
        ]
        command += [f"--autoscaling-config={own}/autoscaler.json", f"--temp-dir={own}", "--include-dashboard=false"]
        with (Path(own) / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, "--disable-usage-stats"], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            until(lambda: "Ray runtime started" in (Path(own) / "log").read_text() or process.poll() is not None, 120)
            assert process.poll() is None, (Path(own) / "log").read_text()
            yield f"{address}:{port}"
        finally:
            with suppress(psutil.NoSuchProcess):
                for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                    with suppress(psutil.NoSuchProcess):
                        one.kill()
            process.wait()


@pytest.mark.exhaustive
@pytest.mark.parametrize("version", [1, 2])
def test_from_one_node_to_three(version: int) -> None:
    tensor_degrees = ["1", "2"][:version]  # the second needs nodes that may not be, which version 1 does not say
    with autoscaling(version) as address:
        command = [sys.executable, "-c", PROGRAM, address, *tensor_degrees]
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=280, env=os.environ | {"RAY_AUTH_MODE": "disabled"}
        )
        said = ended.stdout
        assert ended.returncode == 0, said + ended.stderr
        assert "waiting for 4 CPU (policy 4): 0 of 0 CPU are free in the cluster" in said
        assert "placed on 2 of 3" in said
        refused = re.search(r"refused: the roles need 8 CPU \(policy 8\), .* the autoscaler may start no", said)
        assert bool(refused) == (version == 2)
