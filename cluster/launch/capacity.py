"""What a Ray cluster has: its nodes with their resources, and whether an autoscaler would bring more."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.client import ray as ray_client

from lockstep.distributed.world.network import is_loopback

Resources = Mapping[str, float]
"""Amounts by kind, as CPU and GPU."""

REPORT_S = 10.0
"""How long a head may take to say whether it has an autoscaler; it does so every 5 s."""
MOST_PACKINGS = 20_000
"""How many ways to share groups out over nodes are tried before it is left to Ray."""

_AUTOSCALER, _V2_ENABLED = b"__autoscaler", b"__autoscaler_v2_enabled"
_V1_REPORT = b"__autoscaling_status"
_KINDS = ("CPU", "GPU")
_OWN_TYPE = "node_"
"""How Ray names the types of nodes that nobody may add more of."""


class UnreachableNode(ValueError):
    """A node whose address means another host everywhere else."""


@dataclass(frozen=True)
class Node:
    """A host of a cluster, as Ray knows it."""

    id: str
    address: str
    host: str
    """Its name."""
    resources: Resources
    """What it has in all, by kind: CPU, GPU."""


@dataclass(frozen=True)
class Autoscaler:
    """What a cluster's autoscaler says."""

    starting: int
    """Nodes that are on their way."""
    infeasible: frozenset[str] = frozenset()
    """What it says of placement groups for which it cannot bring nodes, as long as its bounds and others' use last."""


def living_nodes() -> list[Node]:
    """The nodes that live, the driver's first, then by address."""
    mine = ray.get_runtime_context().get_node_id()
    found = [
        Node(each["NodeID"], each["NodeManagerAddress"], each["NodeManagerHostname"], each["Resources"])
        for each in ray.nodes()
        if each["Alive"]
    ]
    return sorted(found, key=lambda node: (node.id != mine, counted(node.address), node.id))


def autoscaler() -> Autoscaler | None:
    """The cluster's autoscaler; None where it has none, or where its head has said nothing yet."""
    if _internal_kv_get(_V2_ENABLED, namespace=_AUTOSCALER) == b"1":
        return _second_version()
    said = _first_version()
    if all(kind.startswith(_OWN_TYPE) for kind in _types(said)):
        return None
    return Autoscaler(len(said["pending_nodes"]) + sum(said["pending_launches"].values()))


def can_grow(nodes: Sequence[Node]) -> bool:
    """Whether nodes may be added to a cluster; waits for a young head to say so."""
    if len(nodes) == 1 and is_loopback(nodes[0].address):  # started for this run, as other hosts cannot join it
        return False
    deadline = time.monotonic() + REPORT_S
    while (scaler := autoscaler()) is None and not _types(_first_version()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return scaler is not None


def check_addresses(nodes: Sequence[Node]) -> None:
    """Refuse nodes of which one is known by an address that the others cannot reach.

    Raises:
        UnreachableNode: names it.
    """
    inside = [node for node in nodes if is_loopback(node.address)]
    if inside and len({(node.host, is_loopback(node.address)) for node in nodes}) > 1:
        raise UnreachableNode(
            f"node {inside[0].host} is known to Ray by {inside[0].address}, which no other host reaches: start it by "
            "`ray start --node-ip-address=…` with its address in the network that the nodes share"
        )


def fits(groups: Sequence[Resources], nodes: Sequence[Resources]) -> bool:
    """Whether groups, each on one node, can all be on nodes; also where that is not found out in reasonable time."""
    budget = [MOST_PACKINGS]
    seen: set[Any] = set()
    ordered = sorted(groups, key=lambda group: sorted(group.items()), reverse=True)
    rest = tuple(tuple(node.get(kind, 0.0) for kind in _KINDS) for node in nodes)
    return _packed([tuple(group.get(kind, 0.0) for kind in _KINDS) for group in ordered], rest, seen, budget)


def _packed(
    groups: Sequence[tuple[float, ...]], rest: tuple[tuple[float, ...], ...], seen: set[Any], budget: list[int]
) -> bool:
    """Whether groups fit into what is left of nodes."""
    budget[0] -= 1
    if not groups or budget[0] < 0:
        return True
    for node in sorted(set(rest)):
        left = tuple(has - needs for has, needs in zip(node, groups[0], strict=True))
        if min(left) < -1e-9:
            continue
        index = rest.index(node)
        more = tuple(sorted((*rest[:index], left, *rest[index + 1 :])))
        if (len(groups), more) not in seen:
            seen.add((len(groups), more))
            if _packed(groups[1:], more, seen, budget):
                return True
    return False


def _first_version() -> dict[str, Any]:
    """The report of the first version of Ray's autoscaler; empty where there is none yet."""
    said: dict[str, Any] = json.loads(_internal_kv_get(_V1_REPORT) or "{}").get("autoscaler_report") or {}
    return said


def _types(said: Mapping[str, Any]) -> set[str]:
    """Types of the nodes in such a report, which has none before the head has counted itself."""
    there = said.get("node_type_mapping") or {}  # of those that do not count as active, too, as a head without cores
    return {*there.values(), *said.get("pending_launches", {}), *(each[1] for each in said.get("pending_nodes", []))}


def _second_version() -> Autoscaler:
    if ray_client.is_connected():  # a client reaches no more than the head's proxy
        return Autoscaler(0)
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

    reply: Any = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(address=ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    said = reply.autoscaling_state
    starting = len(said.pending_instances) + sum(each.count for each in said.pending_instance_requests)
    return Autoscaler(starting, frozenset(each.details for each in said.infeasible_gang_resource_requests))


def counted(address: str) -> list[tuple[int, str]]:
    """A key by which 10.0.0.9 comes before 10.0.0.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", address)]
