"""Optimizer steps on any nn.Module in any parallel layout: micro-batches in, one update out. Knows no objective."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from lockstep.distributed.checkpoint.reshard import FlatShard
from lockstep.distributed.checkpoint.tensors import Piece, Source
from lockstep.distributed.device import peak_memory
from lockstep.distributed.optimizer.parameter_marks import replicate
from lockstep.distributed.optimizer.snapshot import Snapshot
from lockstep.distributed.optimizer.weight_penalty import WeightPenalty
from lockstep.distributed.optimizer.zero import ZeroOptimizer
from lockstep.distributed.pipeline import Forward, Loss, Stage, run_forward, run_forward_backward
from lockstep.distributed.step_result import StepResult
from lockstep.distributed.world.groups import Groups, before_leaving


class MissingGradient(RuntimeError):
    """A trainable parameter received no gradient."""


class Engine:
    """Trains one pipeline stage: runs the schedule over micro-batches, reduces gradients, steps the ZeRO optimizer."""

    def __init__(
        self,
        stage: Stage,
        groups: Groups,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float,
        parts: Mapping[str, Iterable[nn.Parameter]],
        tied: nn.Parameter | None = None,
        gradient_dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            parts: the parts of the model whose norms are reported, by name: all parts of the whole model, in the same
                order on every rank, each with those of its parameters that this rank holds.
            tied: the embedding that the first and the last stage both hold, where they are tied over stages.
            gradient_dtype: in which gradients of bf16 parameters are added up over micro-batches and replicas; bf16
                takes half the memory, and loses 0.8% of a sum of 64 gradients and 2% of one of 512.
        """
        self.stage, self.groups, self._gradient_dtype = stage, groups, gradient_dtype
        if tied is not None and groups.layout.pipeline > 1 and not groups.is_first_stage:
            replicate(tied)
        self._tied = tied if tied is not None and groups.layout.pipeline > 1 and tied.requires_grad else None
        self._zero = ZeroOptimizer(stage.module, optimizer, groups, clip_norm, parts, gradient_dtype)
        self._trained = {n: p for n, p in stage.module.named_parameters() if p.requires_grad and p is not self._tied}
        self._reached: set[str] = set()
        self.before_changes: Callable[[], object] = lambda: None
        """Called before weights or optimizer change. Set it to a function that waits for a background copy of them."""
        for name, parameter in self._trained.items():
            before_leaving(parameter.register_hook(partial(self._has_reached, name)).remove)

    def step(
        self, batches: Sequence[Any], forward: Forward, loss: Loss, *, tokens: int, learning_rate: float
    ) -> StepResult:
        """Forward, backward and one optimizer update over all micro-batches of this data rank.

        `loss` returns this micro-batch's part of a sum over the global batch; so micro-batch size, packing and the
        number of data ranks never change the gradient. That of `penalty` is added once; where it is not 0, the result
        has it as `retain_penalty`, and as a part of `loss`.

        Raises:
            MissingGradient: when a trainable parameter received no gradient.
        """
        reports = self._backward(batches, forward, loss, tokens=tokens)
        self.before_changes()
        norm = self._zero.step(learning_rate)
        values = self._reduced(reports) | {"memory_gb": self._most_memory() / 1e9}
        if self.penalty.stiffness:
            values |= {"retain_penalty": self.penalty.value, "loss": values["loss"] + self.penalty.value}
        return StepResult(values, norm, self._zero.gradient_norms())

    @property
    def penalty(self) -> WeightPenalty:
        """The penalty on distances from old weights; none before it is given a stiffness."""
        return self._zero.penalty

    def keep_weights(self) -> None:
        """Take the weights as they are for the old ones of the penalty."""
        self._zero.keep_weights()

    def square(self, batches: Sequence[Any], forward: Forward, loss: Loss, *, tokens: int, scale: float) -> None:
        """Add scale · g² of a global batch's gradient to the penalty's Fisher information; changes no weight."""
        self._backward(batches, forward, loss, tokens=tokens)
        self._zero.square_gradients(scale)

    def _backward(
        self, batches: Sequence[Any], forward: Forward, loss: Loss, *, tokens: int
    ) -> list[dict[str, Tensor]]:
        """Add up gradients over all micro-batches of this data rank; returns what `loss` reports of each."""
        holders = dist.get_world_size(self.groups.replicas)

        def share(result: Tensor, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
            value, report = loss(result, batch)
            return value * holders, report

        self._reached.clear()
        with self._tied_apart():
            reports = run_forward_backward(self.stage, batches, self._watched(forward), share, tokens=tokens)
        missing = sorted(self._trained.keys() - self._reached)
        if missing:
            raise MissingGradient(f"{missing[0]} received no gradient on rank {self.groups.rank}")
        return reports

    def _has_reached(self, name: str, gradient: Tensor | None) -> None:
        """Gradient hook of a parameter; autograd also calls it, with None, where no gradient arrived."""
        if gradient is not None:
            self._reached.add(name)

    def weight_norms(self) -> dict[str, float]:
        """Norm of each part's weights, the same on every rank; all ranks call this."""
        return self._zero.weight_norms()

    def forget(self) -> None:
        """Drop the optimizer's moments, for a new phase of training."""
        self.before_changes()
        self._zero.state.reset()

    def reconfigured(self, *, clip_norm: float) -> list[dict[str, Any]]:
        """Sets the clipping of gradients; returns the optimizer's parameter groups, for other hyperparameters."""
        return self._zero.parameter_groups(clip_norm)

    def snapshot(self) -> Snapshot:
        """Copy this rank's part of weights and optimizer to host memory; all ranks do so between steps."""
        return Snapshot(*self._zero.changing())

    def flat_shards(self) -> Iterator[FlatShard]:
        """This rank's part of weights and optimizer state, to be saved by `whole_chunks`."""
        return self._zero.state.flat_shards()

    @property
    def updates(self) -> int:
        """The number of optimizer steps that the optimizer's state has seen."""
        return self._zero.state.updates

    def restore(self, source: Source, pieces: Mapping[nn.Parameter, Sequence[Piece]]) -> None:
        """Load the optimizer state of a checkpoint that any layout saved; the weights were loaded before.

        Args:
            pieces: the pieces of logical tensors in each parameter.
        """
        self._zero.state.restore(source, pieces)

    def whole_weights(self) -> AbstractContextManager[None]:
        """Within this block the module's parameters are whole, whatever the ZeRO stage."""
        return self._zero.whole_weights()

    def measure(self, batches: Sequence[Any], forward: Forward, loss: Loss, *, tokens: int) -> dict[str, float]:
        """The metrics that `loss` reports over the global batch, without a gradient; see `StepResult.values`."""
        results = run_forward(self.stage, batches, forward, tokens=tokens)
        return self._reduced([loss(r, b)[1] for r, b in zip(results, batches, strict=False)])

    def evaluate(self, stage: Stage, batches: Sequence[Any], forward: Forward, *, tokens: int) -> list[Tensor]:
        """Results of a forward pass of `stage` for this data rank's micro-batches; empty except on the last stage."""
        return run_forward(stage, batches, forward, tokens=tokens)

    def _watched(self, forward: Forward) -> Forward:
        """The forward pass, with a hook that tells ZeRO when its backward pass begins."""

        def watched(module: nn.Module, batch: Any, received: Tensor | None, chunk: int) -> Tensor:
            result = forward(module, batch, received, chunk)
            result.register_hook(lambda _: self._zero.begin_backward())
            return result

        return watched

    @contextmanager
    def _tied_apart(self) -> Iterator[None]:
        """Collect the gradient of weights tied over stages apart from ZeRO, and hand it over once, summed over stages.

        ZeRO-2 reduces each gradient as it appears; this one is not whole before all micro-batches of both stages are.
        """
        tied = self._tied
        if tied is None:
            yield
            return
        owner, name = _owner(self.stage.module, tied)
        stand_in = nn.Parameter(tied.detach())
        vars(stand_in).update(vars(tied))
        total = torch.zeros_like(tied, dtype=self._gradient_dtype if tied.dtype == torch.bfloat16 else tied.dtype)

        def add(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            total.add_(parameter.grad)
            parameter.grad = None

        stand_in.register_post_accumulate_grad_hook(add)
        owner._parameters[name] = stand_in
        try:
            yield
        finally:
            owner._parameters[name] = tied
        dist.all_reduce(total, group=self.groups.embedding)
        self._zero.begin_backward()
        torch.autograd.backward([tied], [total.to(tied.dtype)])

    def _reduced(self, reports: list[dict[str, Tensor]]) -> dict[str, float]:
        """Reported values over all micro-batches and data ranks, sent from the last stage to all stages.

        A number is a sum over all, or a peak by its name; two numbers are a sum and a count, for a mean over all.
        """
        shared: list[Any] = [None]
        if self.groups.is_last_stage:
            names = sorted(reports[0])
            columns = {n: torch.stack([r[n].detach().double().reshape(-1) for r in reports]) for n in names}
            sums = torch.stack([functional.pad(c.sum(0), (0, 2 - c.shape[1]), value=1.0) for c in columns.values()])
            peaks = torch.stack([column.max() for column in columns.values()])
            counts = torch.tensor([column.shape[1] == 2 for column in columns.values()])
            dist.all_reduce(sums, group=self.groups.replicas)
            dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=self.groups.replicas)
            totals, divisors = sums.cpu().unbind(1)
            values = torch.where(counts, totals / divisors.clamp_min(1), totals)
            values = torch.where(torch.tensor([n.endswith("_max") for n in names]), peaks.cpu(), values)
            shared = [dict(zip(names, values.tolist(), strict=True))]
        dist.broadcast_object_list(shared, src=self.groups.last_stage_rank, group=self.groups.pipeline)
        return shared[0]

    def _most_memory(self) -> float:
        """Bytes that the fullest rank of the world held at its peak."""
        device = next(self.stage.module.parameters()).device
        peak = torch.tensor(peak_memory(device), dtype=torch.float64, device=device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        return peak.item()


def _owner(module: nn.Module, parameter: nn.Parameter) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the name that it has there."""
    return next((m, n) for m in module.modules() for n, p in m._parameters.items() if p is parameter)
