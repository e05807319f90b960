"""What roles reserve is planned whole, refused where a cluster cannot hold it, and really reserved."""

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from lockstep.cluster.launch.placement import Placement, PlacementError, PlacementPlan, check, plan_placement
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import parse
from lockstep.cluster.recipe.roles import PolicyRoleConfig, RoleConfig, RolesConfig

PROCESSES = {"policy": 2, "rollout": 3, "verifier": 1}


def test_by_default_nothing_is_reserved() -> None:
    chosen = plan_placement(RolesConfig(), PROCESSES)
    check(chosen, {})
    with Placement(chosen) as placement:  # without a cluster: there is nothing to ask it for
        assert placement.of("policy") == [{}, {}]
        assert placement.of("rollout") == [{}, {}, {}]


def test_what_a_cluster_cannot_hold_is_named_by_role() -> None:
    apart = RoleConfig(place="apart", cpus=2, gpus=1)
    chosen = plan_placement(RolesConfig(policy=PolicyRoleConfig(cpus=1, gpus=1), rollout=apart), PROCESSES)
    check(chosen, {"CPU": 8, "GPU": 5})
    with pytest.raises(PlacementError, match=r"need 8 CPU \(policy 2, rollout 6\) and the cluster has 7: place roles"):
        check(chosen, {"CPU": 7, "GPU": 5})
    with pytest.raises(PlacementError, match=r"need 5 GPU \(policy 2, rollout 3\) and the cluster has 0"):
        check(chosen, {"CPU": 8})


def test_who_shares_reserves_nothing() -> None:
    with pytest.raises(RecipeError, match="set place = 'apart'"):
        parse({"roles": {"rollout": {"cpus": 1}}})
    assert parse({"roles": {"rollout": {"place": "apart", "cpus": 1}}}).roles.rollout.cpus == 1


@given(
    st.fixed_dictionaries({name: st.integers(1, 5) for name in PROCESSES}),
    st.sampled_from(["together", "apart"]),
    st.sampled_from(["together", "apart"]),
    st.integers(0, 3),
)
def test_each_process_has_its_share_of_a_bundle_and_they_fill_it(
    processes: dict[str, int], rollout: str, verifier: str, cpus: int
) -> None:
    def role(place: str) -> RoleConfig:
        return RoleConfig(place="apart", cpus=cpus) if place == "apart" else RoleConfig()

    roles = RolesConfig(policy=PolicyRoleConfig(cpus=1), rollout=role(rollout), verifier=role(verifier))
    chosen: PlacementPlan = plan_placement(roles, processes)
    assert {name: len(places) for name, places in chosen.places.items()} == processes
    used = [0.0] * len(chosen.bundles)
    for places in chosen.places.values():
        for bundle in places:
            used[bundle] += chosen.share(bundle).get("CPU", 0.0)
    assert used == pytest.approx([bundle.get("CPU", 0.0) for bundle in chosen.bundles])


@pytest.mark.exhaustive
def test_actors_are_where_they_were_planned() -> None:
    @ray.remote(num_cpus=0)
    class Here:
        def bundle(self) -> int:
            return int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0) * 4)

    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=3)
    try:
        roles = RolesConfig(policy=PolicyRoleConfig(cpus=1), rollout=RoleConfig(place="apart", cpus=1))
        with Placement(plan_placement(roles, {"policy": 2, "rollout": 1, "verifier": 2})) as placement:
            actors = [
                Here.options(**o).remote() for role in ("policy", "rollout", "verifier") for o in placement.of(role)
            ]
            assert ray.get([a.bundle.remote() for a in actors]) == [2, 2, 4, 2, 2]
            assert ray.available_resources().get("CPU", 0) == 0
        with pytest.raises(PlacementError, match="the cluster has 3"):
            Placement(plan_placement(roles, {"policy": 2, "rollout": 2}))
    finally:
        ray.shutdown()
