"""DeepSpeed's ZeRO optimizer under somebody else's schedule: the only module that touches DeepSpeed.

The accumulation boundary is ours (`managed_gradient_accumulation: false`): backwards run wherever the schedule wants
them, then `step` reduces over the data axis, clips by the global norm and updates. DeepSpeed averages over the data
axis, so losses are multiplied by its size and gradients become sums over the global batch.
"""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.moe.layer
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import logger as deepspeed_logger

from lockstep.distributed.groups import Groups, before_leaving

# DeepSpeed would compile its shared-memory collectives at start-up, and fail where there is no C++ compiler.
deepspeed.ops.__compatible_ops__ = {}


EXPERTS = "ep_size_0"
"""DeepSpeed's name for the group of parameters that differ over the expert axis; it insists on such a number."""


class _Grid:
    """What DeepSpeed asks of its `mpu`; "model" there means tensor × pipeline, and "data" all replicas."""

    def __init__(self, groups: Groups) -> None:
        axes = {
            "model": groups.model,
            "tensor_model": groups.tensor,
            "pipeline_model": groups.pipeline,
            "data": groups.replicas,
        }
        for axis, group in axes.items():
            setattr(self, f"get_{axis}_parallel_group", lambda group=group: group)
            setattr(self, f"get_{axis}_parallel_rank", lambda group=group: dist.get_rank(group))
            setattr(self, f"get_{axis}_parallel_world_size", lambda group=group: dist.get_world_size(group))


class _HasExperts(deepspeed.moe.layer.MoE):
    """Tells DeepSpeed, which looks for its own layer, that a module has experts; it computes nothing."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.num_experts = 0

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups exist already."""


def replicate(parameter: nn.Parameter) -> None:
    """Mark a copy of a parameter that another stage owns, so that the gradient norm counts it once."""
    parameter.ds_pipe_replicated = True  # type: ignore[attr-defined]


def as_expert(parameter: nn.Parameter) -> None:
    """Mark a parameter that differs over the expert axis, so that it is reduced over its own replicas only."""
    parameter.allreduce, parameter.group_name = False, EXPERTS  # type: ignore[attr-defined]


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether `as_expert` marked the parameter."""
    return not getattr(parameter, "allreduce", True)


def experts_apart(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """An optimizer's groups of parameters, none of them empty, with experts in groups of their own."""
    found = []
    for group in groups:
        experts = [p for p in group["params"] if is_expert(p)]
        others = [p for p in group["params"] if not is_expert(p)]
        found += [group | {"params": others}, group | {"params": experts, "moe": True, "name": EXPERTS}]
    return [group for group in found if group["params"]]


