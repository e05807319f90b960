"""Places the processes of each role on nodes: a tensor group on one node, on devices of its own or on the policy's.

What is reserved is one placement group of Ray, which is there as a whole or not at all, before any process starts. It
has one bundle for each tensor group, since a bundle is on one node. What is not reserved is on nodes that we choose.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from lockstep.cluster.launch.capacity import (
    Node,
    Resources,
    autoscaler,
    can_grow,
    check_addresses,
    counted,
    fits,
    living_nodes,
)
from lockstep.cluster.launch.plan import RunPlan
from lockstep.rl.remote import Place, Places

SAY_S = 30.0
"""How often a run that waits says that it does, where nothing has changed."""

KINDS = ("CPU", "GPU")


class PlacementError(ValueError):
    """Roles that a cluster cannot hold."""


@dataclass(frozen=True)
class TensorGroup:
    """Processes of a role that are on one node."""

    role: str
    ranks: range
    each: Resources
    """What each of them reserves; empty for nothing."""

    @property
    def resources(self) -> Resources:
        """What they reserve together; of more than one device Ray reserves whole ones."""
        amounts = {kind: amount * len(self.ranks) for kind, amount in self.each.items()}
        return {k: math.ceil(amount) if k == "GPU" and amount > 1 else amount for k, amount in amounts.items()}


@dataclass(frozen=True)
class PlacementPlan:
    """Who reserves what, and who is placed together with whom."""

    groups: tuple[TensorGroup, ...]
    together: Mapping[str, tuple[int, ...]]
    """By role that has no groups of its own: the rank of the policy that each of its processes is on the devices of."""

    @property
    def reserved(self) -> list[TensorGroup]:
        """The groups that reserve anything."""
        return [group for group in self.groups if group.resources]

    def needs(self, kind: str) -> dict[str, float]:
        """What each role reserves of a kind of resource, where it reserves any."""
        found: dict[str, float] = {}
        for group in self.groups:
            found[group.role] = found.get(group.role, 0) + group.resources.get(kind, 0)
        return {role: amount for role, amount in found.items() if amount}

    def __str__(self) -> str:
        return "; ".join(
            f"{sum(needs.values()):g} {kind} ({_listed(needs)})" for kind in KINDS if (needs := self.needs(kind))
        )


def plan_placement(run: RunPlan, *, devices: bool) -> PlacementPlan:
    """Plan the tensor groups of each role.

    Args:
        devices: whether the cluster has GPUs, so that a process with a model reserves one unless told otherwise.
    """
    roles, policy = run.recipe.roles, run.processes["policy"]
    present = {name: role for name, role in roles.by_name.items() if name in run.processes}
    together = {name: role for name, role in present.items() if role.place == "together"}
    size = math.lcm(*(run.tensor_degree(name) for name in ("policy", *together)))
    groups = list(_groups(run, "policy", size, roles.policy.cpus, roles.policy.gpus, devices))
    for name, role in present.items():
        if name not in together:
            groups += _groups(run, name, run.tensor_degree(name), role.cpus, role.gpus, devices)
    beside = {name: tuple(rank % policy for rank in range(run.processes[name])) for name in together}
    return PlacementPlan(tuple(groups), beside)


def _groups(
    run: RunPlan, role: str, size: int, cpus: float, gpus: float | None, devices: bool
) -> Iterator[TensorGroup]:
    """A role's processes in groups of a size; the last one has those that are left."""
    count, each = run.processes[role], float(devices and run.has_model(role)) if gpus is None else gpus
    reserves = {kind: amount for kind, amount in zip(KINDS, (cpus, each), strict=True) if amount}
    for start in range(0, count, size):
        yield TensorGroup(role, range(start, min(start + size, count)), reserves)


