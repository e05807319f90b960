"""Checks that what a run writes is on storage that all of its nodes share, by a file that each of them reads.

A path means another disk on each node unless it is mounted from one place. A run that found out by itself would hang in
its first checkpoint, or resume from half of one.
"""

import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import ray
from ray.util.client import ray as ray_client

from lockstep.cluster.launch.capacity import Node
from lockstep.cluster.launch.plan import RunPlan
from lockstep.cluster.launch.run_lock import is_inside
from lockstep.distributed.checkpoint.storage import Folder, Storage
from lockstep.rl.remote import on_node

SEEN_S = 5.0
"""How long a file may take to be seen by another node: file systems of networks keep lists of files for seconds."""
ANSWER_S = 120.0
"""How long a node may take to answer, the start of a process on it included."""


class NotShared(ValueError):
    """A node has other storage at a path than the driver."""


def check_shared(plan: RunPlan, nodes: Sequence[Node]) -> None:
    """Check that the nodes of a run and its driver share the storage of all that the run writes.

    Raises:
        NotShared: names a node and the path that is its own, or that it cannot read or write.
    """
    driver = ray.get_runtime_context().get_node_id()
    others = [node for node in nodes if node.id != driver or ray_client.is_connected()]
    if others:
        check_places(_written(plan), others)


def check_places(places: Mapping[str, Storage], nodes: Sequence[Node]) -> None:
    """Write a file into each place that nodes read and answer; raises as `check_shared`.

    Args:
        places: by the key of the recipe that names them.
    """
    token = secrets.token_hex(8)
    name, replies = f"canary-{token}", {node.id: f"canary-{token}-{number}" for number, node in enumerate(nodes)}
    with _removed(places.values(), [name, *replies.values()]):
        for key, place in places.items():
            try:
                place.write(name, token)
            except (OSError, ValueError) as error:
                raise NotShared(f"the driver {_unusable(key, place, error)}") from error
        answers = [on_node(node.id, _answer, name, replies[node.id], token, dict(places)) for node in nodes]
        deadline = time.monotonic() + ANSWER_S
        for node, answer in zip(nodes, answers, strict=True):
            try:
                said = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
            except ray.exceptions.RayError as error:  # GetTimeoutError is one
                raise NotShared(
                    f"node {node.address} did not read and write {', '.join(map(str, places.values()))} in "
                    f"{ANSWER_S:g} s ({type(error).__name__}): see that they are mounted there, and that it lives"
                ) from error
            if said:
                raise NotShared(f"node {node.address} {said}")
            for key, place in places.items():
                if _read(place, replies[node.id]) != token:
                    raise NotShared(f"node {node.address} {_own(key, place)}")


def _written(plan: RunPlan) -> dict[str, Storage]:
    """The places that a run writes into, by the key of the recipe that names them."""
    folder = plan.recipe.folder.resolve()
    found: dict[str, Storage] = {"run": Folder(folder if folder.is_dir() else folder.parent)}
    if not is_inside(plan.checkpoints, folder):
        found["checkpoints.at"] = plan.checkpoints
    return found


def _answer(name: str, reply: str, token: str, places: dict[str, Storage]) -> str:
    """Runs on a node: reads a file in each place and writes another one; returns what is wrong, or nothing."""
    for key, place in places.items():
        try:
            if _read(place, name) != token:
                return _own(key, place)
            place.write(reply, token)
        except (OSError, ValueError) as error:
            return _unusable(key, place, error)
    return ""


def _read(place: Storage, name: str) -> str:
    """The text of a file, as soon as it is seen; empty where it is not."""
    deadline = time.monotonic() + SEEN_S
    while True:
        try:
            return place.read(name)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.2)


@contextmanager
def _removed(places: Collection[Storage], names: Sequence[str]) -> Iterator[None]:
    """Removes files of these names in the end."""
    try:
        yield
    finally:
        for place in places:
            for name in names:
                with suppress(OSError, ValueError):
                    place.unlink(name)


def _own(key: str, place: Storage) -> str:
    return f"has its own {place}, which {key} names: put it on storage that all nodes share"


def _unusable(key: str, place: Storage, error: Exception) -> str:
    return f"cannot use {place}, which {key} names: {str(error).splitlines()[0]}"
