"""The degrees of parallelism of a run (tensor, pipeline, context, expert, data, ZeRO), checked before it starts."""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class LayoutError(ValueError):
    """A layout that cannot run; the message says which would."""


class Layout(BaseModel):
    """Degrees of parallelism; the product of tensor, pipeline, context, expert and data is the number of processes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: int = Field(1, ge=1, description="ways that each matrix is split (Megatron tensor parallelism)")
    sequence: bool = Field(False, description="split activations between matrices over the tensor axis, too")
    pipeline: int = Field(1, ge=1, description="stages that the layers are split into (1F1B)")
    virtual: int = Field(1, ge=1, description="virtual stages of each pipeline stage (interleaved 1F1B)")
    stages: tuple[int, ...] = Field((), description="layers of each (virtual) stage; balanced when empty")
    context: int = Field(1, ge=1, description="ways that each row of tokens is split")
    context_by: Literal["auto", "heads", "ring"] = Field(
        "auto", description="all-to-all over heads (DeepSpeed-Ulysses), a ring, or heads where they divide"
    )
    expert: int = Field(1, ge=1, description="ways that experts are split; tokens travel to them")
    data: int = Field(1, ge=1, description="replicas that share a batch")
    zero: int = Field(
        1,
        ge=0,
        le=3,
        description="DeepSpeed ZeRO stage: over replicas 1 splits optimizer state, 2 gradients, 3 weights",
    )
    offload: bool = Field(False, description="keep optimizer state in host memory")

    @property
    def processes(self) -> int:
        """The number of processes (world size) of this layout."""
        return self.tensor * self.pipeline * self.context * self.replicas

    @property
    def replicas(self) -> int:
        """The number of shares of a global batch: expert ranks have rows of their own, as data ranks do."""
        return self.expert * self.data

    @property
    def chunks(self) -> int:
        """The number of virtual stages of the whole pipeline."""
        return self.pipeline * self.virtual

    def data_rank(self, rank: int) -> int:
        """The index of the share of a global batch that a global rank computes."""
        return rank // (self.tensor * self.context) % self.replicas

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that runs: none where a process has no other to split the state of stages 1 and 2 with."""
        holders = self.context * self.replicas
        return 0 if holders == 1 and self.zero < 3 and not self.offload else self.zero

    @property
    def row_multiple(self) -> int:
        """The number that a row's length must be a multiple of: every context rank has two equal parts of it."""
        parts = 2 * self.context if self.context > 1 else 1
        return math.lcm(32, parts * (self.tensor if self.sequence else 1))

    @property
    def in_step(self) -> bool:
        """Whether all replicas must run the same number of micro-batches, because they communicate in each."""
        return self.expert > 1 or self.zero >= 2

    @model_validator(mode="after")
    def _can_run(self) -> "Layout":
        degrees = {n: getattr(self, n) for n in ("tensor", "pipeline", "context", "expert", "data")}
        if self.processes > 1 << 16:
            raise LayoutError(
                f"{' × '.join(f'{n}={v}' for n, v in degrees.items() if v > 1)} is {self.processes} processes"
            )
        if self.sequence and self.tensor == 1:
            raise LayoutError(
                "layout.sequence=true splits over the tensor axis: use it with layout.tensor of 2 or more"
            )
        if self.virtual > 1 and self.pipeline == 1:
            raise LayoutError(
                f"layout.virtual={self.virtual} interleaves pipeline stages: use it with layout.pipeline of 2 or more"
            )
        if self.stages and (len(self.stages) != self.chunks or min(self.stages) < 1):
            raise LayoutError(
                f"layout.stages={list(self.stages)} must name at least one layer for each of "
                f"pipeline × virtual = {self.chunks} stages"
            )
        if self.zero == 3 and self.pipeline > 1:
            raise LayoutError(
                "layout.zero=3 gathers weights in every micro-batch, which a pipeline's stages do at different times: "
                "use zero=1 or zero=2 with a pipeline, or zero=3 with pipeline=1"
            )
        if self.zero == 3 and self.expert > 1:
            raise LayoutError(
                "layout.zero=3 splits weights over all replicas, which hold different experts: use zero=2 with experts"
            )
        if self.offload and self.zero == 0:
            raise LayoutError(
                "layout.offload=true moves the state that ZeRO splits: use it with layout.zero of 1 or more"
            )
        return self

    def __str__(self) -> str:
        """The keys that differ from one process, as `--layouts` reads them."""
        given = {n: v for n, v in self if v != type(self).model_fields[n].default}
        words = {n: str(v).lower() if isinstance(v, bool) else v for n, v in given.items()}
        return ",".join(f"{n}={v}" for n, v in words.items()) or "one process"


