"""DeepSpeed's ZeRO optimizer, driven by our schedule: the only module that touches DeepSpeed.

The accumulation boundary is ours (`managed_gradient_accumulation: false`): backwards run wherever the schedule wants
them, then `step` reduces over the data axis, clips by the global norm and updates. DeepSpeed averages over the data
axis, so losses are multiplied by its size and gradients become sums over the global batch.

Gradients of a bf16 model are added up over micro-batches, and reduced, in fp32: a sum of many in bf16 loses what each
adds to it.
"""

import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.distributed.libraries import (
    PartitionedParameterCoordinator,
    deepspeed,
    deepspeed_groups,
    deepspeed_logger,
    original_muon,
    parameter_offload,
    zero_optimization,
    zero_utils,
)
from lockstep.distributed.optimizer.data_parallel import BUCKET, DataParallel
from lockstep.distributed.optimizer.grad_norm import LocalValues, PartNorms, global_norm
from lockstep.distributed.optimizer.parameter_marks import EXPERTS, is_expert
from lockstep.distributed.optimizer.partition import Sharded, Share, share_of, shares_of_all, shares_of_each, stored
from lockstep.distributed.optimizer.weight_penalty import ReducedGradient, WeightPenalty
from lockstep.distributed.optimizer.zero_state import ZeroState
from lockstep.distributed.world.groups import Groups, before_leaving

_linear = torch.nn.functional.linear
"""ZeRO-3 replaces it for the whole process."""


class _Grid:
    """The `mpu` that DeepSpeed asks for groups; "model" there means tensor × pipeline, and "data" all replicas."""

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


def _clear_caches(kind: type) -> None:
    """Empty what methods of a class remember by `lru_cache`, under decorators too: it holds every object that called.

    ZeRO-3 has such a cache from its second forward pass on.
    """
    for method in filter(inspect.isfunction, vars(kind).values()):
        for function in (method, *inspect.getclosurevars(method).nonlocals.values()):
            if clear := getattr(function, "cache_clear", None):
                clear()


_half_precision = original_muon.ns_compute_dtype
_newton_schulz = original_muon.zeropower_via_gram_newtonschulz
_newton_schulz = getattr(_newton_schulz, "_torchdynamo_orig_callable", _newton_schulz)  # where others came before us


def newton_schulz(matrices_NAB: Tensor, exact: bool) -> Tensor:
    """Orthogonalise matrices approximately, keeping their singular vectors: five quintic iterations on Gram matrices.

    Singular values come out between 0.7 and 1.2 (Jordan et al. 2024). Not compiled: kernels for one shape differ
    from those for any shape, and compiling asks for a C++ compiler.

    Args:
        exact: compute in fp32, so that layouts agree; otherwise in the half precision that DeepSpeed chooses.
    """
    original_muon.ns_compute_dtype = (lambda _: torch.float32) if exact else _half_precision
    return _newton_schulz(matrices_NAB, steps=5).to(matrices_NAB.dtype)


@contextmanager
def _standing_still(optimizer: Any) -> Iterator[None]:
    """Within this block the optimizer does not step.

    In bf16 without ZeRO, DeepSpeed steps once with gradients of 0 to make the state: Adam would count that step in its
    bias correction, and decay the weights.
    """
    optimizer.step = lambda: None
    try:
        yield
    finally:
        del optimizer.step


@contextmanager
def _partitioned_at_every_stage() -> Iterator[None]:
    """Within this block DeepSpeed's ZeRO-1 is that of ZeRO-2, whatever the dtype of sums of gradients.

    It has another optimizer for bf16 weights with fp32 sums, which knows nothing of experts, offloading and Muon.
    """
    chosen = deepspeed.DeepSpeedEngine._do_optimizer_sanity_check

    def choose(engine: Any, optimizer: Any) -> Any:
        found = chosen(engine, optimizer)
        return zero_optimization if engine.zero_optimization() else found

    deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = choose
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = chosen


