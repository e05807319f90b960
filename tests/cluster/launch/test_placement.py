"""Tensor groups are on one node each, in order, with devices of their own; what can never fit is refused."""

import itertools
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.cluster_utils import Cluster

from lockstep.cluster.launch.capacity import Node, fits, living_nodes
from lockstep.cluster.launch.placement import KINDS, Placement, PlacementError, PlacementPlan, check, plan_placement
from lockstep.cluster.launch.plan import RunPlan
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import parse
from lockstep.rl.cores import threads_for
from lockstep.rl.remote import Places, Processes, gather, start
from tests.cluster.launch.witness import Witness

APART = {"place": "apart"}
ROLES = ("policy", "environment", "rollout")
DEGREES = st.sampled_from([1, 2, 3, 4])
AMOUNTS = st.sampled_from([0.0, 0.5, 1.0, 2.0])


def planned(devices: bool = False, **values: Any) -> PlacementPlan:
    return plan_placement(RunPlan.of(parse(values)), devices=devices)


def nodes(*gpus: float, cpus: float = 8) -> list[Node]:
    return [Node(str(n), f"10.0.0.{n}", f"host{n}", {"CPU": cpus, "GPU": has}) for n, has in enumerate(gpus)]


def test_without_devices_nothing_is_reserved() -> None:
    plan = planned(layout={"data": 2}, rollout={"workers": 3})
    assert plan.reserved == []
    assert plan.together == {"rollout": (0, 1, 0), "verifier": (0,)}
    check(plan, [])


def test_where_there_are_devices_each_process_with_a_model_has_one() -> None:
    plan = planned(True, layout={"data": 2}, roles={"rollout": APART, "verifier": APART})
    assert plan.needs("GPU") == {"policy": 2, "rollout": 2}
    assert planned(True, roles={"policy": {"gpus": 0}}).reserved == []
    games = planned(
        True,
        layout={"data": 2},
        environment={"kind": "tools", "workers": 3},
        roles={"environment": APART | {"cpus": 2}},
    )
    assert (games.needs("GPU"), games.needs("CPU")) == ({"policy": 2}, {"environment": 6})
    assert planned(True, layout={"data": 3, "tensor": 2}, roles={"policy": {"gpus": 0.5}}).needs("GPU") == {"policy": 3}