def check(plan: PlacementPlan, nodes: Sequence[Node]) -> None:
    """Refuse a plan that nodes could not hold if nobody else used them.

    Raises:
        PlacementError: names what is needed, by role, and what is there.
    """
    for kind in KINDS:
        needs, has = plan.needs(kind), [node.resources.get(kind, 0) for node in nodes]
        for group in plan.reserved:
            if (one := group.resources.get(kind, 0)) > max(has, default=0) and len(group.ranks) > 1:
                raise PlacementError(
                    f"{group.role} needs {needs[group.role]:g} {kind} in groups of {one:g}, each on one node, and the "
                    f"largest node has {max(has, default=0):g}: lower the tensor degree of its layout, or what it "
                    "reserves in [roles], or use larger nodes"
                )
        if sum(needs.values()) > sum(has):
            raise PlacementError(
                f"the roles need {sum(needs.values()):g} {kind} ({_listed(needs)}) and the cluster has {sum(has):g}: "
                "place roles together, lower what they reserve in [roles], or use a larger cluster"
            )
    if not fits([group.resources for group in plan.reserved], [node.resources for node in nodes]):
        raise PlacementError(
            f"the roles need {plan}, each tensor group on one node, and {len(nodes)} nodes cannot be shared out so: "
            "lower tensor degrees, or what roles reserve in [roles], or use larger nodes"
        )


class Placement:
    """Where all processes of a run are, with what they reserve; a context manager that gives it back."""

    def __init__(self, run: RunPlan, say: Callable[[str], object] = lambda sentence: None) -> None:
        """Reserve what a run needs; waits for it as long as `roles.wait` says.

        Args:
            say: told what is waited for.

        Raises:
            PlacementError: when the cluster cannot hold the run, or has not had what it needs in that time.
        """
        self._run, self._say = run, say
        self._group: PlacementGroup | None = None
        self._reserve()

    def renew(self) -> None:
        """Reserve anew, after nodes were lost; raises as the constructor does."""
        self.__exit__()
        self._reserve()

    def _reserve(self) -> None:
        nodes = living_nodes()
        self._plan = plan_placement(self._run, devices=any(node.resources.get("GPU") for node in nodes))
        if self._plan.reserved:
            self._group = _reserved(self._plan, nodes, self._run.recipe.roles.wait, self._say)
            nodes = living_nodes()
        self._seats = _seats(self._plan, nodes, self._group)
        check_addresses(self.nodes)

    @property
    def nodes(self) -> list[Node]:
        """The nodes that work for the run."""
        return list({seat.node.id: seat.node for seats in self._seats.values() for seat in seats}.values())

    def of(self, role: str) -> Places:
        """The place of each process of a role; one that the plan does not know is with the policy's first."""
        own = role in self._seats
        ranks = range(len(self._seats[role])) if own else self._plan.together.get(role, (0,))
        return [self._place(role, self._seats[role if own else "policy"][rank], own) for rank in ranks]

    def __enter__(self) -> "Placement":
        return self

    def __exit__(self, *_: object) -> None:
        if self._group is not None and ray.is_initialized():
            remove_placement_group(self._group)
        self._group = None

    def _place(self, role: str, seat: "_Seat", own: bool) -> Place:
        reserves = {kind: amount for kind, amount in seat.each.items() if own and not (kind == "GPU" and seat.devices)}
        options: dict[str, Any] = {f"num_{kind.lower()}s": amount for kind, amount in reserves.items()}
        if self._group is not None and seat.bundle is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group, seat.bundle)
        else:  # another one will do where it is lost; without a byte to reserve Ray takes any
            options |= {"scheduling_strategy": NodeAffinitySchedulingStrategy(seat.node.id, soft=True), "memory": 1}
        variables = {"CUDA_VISIBLE_DEVICES": ",".join(seat.devices)} if seat.devices else {}
        return Place(options, variables, self._sharing(role, seat.node))

    def _sharing(self, role: str, node: Node) -> int:
        """Processes on a node that compute while a role does."""
        count = 0
        for name in self._run.computing_with(role):
            at = self._seats.get(name) or [self._seats["policy"][rank] for rank in self._plan.together[name]]
            count += sum(seat.node.id == node.id for seat in at)
        return max(1, count)


@dataclass(frozen=True)
class _Seat:
    """Where a process is, and what it reserves there."""

    node: Node
    bundle: int | None
    each: Resources
    devices: Sequence[str] = ()
    """The GPUs of its bundle that it is given; with none, those that Ray gives it are its own."""


