"""Worker processes that leave interruption to their parent, and end when it is gone."""

import os
import signal
import threading
from multiprocessing import connection, parent_process


def follow_parent() -> None:
    """To be called first in a process that `multiprocessing` started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
