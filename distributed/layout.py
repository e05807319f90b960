"""How many ways each kind of parallelism splits the work: plain numbers, checked before anything starts."""

import itertools

from pydantic import BaseModel, ConfigDict, Field, model_validator


class LayoutError(ValueError):
    """A layout that cannot run, in one sentence that says what would."""


class Layout(BaseModel):
    """Degrees of parallelism; their product is the number of processes of the trainer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: int = Field(1, ge=1, description="ways that each matrix is split (Megatron tensor parallelism)")
    pipeline: int = Field(1, ge=1, description="stages that the layers are split into (1F1B)")
    data: int = Field(1, ge=1, description="replicas that share a batch")
    zero: int = Field(
        1, ge=0, le=1, description="DeepSpeed ZeRO stage: 0 replicates optimizer state, 1 splits it over data"
    )

    @property
    def processes(self) -> int:
        """Processes that this layout needs."""
        return self.tensor * self.pipeline * self.data

    @model_validator(mode="after")
    def _is_small_enough(self) -> "Layout":
        if self.processes > 1 << 16:
            raise LayoutError(
                f"tensor={self.tensor} × pipeline={self.pipeline} × data={self.data} is {self.processes} processes"
            )
        return self


def check_divides(layout: Layout, *, heads: int, kv_heads: int, intermediate: int, layers: int) -> None:
    """Refuse a layout that does not fit a transformer of these sizes.

    Raises:
        LayoutError: names the degree that was given and the degrees that would work.
    """
    for what, size in (("query heads", heads), ("key-value heads", kv_heads), ("intermediate width", intermediate)):
        if size % layout.tensor:
            allowed = [d for d in range(1, kv_heads + 1) if not (heads % d or kv_heads % d or intermediate % d)]
            raise LayoutError(
                f"layout.tensor={layout.tensor} does not divide the model's {size} {what}: "
                f"use one of {', '.join(map(str, allowed))}"
            )
    if layout.pipeline > layers:
        raise LayoutError(
            f"layout.pipeline={layout.pipeline} needs at least as many layers, and the model has {layers}"
        )


def stage_layers(layers: int, stages: int) -> list[range]:
    """Layers of each pipeline stage: contiguous, sizes differ by one at most, the larger ones first."""
    base, extra = divmod(layers, stages)
    ends = [0]
    for stage in range(stages):
        ends.append(ends[-1] + base + (stage < extra))
    return [range(a, b) for a, b in itertools.pairwise(ends)]
