"""Imports megatron-core and DeepSpeed without loading torch.compile or TensorBoard, for the device of the host.

Both compile functions as they are imported, of which those that are used here are used as they are; loading the
compiler is a third of what a process takes to start, and TensorBoard, which megatron-core's timers may write to, a
tenth. Everybody takes them from here, since the first to import them decides.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Stands in for `torch.compile`, called or as a decorator with options: returns the function unchanged."""
    return function or _as_it_is


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Within this block importing a module fails, unless it has been imported before."""
    loaded = sys.modules.setdefault(module, None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if loaded is None:
            del sys.modules[module]


if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

with patch.object(torch, "compile", _as_it_is), _without("torch.utils.tensorboard"):
    import deepspeed
    import deepspeed.moe.layer
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION as zero_optimization
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero import utils as zero_utils
    from deepspeed.runtime.zero.muon import original_muon
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.utils import groups as deepspeed_groups
    from deepspeed.utils import logger as deepspeed_logger
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.transformer_config import TransformerConfig

# DeepSpeed would compile its shared-memory collectives at start-up, and fail where there is no C++ compiler.
deepspeed.ops.__compatible_ops__ = {}

__all__ = [
    "ModelType",
    "PartitionedParameterCoordinator",
    "TransformerConfig",
    "deepspeed",
    "deepspeed_groups",
    "deepspeed_logger",
    "get_forward_backward_func",
    "original_muon",
    "parallel_state",
    "parameter_offload",
    "tensor_parallel",
    "zero_optimization",
    "zero_utils",
]