class ZeroOptimizer:
    """An optimizer whose state is split over the replicas as `layout.zero` says."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, groups: Groups, clip_norm: float) -> None:
        deepspeed_logger.setLevel(logging.WARNING)
        self._groups, self._clip_norm = groups, clip_norm
        self._bfloat16 = next(module.parameters()).dtype == torch.bfloat16
        self._plain = groups.layout.zero == 0
        if any(is_expert(p) for p in module.parameters()):
            module.add_module("_has_experts", _HasExperts())
            deepspeed_groups._EXPERT_PARALLEL_GROUP[EXPERTS] = groups.expert
            deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = groups.expert_replicas
        parameters = [p for p in module.parameters() if p.requires_grad]
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=parameters, mpu=_Grid(groups), config=self._config()
        )
        before_leaving(self._close)
        self._parameters = parameters
        self._norm = 0.0
        if self._plain:
            optimizer.register_step_pre_hook(lambda stepping, *_: self._clip(stepping))
        elif groups.layout.zero in (1, 2) and not groups.layout.offload:
            self._engine.optimizer.scaled_global_norm = self._partitioned_norm

    def _close(self) -> None:
        """Take off DeepSpeed's hooks, and what it remembers elsewhere: they keep the model and its groups alive."""
        self._engine.destroy()
        deepspeed_groups.mpu = None
        parameter_offload.FWD_MODULE_STACK.clear()

    def _config(self) -> dict[str, Any]:
        layout = self._groups.layout
        zero: dict[str, Any] = {"stage": layout.zero, "overlap_comm": False}
        if layout.zero == 3:
            zero["stage3_param_persistence_threshold"] = 0  # small weights are split, too: one way for all
        if layout.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0 if self._plain else self._clip_norm,
            "managed_gradient_accumulation": False,
            "bf16": {"enabled": self._bfloat16},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }

    def begin_backward(self) -> None:
        """To be called by autograd when gradients are about to reach the module.

        DeepSpeed's own forward pass would arrange for this; and without a forward pass between two backward passes,
        as at the end of a pipeline's schedule, it would take them for one.
        """
        if self._groups.layout.zero:
            self._engine.optimizer.clear_backward_seen_flag()
            self._engine._backward_prologue()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Within this block parameters hold their values, which ZeRO-3 splits over replicas otherwise."""
        if self._groups.layout.zero < 3:
            yield
            return
        with deepspeed.zero.GatheredParameters(self._parameters):
            yield

    def forget(self) -> None:
        """Start the optimizer's moments afresh, for a new phase of training."""
        self._innermost().state.clear()

    def changing(self) -> tuple[list[Tensor], torch.optim.Optimizer]:
        """What a step writes to on this rank, as it is stored: weights, master weights, and who keeps moments."""
        optimizer = self._innermost()
        weights = [getattr(p, "ds_tensor", p) for p in self._parameters]  # with ZeRO-3, this rank's part
        masters = [p for group in optimizer.param_groups for p in group["params"]]
        return weights + masters + getattr(self._engine.optimizer, "fp32_partitioned_groups_flat", []), optimizer

    def _innermost(self) -> torch.optim.Optimizer:
        """The optimizer inside of DeepSpeed's."""
        optimizer: Any = self._engine.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return optimizer

    def step(self, learning_rate: float) -> float:
        """Reduce, clip, update, and forget the gradients. Returns the global norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._norm = math.inf  # remains where DeepSpeed finds that gradients overflowed, and does not step
        self._engine.step()
        if self._plain:
            return self._norm
        norm: Any = self._engine.get_global_grad_norm()
        return float(norm if norm is not None else 0.0)

    def _clip(self, optimizer: torch.optim.Optimizer) -> None:
        """Without ZeRO, DeepSpeed does not say the norm of fp32 gradients, and leaves experts out of that of bf16 ones.

        Args:
            optimizer: its parameters are the module's, or fp32 copies of them.
        """
        shares = [(p, p.grad, self._holders(p)) for p in self._parameters if p.grad is not None]
        self._norm = float(self._world_norm(shares))
        if self._clip_norm and self._norm > self._clip_norm:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                if parameter.grad is not None:
                    parameter.grad.mul_(self._clip_norm / (self._norm + 1e-6))

    def _holders(self, parameter: nn.Parameter) -> int:
        groups = self._groups
        return dist.get_world_size(groups.expert_replicas if is_expert(parameter) else groups.replicas)

    def _partitioned_norm(self) -> Tensor:
        """The norm of gradients that are split over replicas; experts count like all others, unlike in DeepSpeed."""
        optimizer: Any = self._engine.optimizer
        shares = [
            (parameter, gradient, 1)
            for group in range(len(optimizer.bit16_groups))
            for gradient, parameter in zip(
                (g for g in optimizer.averaged_gradients[group] if not getattr(g, "_zero_padding", False)),
                optimizer.params_in_partition[group],
                strict=False,
            )
        ]
        return self._world_norm(shares)

    def _world_norm(self, shares: Sequence[tuple[nn.Parameter, Tensor, int]]) -> Tensor:
        """√Σg² over every distinct element in the world.

        Args:
            shares: parameters, their gradients or parts of them, and how many ranks hold the same part.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)
        for parameter, gradient, holders in shares:
            split = getattr(parameter, "tensor_model_parallel", False)
            if (split or self._groups.tensor_rank == 0) and not getattr(parameter, "ds_pipe_replicated", False):
                total += torch.linalg.vector_norm(gradient.float()).double().square() / holders
        dist.all_reduce(total)
        return total.sqrt().float()