class ZeroOptimizer:
    """An optimizer wrapped by DeepSpeed's ZeRO, which partitions state, gradients or weights over the replicas."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        groups: Groups,
        clip_norm: float,
        parts: Mapping[str, Iterable[nn.Parameter]],
        gradient_dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            parts: see `Engine`.
            gradient_dtype: see `Engine`.
        """
        deepspeed_logger.setLevel(logging.WARNING)
        self._groups, self._clip_norm = groups, clip_norm
        self._bfloat16 = next(module.parameters()).dtype == torch.bfloat16
        self._sums_in_fp32 = self._bfloat16 and gradient_dtype == torch.float32
        if any(is_expert(p) for p in module.parameters()):
            module.add_module("_has_experts", _HasExperts())
            deepspeed_groups._EXPERT_PARALLEL_GROUP[EXPERTS] = groups.expert
            deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = groups.expert_replicas
        parameters = [p for p in module.parameters() if p.requires_grad]
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        if type(optimizer) not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:  # it would warn of an untested one
            zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))
        with _standing_still(optimizer), _partitioned_at_every_stage():
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, model_parameters=parameters, mpu=_Grid(groups), config=self._config()
            )
        before_leaving(self._close)
        self._parameters = parameters
        self._norms = PartNorms(groups, parts, parameters[0].device)
        self._squares = torch.zeros(len(parts), dtype=torch.float64)
        self._shares = self._partition(stepped, optimizer)
        if isinstance(optimizer, Sharded):
            optimizer.shares = self._shares
        self.penalty = WeightPenalty(self._norms)
        self._squared: float | None = None
        self.state = ZeroState(module, self._innermost(), groups, self._shares, self.penalty)
        self._whole: DataParallel | None = None
        if groups.layout.zero_stage == 0:
            owners = {tensor: share.parameter for tensor, (share,) in self._shares.items()}
            self._whole = DataParallel(owners, groups, clip_norm, self._sums_in_fp32)
        elif groups.layout.zero_stage == 3:
            self._engine.optimizer._get_norm_groups = lambda: [self._gradient_norm()]
        else:
            self._engine.optimizer.scaled_global_norm = self._gradient_norm
            # Every gradient was read for what the norm tells anyway: where it is no number, DeepSpeed does not step.
            self._engine.optimizer.check_overflow = lambda **_: None

    def _close(self) -> None:
        """Remove DeepSpeed's hooks, its F.linear and its caches: they keep the model and its groups alive."""
        self._engine.destroy()
        deepspeed_groups.mpu = None
        for experts in (deepspeed_groups._EXPERT_PARALLEL_GROUP, deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP):
            experts.pop(EXPERTS, None)
        torch.nn.functional.linear = _linear
        parameter_offload.FWD_MODULE_STACK.clear()
        _clear_caches(PartitionedParameterCoordinator)

    def _config(self) -> dict[str, Any]:
        layout = self._groups.layout
        zero: dict[str, Any] = {
            "stage": layout.zero_stage,
            # elsewhere it refuses our accumulation
            "overlap_comm": torch.cuda.is_available() and layout.zero_stage >= 2,
            "reduce_bucket_size": BUCKET,
        }
        if layout.zero_stage == 3:
            zero["stage3_param_persistence_threshold"] = 0  # small weights are split, too: one way for all
        if layout.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        sums = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
        return (sums if self._sums_in_fp32 and layout.zero_stage else {}) | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self._clip_norm,
            "managed_gradient_accumulation": False,
            "bf16": {"enabled": self._bfloat16},
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
            "timers": {"throughput": {"enabled": False}},  # they would wait for the device twice in each step
        }

    def _partition(
        self, stepped: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> dict[Tensor, list[Share]]:
        """The shares in each tensor that DeepSpeed gives the optimizer in the place of parameters; see `Sharded`."""
        zero: Any = self._engine.optimizer
        if self._groups.layout.zero_stage == 0:
            tensors = [t for group in optimizer.param_groups for t in group["params"]]
            return {t: [share_of(p, (0, p.numel()), 0, 0)] for t, p in zip(tensors, stepped, strict=True)}
        if self._groups.layout.zero_stage == 3:
            return {
                flat: shares_of_each(parameters, self._groups.replicas)
                for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
            }
        columns = (
            zero.single_partition_of_fp32_groups,
            zero.round_robin_bit16_groups,
            zero.round_robin_bit16_offsets,
            zero.real_dp_process_group,
        )
        return {
            flat: shares_of_all(parameters, offsets, flat.numel(), group)
            for flat, parameters, offsets, group in zip(*columns, strict=True)
        }

    def begin_backward(self) -> None:
        """Prepare DeepSpeed for a backward pass; a gradient hook calls this before gradients reach the module.

        DeepSpeed's own forward pass would arrange for this; and without a forward pass between two backward passes,
        as at the end of a pipeline's schedule, it would take them for one.
        """
        if self._groups.layout.zero_stage:
            self._engine.optimizer.clear_backward_seen_flag()
            self._engine._backward_prologue()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Within this block parameters are whole; ZeRO-3 otherwise keeps them partitioned over replicas."""
        if self._groups.layout.zero_stage < 3:
            yield
            return
        with deepspeed.zero.GatheredParameters([*self._engine.module.parameters()]):
            yield

    def changing(self) -> tuple[list[Tensor], torch.optim.Optimizer]:
        """The tensors that a step writes to on this rank, as stored, and the optimizer that holds the moments."""
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

    def parameter_groups(self, clip_norm: float) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, whose hyperparameters may be changed between steps; sets the clipping."""
        self._clip_norm = clip_norm
        if self._whole is not None:
            self._whole.clip_norm = clip_norm
        else:
            self._engine.optimizer.clip_grad = clip_norm
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    def step(self, learning_rate: float) -> float:
        """Reduce and clip gradients, update, zero the gradients. Returns the global norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._squares.fill_(math.inf)  # remains where DeepSpeed finds that gradients overflowed, and does not step
        if self._whole is not None:
            self._squares = self._whole.step(self._innermost(), self._squares_of_gradients)
        else:
            self._engine.step()
        norm = float(global_norm(self._squares))
        if self._groups.layout.offload and self._groups.layout.zero_stage < 3 and not math.isfinite(norm):
            # DeepSpeed 0.19 drops sums of offloaded gradients with an update only: the next step would add to these
            sums = self._engine.optimizer.averaged_gradients
            sums.update(dict.fromkeys(sums))
        return norm

    def square_gradients(self, scale: float) -> None:
        """Reduce the gradients and add scale times their squares to the Fisher information; no weight changes."""
        self._squared = scale
        try:
            self.step(0.0)
        finally:
            self._squared = None

    def keep_weights(self) -> None:
        """Take the weights as they are for the old ones of the penalty."""
        self.penalty.keep(self._shares)

    def gradient_norms(self) -> dict[str, float]:
        """The norm of each part's gradient in the last step, before clipping."""
        return self._norms.by_part(self._squares)

    def weight_norms(self) -> dict[str, float]:
        """√Σw² of each part. All ranks call this together."""
        return self._norms.by_part(self._norms.squares(self._weights()))

    def _weights(self) -> Iterator[LocalValues]:
        parameters = self._norms.parameters
        if self._groups.layout.zero_stage < 3:
            yield from ((p, p.detach(), self._norms.copies(p)) for p in parameters)
            return
        for share in shares_of_each(parameters, self._groups.replicas):
            yield share.parameter, stored(share), 1

    def _gradient_norm(self) -> Tensor:
        """The global norm of the reduced gradients; keeps the sums of squares of the parts."""
        self._squares = self._squares_of_gradients()
        return global_norm(self._squares)

    def _squares_of_gradients(self) -> Tensor:
        """What `PartNorms.squares` says of the reduced gradients, to which this adds that of the penalty.

        It says ∞ where they are only to be squared: then there is no update.
        """
        if self._squared is not None:
            self.penalty.add_squares(self._gradients(), self._squared)
            return torch.full_like(self._squares, math.inf)
        self.penalty.add_to(self._gradients())
        values = ((share.parameter, gradient, holders) for _, share, gradient, holders in self._gradients())
        return self._norms.squares(values)

    def _gradients(self) -> Iterator[ReducedGradient]:
        if self._whole is not None:
            for tensor, gradient in self._whole.gradients():
                (share,) = self._shares[tensor]
                yield tensor, share, gradient, self._norms.copies(share.parameter)
            return
        averaged: Any = self._engine.optimizer.averaged_gradients
        for index, (tensor, shares) in enumerate(self._shares.items()):
            if self._groups.layout.offload:
                assert tensor.grad is not None
                yield from ((tensor, share, share.within(tensor.grad), 1) for share in shares)
                continue
            present = shares if self._groups.layout.zero_stage == 3 else [share for share in shares if share.length]
            gradients = (g for g in averaged[index] if not getattr(g, "_zero_padding", False))
            for share, gradient in zip(present, gradients, strict=False):  # ZeRO may add padding
                yield tensor, share, gradient.view(-1)[: share.length], 1