def check_divides(
    layout: Layout,
    *,
    heads: int,
    kv_heads: int,
    intermediate: int,
    layers: int,
    experts: int = 0,
    shared_intermediate: int = 0,
) -> None:
    """Raise unless a layout divides the sizes of a transformer.

    Raises:
        LayoutError: names the degree that was given and the degrees that would work.
    """
    tensor_sizes = {
        "query heads": heads,
        "key-value heads": kv_heads,
        "intermediate width": intermediate,
        "shared experts' width": shared_intermediate,
    }
    for what, size in tensor_sizes.items():
        if size % layout.tensor:
            allowed = [d for d in range(1, kv_heads + 1) if not any(s % d for s in tensor_sizes.values())]
            raise LayoutError(
                f"layout.tensor={layout.tensor} does not divide the model's {size} {what}: use {_one_of(allowed)}"
            )
    if layout.chunks > layers:
        keys = f"layout.pipeline={layout.pipeline}" + (f" × virtual={layout.virtual}" if layout.virtual > 1 else "")
        raise LayoutError(f"{keys} needs at least as many layers, and the model has {layers}")
    if layout.stages and sum(layout.stages) != layers:
        raise LayoutError(
            f"layout.stages={list(layout.stages)} has {sum(layout.stages)} layers, and the model has {layers}"
        )
    if layout.expert > 1 and (experts == 0 or experts % layout.expert):
        allowed = [d for d in range(1, experts + 1) if experts % d == 0] or [1]
        raise LayoutError(
            f"layout.expert={layout.expert} does not divide the model's {experts} experts: use {_one_of(allowed)}"
        )
    local = kv_heads // layout.tensor
    if layout.context_by == "heads" and local % layout.context:
        allowed = [d for d in range(1, local + 1) if local % d == 0]
        raise LayoutError(
            f"layout.context={layout.context} does not divide the {local} key-value heads of a tensor rank: "
            f"use {_one_of(allowed)}, or context_by='ring'"
        )


def _one_of(allowed: Sequence[int]) -> str:
    return f"one of {', '.join(map(str, allowed))}"


def splits_heads(layout: Layout, kv_heads: int) -> bool:
    """Whether context parallelism exchanges heads (DeepSpeed-Ulysses) instead of keys and values in a ring."""
    divides = kv_heads // layout.tensor % layout.context == 0
    return layout.context_by == "heads" or (layout.context_by == "auto" and divides)


def stage_layers(layers: int, stages: int, *, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Balanced split of layers over pipeline stages: contiguous, at least one each, with the least maximum load.

    Args:
        first, last: the cost of the embedding and of the head, in layers.
    """
    extra = [0.0] * stages
    extra[0] += first
    extra[-1] += last
    counts = [1] * stages
    for _ in range(layers - stages):
        lightest = min(range(stages), key=lambda s: (counts[s] + extra[s], s))
        counts[lightest] += 1
    return ranges(counts)


def ranges(counts: Sequence[int]) -> list[range]:
    """Consecutive ranges of these lengths."""
    ends = [0, *itertools.accumulate(counts)]
    return [range(a, b) for a, b in itertools.pairwise(ends)]