@given(DEGREES, DEGREES, DEGREES, st.integers(1, 5), st.sampled_from(["together", "apart"]), AMOUNTS, st.booleans())
def test_a_tensor_group_is_one_bundle_and_each_rank_is_in_one(
    tensor: int, data: int, degree: int, workers: int, place: str, gpus: float, devices: bool
) -> None:
    rollout: dict[str, Any] = {"place": place} | ({"gpus": gpus} if place == "apart" else {})
    layout, engines = {"tensor": tensor, "data": data}, {"workers": workers, "tensor": degree}
    plan = planned(devices, layout=layout, rollout=engines, roles={"rollout": rollout, "policy": {"gpus": gpus}})
    sizes = {"policy": (tensor * data, tensor), "rollout": (workers * degree, degree)}
    for role in {group.role for group in plan.groups}:
        count, together = sizes[role]
        ranks = [group.ranks for group in plan.groups if group.role == role]
        assert [rank for group in ranks for rank in group] == list(range(count))
        assert all({*range(first, first + together)} <= {*group} for group in ranks for first in group[::together])
    for rank, beside in enumerate(plan.together.get("rollout", ())):
        mates = [
            plan.together["rollout"][mate] for mate in range(rank // degree * degree, (rank // degree + 1) * degree)
        ]
        home = next(group for group in plan.groups if beside in group.ranks)
        assert data * tensor % degree or all(mate in home.ranks for mate in mates), "a team is on one node"
    for group in plan.reserved:
        amount = group.resources.get("GPU", 0)
        assert amount in (0, 0.5) or amount == int(amount), "Ray reserves whole devices"
        assert 0 <= amount - gpus * len(group.ranks) < 1


@given(
    st.lists(st.tuples(*[st.integers(0, 4)] * 2), max_size=4), st.lists(st.tuples(*[st.integers(0, 6)] * 2), max_size=4)
)
def test_what_fits_is_what_some_way_to_share_out_allows(
    needs: list[tuple[int, int]], holds: list[tuple[int, int]]
) -> None:
    def holds_all(at: Sequence[int]) -> bool:
        return all(
            sum(need[kind] for need, where in zip(needs, at, strict=True) if where == node) <= has[kind]
            for node, has in enumerate(holds)
            for kind in (0, 1)
        )

    wanted = any(holds_all(at) for at in itertools.product(range(len(holds)), repeat=len(needs)))
    as_resources = [[dict(zip(KINDS, amounts, strict=True)) for amounts in which] for which in (needs, holds)]
    assert fits(*as_resources) == wanted


def test_what_a_cluster_cannot_hold_is_named() -> None:
    big = planned(layout={"tensor": 8, "data": 2}, roles={"policy": {"gpus": 1}})
    with pytest.raises(
        PlacementError, match="policy needs 16 GPU in groups of 8, each on one node, and the largest node has 4"
    ):
        check(big, nodes(4, 4, 4, 4))
    check(big, nodes(8, 8))
    both = planned(
        layout={"data": 2}, roles={"policy": {"cpus": 1, "gpus": 1}, "rollout": {**APART, "cpus": 2, "gpus": 1}}
    )
    check(both, nodes(4))
    with pytest.raises(PlacementError, match=r"need 6 CPU \(policy 2, rollout 4\) and the cluster has 5: place roles"):
        check(both, nodes(4, cpus=5))
    with pytest.raises(PlacementError, match=r"need 4 GPU \(policy 2, rollout 2\) and the cluster has 3"):
        check(both, nodes(1, 1, 1))
    pairs = planned(layout={"tensor": 2, "data": 3}, roles={"policy": {"gpus": 1}})
    with pytest.raises(
        PlacementError, match=r"the roles need 6 GPU \(policy 6\), each tensor group on one node, and 2 nodes"
    ):
        check(pairs, nodes(3, 3))


def test_who_shares_reserves_nothing() -> None:
    with pytest.raises(RecipeError, match="set place = 'apart'"):
        parse({"roles": {"rollout": {"cpus": 1}}})
    assert parse({"roles": {"rollout": {**APART, "cpus": 1}}}).roles.rollout.cpus == 1


def in_own_process(function: Callable[..., None], *args: Any) -> None:
    """Calls a function of a module in a process that has no Ray yet; what it raises is raised here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(function, *args).result()


@contextmanager
def cluster_of(*gpus: int) -> Iterator[None]:
    """Ray nodes on this machine: that of the driver has no devices, and the others pretend to have some."""
    with tempfile.TemporaryDirectory(prefix="ls", dir="/tmp", ignore_cleanup_errors=True) as own:
        folder = {"temp_dir": own}  # in Ray's usual one, clusters of other tests would find this one
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False} | folder)
        try:
            for has in gpus:
                cluster.add_node(num_cpus=1, num_gpus=has, **folder)
            ray.init(cluster.address, log_to_driver=False)
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


def seen(role: str, places: Places) -> list[tuple[str, str, str]]:
    """Node, devices and threads of processes that are started in places, and end again."""
    workers = start(Witness, Processes(role, range(len(places)), places=places))
    return gather([worker.call(Witness.seen) for worker in workers])


def reserved() -> None:
    run = RunPlan.of(parse({"layout": {"tensor": 2, "data": 2}, "rollout": {"workers": 1, "tensor": 2}}))
    impatient = RunPlan.of(parse({"layout": {"tensor": 2}, "roles": {"wait": 2}}))
    with cluster_of(2, 3):
        with Placement(run) as placement:
            at = seen("policy", placement.of("policy"))
            assert [devices for _, devices, _ in at] == ["0", "1"] * 2, "neighbours have neighbouring devices"
            assert [at[0][0], at[2][0]] == [at[1][0], at[3][0]], "a tensor group is on one node"
            assert at[0][0] != at[2][0]
            assert {threads for _, _, threads in at} == {str(threads_for(2))}, "two processes share each node"
            assert seen("rollout", placement.of("rollout")) == [(*each[:2], str(threads_for(2))) for each in at[:2]]
            said: list[str] = []
            with pytest.raises(PlacementError, match=r"need 2 GPU \(policy 2\).* was not free in 2 s: wait for other"):
                Placement(impatient, said.append)
            assert "waiting for 2 GPU (policy 2): 1 of 5 GPU are free in the cluster (" in said[0]
        with Placement(impatient) as placement:  # which has what the first has given back
            assert len(placement.nodes) == 1
        with pytest.raises(
            PlacementError, match="needs 4 GPU in groups of 4, each on one node, and the largest node has 3"
        ):
            Placement(RunPlan.of(parse({"layout": {"tensor": 4}})))


def unreserved() -> None:
    roles = {"policy": {"gpus": 0}, "rollout": {**APART, "gpus": 0}, "verifier": APART}
    with cluster_of(1), Placement(RunPlan.of(parse({"roles": roles}))) as placement:
        homes = {role: [node for node, _, _ in seen(role, placement.of(role))] for role in ROLES}
        driver, other = (node.id for node in living_nodes())
        assert driver == ray.get_runtime_context().get_node_id()
        assert homes == {"policy": [driver], "environment": [driver], "rollout": [other, other]}
        assert [node.id for node in placement.nodes] == [driver, other]


@pytest.mark.exhaustive
def test_processes_are_where_they_were_planned() -> None:
    in_own_process(reserved)


@pytest.mark.exhaustive
def test_who_reserves_nothing_is_near_the_driver_or_apart_from_it() -> None:
    in_own_process(unreserved)