def _seats(plan: PlacementPlan, nodes: Sequence[Node], group: PlacementGroup | None) -> dict[str, list[_Seat]]:
    """The seats of each role's processes by rank: equal groups in the order of nodes, so that neighbours stay so."""
    by_id = {node.id: number for number, node in enumerate(nodes)}
    at = placement_group_table(group)["bundles_to_node_id"] if group is not None else {}
    free = sorted(range(len(plan.reserved)), key=lambda bundle: (by_id[at[bundle]], bundle))
    working = [node for node in nodes if node.resources.get("CPU")] or nodes  # a head may be there for the driver alone
    elsewhere = itertools.cycle(working[1:] or working)
    taken: list[tuple[TensorGroup, int | None, Node]] = []
    for each in plan.groups:
        if each.resources:
            bundle = next(b for b in free if plan.reserved[b].resources == each.resources)
            free.remove(bundle)
            taken.append((each, bundle, nodes[by_id[at[bundle]]]))
        else:
            taken.append((each, None, working[0] if each.role == "policy" else next(elsewhere)))
    devices = _devices(group, {bundle: each for each, bundle, _ in taken if bundle is not None})
    seats: dict[str, list[_Seat]] = {}
    for each, at_bundle, node in taken:
        for number in range(len(each.ranks)):
            seat = _Seat(node, at_bundle, each.each, _part(devices.get(at_bundle, ()), number, each.each.get("GPU", 0)))
            seats.setdefault(each.role, []).append(seat)
    return seats


def _devices(group: Any, taken: Mapping[int, TensorGroup]) -> dict[int | None, list[str]]:
    """By bundle, the numbers of its GPUs in order, so that neighbouring ranks get neighbouring ones.

    Those of rollout workers are left to Ray: who replaces one that died with its node finds others.
    """
    asked = {
        bundle: ray.remote(num_cpus=0, num_gpus=each.resources["GPU"])(ray.get_gpu_ids)
        .options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle))
        .remote()
        for bundle, each in taken.items()
        if each.resources.get("GPU") and each.role != "rollout"
    }
    return {bundle: sorted(map(str, ray.get(answer)), key=counted) for bundle, answer in asked.items()}


def _part(devices: Sequence[str], number: int, each: float) -> Sequence[str]:
    """The devices of a process, by its number in its group, of which several may share one."""
    return devices[math.floor(number * each) : math.ceil((number + 1) * each)]


def _reserved(
    plan: PlacementPlan, nodes: Sequence[Node], seconds: float, say: Callable[[str], object]
) -> PlacementGroup:
    """A placement group of what a plan reserves, which the run has.

    Raises:
        PlacementError: as `check`, and where the run does not have it in so many seconds.
    """
    if not can_grow(nodes):
        check(plan, nodes)
    group = placement_group([dict(each.resources) for each in plan.reserved], strategy="PACK")
    try:
        _wait(group, plan, seconds, say)
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def _wait(group: PlacementGroup, plan: PlacementPlan, seconds: float, say: Callable[[str], object]) -> None:
    """Wait for a placement group, and say so when something has changed, or after a while.

    Raises:
        PlacementError: when it is not there in time, or an autoscaler says that it will never be.
    """
    began, said, last = time.monotonic(), "", 0.0
    while not group.wait(1):
        waited = time.monotonic() - began
        there, free = ray.cluster_resources(), ray.available_resources()
        scaler = autoscaler()
        idle = all(free.get(kind, 0) >= there.get(kind, 0) for kind in KINDS)
        if scaler and idle and not scaler.starting and any(group.id.hex() in words for words in scaler.infeasible):
            raise PlacementError(
                f"the roles need {plan}, each tensor group on one node, and the autoscaler may start no nodes that "
                "hold it: lower tensor degrees or what roles reserve in [roles], or allow more or larger nodes"
            )
        if waited >= seconds:
            raise PlacementError(
                f"the roles need {plan}, and that was not free in {seconds:g} s: wait for other jobs to end, raise "
                "roles.wait, or lower what they reserve in [roles]"
            )
        amounts = ", ".join(f"{free.get(k, 0):g} of {there.get(k, 0):g} {k}" for k in KINDS if plan.needs(k))
        starting = f", {scaler.starting} more nodes are starting" if scaler and scaler.starting else ""
        sentence = f"waiting for {plan}: {amounts} are free in the cluster{starting}"
        if sentence != said or waited - last >= SAY_S:
            say(f"{sentence} ({waited:.0f} s of at most {seconds:g} s)")
            said, last = sentence, waited


def _listed(needs: Mapping[str, float]) -> str:
    return ", ".join(f"{role} {amount:g}" for role, amount in needs.items())
