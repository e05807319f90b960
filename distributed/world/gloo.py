"""One gloo device for all process groups of a process.

Left alone, each group makes a device of its own, with a port and a thread that wakes a hundred times a second.
megatron-core makes some twenty groups in a process, most of them of one rank.
"""

import os
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

_Gloo: Any = ProcessGroupGloo
_init = _Gloo.__init__


def share_device() -> None:
    """Let groups that are made from now on, until `own_devices`, share a device: one for each interface that is set."""
    names = os.environ.get("GLOO_SOCKET_IFNAME")
    devices = [_Gloo.create_device(interface=n) for n in names.split(",")] if names else [_Gloo.create_default_device()]

    def init(self: ProcessGroupGloo, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options = _Gloo._Options()
        options._devices, options._timeout = devices, timeout
        _init(self, store, rank, size, options)

    _Gloo.__init__ = init


def own_devices() -> None:
    """Let groups have devices of their own again."""
    _Gloo.__init__ = _init
