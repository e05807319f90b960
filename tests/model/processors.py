"""Products of bf16 tensors as on CPUs for which torch has bf16 kernels, and as on others."""

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import pytest

from lockstep.model.ops import upcast

KERNELS = pytest.mark.parametrize("bf16_kernels", [True, False], ids=["bf16 kernels", "fp32 products"])


def processor(bf16_kernels: bool) -> AbstractContextManager[Any]:
    """As on a processor that has bf16 kernels, which elsewhere are slow but right, or as on one that has none."""
    return patch.object(upcast, "has_bf16_kernels", return_value=bf16_kernels)
