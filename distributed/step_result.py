"""The metrics of one optimizer step. It imports nothing, so that readers of metrics load no training library."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepResult:
    """Metrics of one update, the same on every rank, and the gradient norm before clipping: global and by part.

    A value is the sum or the mean over the global batch, or the largest of its micro-batches if its name ends in
    `_max`. One comes
    from the engine: `memory_gb`, the most that any rank held so far (`peak_memory`), in 10⁹ bytes.
    """

    values: dict[str, float]
    grad_norm: float
    grad_norms: dict[str, float]
