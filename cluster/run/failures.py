"""Failures of a run whose cause is known, as a sentence in the place of a worker's traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lockstep.distributed.checkpoint.arrays import BadArray
from lockstep.distributed.checkpoint.saver import FULL, SaveFailed
from lockstep.rl.remote import WorkerFailed


class RunFailed(RuntimeError):
    """A run that ended early; the message is a sentence that says why, and how to go on."""


@contextmanager
def told_in_sentences(folder: Path) -> Iterator[None]:
    """A block whose failures for want of disk space, or at a damaged checkpoint, become `RunFailed`.

    Args:
        folder: where the run writes, for errors that name no file.

    Raises:
        RunFailed: in the place of such failures; others go on as they are.
    """
    try:
        yield
    except WorkerFailed as error:
        cause = getattr(error.__cause__, "cause", None)  # what Ray's error of a task wraps
        if isinstance(cause, SaveFailed):
            raise RunFailed(_unsaved(cause)) from error
        if isinstance(cause, BadArray):
            raise RunFailed(f"{cause}: remove that checkpoint, and resume from the one before it") from error
        raise
    except SaveFailed as error:
        raise RunFailed(_unsaved(error)) from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = error.filename or folder
        raise RunFailed(f"{where} could not be written ({error.strerror}): free space there, and resume") from error


def _unsaved(error: SaveFailed) -> str:
    return f"{error}; checkpoints before it are whole: free space there, and resume"
