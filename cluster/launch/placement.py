"""Places the processes of each role in a Ray placement group: on devices of their own, or in turns on the policy's.

What is reserved is one placement group of Ray, which is there as a whole or not at all, before any process starts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lockstep.cluster.recipe.roles import RolesConfig
from lockstep.rl.remote import Places

WAIT_S = 30.0
"""How long devices may take to be free that the cluster has."""


class PlacementError(ValueError):
    """Roles that a cluster cannot hold."""


@dataclass(frozen=True)
class PlacementPlan:
    """Bundles of a placement group, and in which of them the processes of each role run."""

    bundles: tuple[dict[str, float], ...]
    places: dict[str, list[int]]
    needs: dict[str, dict[str, float]] = field(default_factory=dict)
    """What each role reserves in all."""

    def share(self, bundle: int) -> dict[str, float]:
        """Resources that each process in a bundle requests, so that all of them fit."""
        count = Counter(number for places in self.places.values() for number in places)[bundle]
        return {kind: amount / count for kind, amount in self.bundles[bundle].items()}


def plan_placement(roles: RolesConfig, processes: Mapping[str, int]) -> PlacementPlan:
    """Plan bundles for the processes of each role; none where nothing is reserved."""
    own = [_resources(roles.policy.cpus, roles.policy.gpus)] * processes["policy"]
    bundles = list(own)
    places = {"policy": list(range(len(own)))}
    needs = {"policy": _total(own)}
    present = {name: role for name, role in roles.by_name.items() if name in processes}
    for name, role in present.items():
        count = processes[name]
        if role.place == "together":
            places[name] = [i % len(own) for i in range(count)]
            continue
        added = [_resources(role.cpus, role.gpus)] * count
        places[name] = list(range(len(bundles), len(bundles) + count))
        bundles += added
        needs[name] = _total(added)
    return PlacementPlan(tuple(bundles), places, needs)


def check(plan: PlacementPlan, there: Mapping[str, float]) -> None:
    """Refuse a plan that exceeds a cluster's resources.

    Raises:
        PlacementError: names what is needed, by role, and what is there.
    """
    for kind in ("CPU", "GPU"):
        by_role = {name: needs[kind] for name, needs in plan.needs.items() if needs.get(kind)}
        needed, has = sum(by_role.values()), there.get(kind, 0)
        if needed > has:
            roles = ", ".join(f"{name} {amount:g}" for name, amount in by_role.items())
            raise PlacementError(
                f"the roles need {needed:g} {kind} ({roles}) and the cluster has {has:g}: place roles together, "
                f"lower what they reserve in [roles], or use a larger cluster"
            )


class Placement:
    """A placement group of Ray; a context manager that removes it."""

    def __init__(self, chosen: PlacementPlan) -> None:
        """
        Raises:
            PlacementError: when the cluster cannot hold the plan, or others use what it has.
        """
        self._plan = chosen
        reserved = [i for i, bundle in enumerate(chosen.bundles) if bundle]
        self._numbers = {bundle: number for number, bundle in enumerate(reserved)}
        self._group: Any = None
        if not reserved:
            return
        check(chosen, ray.cluster_resources())
        self._group = placement_group([chosen.bundles[i] for i in reserved], strategy="PACK")
        if not self._group.wait(WAIT_S):
            remove_placement_group(self._group)
            raise PlacementError(
                f"the cluster has what the roles need ({_words(chosen)}), but not free and on nodes that hold a whole "
                f"process each, and that for {WAIT_S:.0f} s: wait for other jobs to end, or lower [roles]"
            )

    def of(self, role: str) -> Places:
        """Options for Ray's `.options(…)` of each process of a role."""
        return [self._options(bundle) for bundle in self._plan.places[role]]

    def __enter__(self) -> "Placement":
        return self

    def __exit__(self, *_: object) -> None:
        if self._group is not None and ray.is_initialized():
            remove_placement_group(self._group)

    def _options(self, bundle: int) -> dict[str, Any]:
        if bundle not in self._numbers:
            return {}
        share = self._plan.share(bundle)
        inside = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=self._numbers[bundle])
        return {
            "scheduling_strategy": inside,
            "num_cpus": share.get("CPU", 0.0),
            "num_gpus": share.get("GPU", 0.0),
        }


def _resources(cpus: float, gpus: float) -> dict[str, float]:
    return {kind: amount for kind, amount in (("CPU", cpus), ("GPU", gpus)) if amount}


def _total(bundles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for bundle in bundles:
        total.update(bundle)
    return dict(total)


def _words(chosen: PlacementPlan) -> str:
    return "; ".join(
        f"{name} {', '.join(f'{amount:g} {kind}' for kind, amount in needs.items())}"
        for name, needs in chosen.needs.items()
        if needs
    )
