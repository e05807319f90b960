"""The entry of a process with pretended devices.

torch asks once, as it is loaded, what there is of CUDA: this module may not import it.
"""

import ctypes
import os
from multiprocessing.connection import Connection


def serve(devices: int, guard: str, torch_library: str, pipe: Connection) -> None:
    """Serves a pool of ranks (see `RankPool`) with pretended devices.

    Args:
        guard: see `device.compile_guard`.
        torch_library: torch's library that the guard belongs to.
    """
    os.environ.pop("DS_ACCELERATOR", None)  # of the process that started this one
    ctypes.CDLL(torch_library, ctypes.RTLD_GLOBAL)
    ctypes.CDLL(guard)
    from tests.pretended import cuda

    cuda.install(devices, guard)
    from lockstep.distributed.world import rank_pool

    rank_pool._serve(pipe)
