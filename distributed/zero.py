"""DeepSpeed's ZeRO optimizer under somebody else's schedule: the only module that touches DeepSpeed.

The accumulation boundary is ours (`managed_gradient_accumulation: false`): backwards run wherever the schedule wants
them, then `step` reduces over the data axis, clips by the global norm and updates. DeepSpeed averages over the data
axis, so losses are multiplied by its size and gradients become sums over the global batch.
"""

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")

import deepspeed
from deepspeed.utils import logger as deepspeed_logger

from lockstep.distributed.groups import Groups

# DeepSpeed would compile its shared-memory collectives at start-up, and fail where there is no C++ compiler.
deepspeed.ops.__compatible_ops__ = {}


class _Grid:
    """What DeepSpeed asks of its `mpu`. Its "model parallel" means tensor × pipeline."""

    def __init__(self, groups: Groups) -> None:
        axes = {
            "model": groups.model,
            "tensor_model": groups.tensor,
            "pipeline_model": groups.pipeline,
            "data": groups.data,
        }
        for axis, group in axes.items():
            setattr(self, f"get_{axis}_parallel_group", lambda group=group: group)
            setattr(self, f"get_{axis}_parallel_rank", lambda group=group: dist.get_rank(group))
            setattr(self, f"get_{axis}_parallel_world_size", lambda group=group: dist.get_world_size(group))


def replicate(parameter: nn.Parameter) -> None:
    """Mark a copy of a parameter that another stage owns, so that the gradient norm counts it once."""
    parameter.ds_pipe_replicated = True  # type: ignore[attr-defined]


class ZeroOptimizer:
    """An optimizer whose state is split over the data axis as `layout.zero` says."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, groups: Groups, clip_norm: float) -> None:
        deepspeed_logger.setLevel(logging.WARNING)
        dtype = next(module.parameters()).dtype
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip_norm,
            "managed_gradient_accumulation": False,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {"stage": groups.layout.zero, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        parameters = [p for p in module.parameters() if p.requires_grad]
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=parameters, mpu=_Grid(groups), config=config
        )

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient that will be reduced, wherever DeepSpeed accumulates it."""
        accumulated = getattr(parameter, "grad_accum", None)
        return parameter.grad if accumulated is None else accumulated

    def forget(self) -> None:
        """Start the optimizer's moments afresh, for a new phase of training."""
        optimizer: Any = self._engine.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        optimizer.state.clear()

    def step(self, learning_rate: float) -> float:
        """Reduce, clip, update, and forget the gradients. Returns the global norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm: Any = self._engine.get_global_grad_norm()
        return float(norm if norm is not None else 0.0)
