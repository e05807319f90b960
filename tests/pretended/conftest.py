"""A world of two processes with pretended devices, which all tests share: starting it takes ten seconds."""

import shutil
from collections.abc import Iterator

import pytest
import torch

from tests.pretended.worlds import PretendedPool


@pytest.fixture(scope="session")
def pretended() -> Iterator[PretendedPool]:
    """Worlds of two ranks, each with a pretended device of its own."""
    if torch.backends.cuda.is_built():
        pytest.skip("a torch with CUDA has kernels of its own, and none can take their place")
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler for guard.cpp")
    with PretendedPool(devices=2) as pool:
        yield pool
