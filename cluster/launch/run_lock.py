"""Locks a run's folder and the place of its checkpoints against other runs, by files that name host and process.

The lock of a folder lies beside it, as `quickstart.lock`, since the folder itself may be moved aside; that of a place
elsewhere lies inside. A lock whose process is gone is taken over on its own host. Nobody can know from another host.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import tensorstore

from lockstep.cluster.process_identity import ProcessIdentity
from lockstep.distributed.checkpoint.storage import Folder, Storage

LOCK = "run.lock"
"""Name of a lock inside of a place."""


class RunLocked(ValueError):
    """Another run writes there; the message says which, and how to proceed."""


@contextmanager
def locked(folder: Path, checkpoints: Storage) -> Iterator[None]:
    """Hold the locks of a run's folder and of the place of its checkpoints, where that is elsewhere.

    Raises:
        RunLocked: when another run has one of them.
    """
    folder = folder.resolve()
    with ExitStack() as stack:
        stack.enter_context(_held(folder, Folder(folder.parent), f"{folder.name}.lock"))
        if not is_inside(checkpoints, folder):
            stack.enter_context(_held(checkpoints, checkpoints, LOCK))
        yield


def is_inside(checkpoints: Storage, folder: Path) -> bool:
    """Whether checkpoints go into a run's folder, so that they move with it."""
    return isinstance(checkpoints, Folder) and checkpoints.path.resolve().is_relative_to(folder.resolve())


@contextmanager
def _held(what: Path | Storage, place: Storage, name: str) -> Iterator[None]:
    """Hold one lock: written only if it still is as it was read, so that of two who see it free one gets it."""
    store = tensorstore.KvStore.open(place.kvstore).result()
    found = store.read(name).result()
    holder = _holder(bytes(found.value)) if found.state == "value" else None
    free = found.state == "missing" or (holder is not None and holder.is_gone())
    own = json.dumps(asdict(ProcessIdentity.this_process()))
    stamp = store.write(name, own, if_equal=found.stamp.generation).result() if free else None
    if stamp is None or not stamp.generation:
        raise RunLocked(
            f"another run writes into {what}: {holder or 'a process'} holds {place}/{name}; wait until it has ended, "
            "or remove that file if you know that it has"
        )
    try:
        yield
    finally:
        with suppress(ValueError):  # a lock that stays is taken over
            store.write(name, None, if_equal=stamp.generation).result()


def _holder(content: bytes) -> ProcessIdentity | None:
    """Who a lock says holds it; None where it cannot be read."""
    try:
        return ProcessIdentity(**json.loads(content))
    except (ValueError, TypeError):
        return None
