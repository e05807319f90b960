"""Detects loss spikes: a loss far above the recent ones, by a robust z-score (median absolute deviation)."""

import math
import statistics
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

GAUSSIAN = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation (Rousseeuw & Croux 1993)."""

LEAST_DEVIATION = 0.005
"""Of the median. Losses that come again with the same documents deviate by nearly nothing, and rounding is no spike."""


class SpikeConfig(BaseModel):
    """When a step counts as a loss spike, and how a run rewinds behind it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window: int = Field(64, ge=4, description="steps whose losses a new one is compared with")
    threshold: float = Field(8.0, gt=0, description="robust standard deviations above their median that make a spike")
    snapshot_every: int = Field(100, ge=1, description="steps between snapshots in host memory")
    rewinds: int = Field(5, ge=0, description="of a run; the spike after them ends it")


def spike_limit(losses: Sequence[float], config: SpikeConfig) -> float:
    """The largest loss of the next step that is not a spike: median + threshold · σ of the last `window` losses.

    σ is estimated by 1.4826 times the median absolute deviation: Hampel's identifier, the "modified z-score" of
    Iglewicz & Hoaglin (1993). They call 3.5 σ an outlier; a run has a hundred thousand steps whose noise has
    longer tails, and the loss of a real spike rises by tens of σ, so the default is 8. While the loss falls, the median
    lies above the curve and σ contains the slope: fewer steps count as spikes, never more. Infinite before the first
    `window` steps, and until as many are known where a run resumed without the record of its losses.
    """
    recent = [loss for loss in losses[-config.window :] if not math.isnan(loss)]
    if len(recent) < config.window:
        return math.inf
    middle = statistics.median(recent)
    deviation = GAUSSIAN * statistics.median(abs(loss - middle) for loss in recent)
    return middle + config.threshold * max(deviation, LEAST_DEVIATION * abs(middle))


def is_spike(loss: float, losses: Sequence[float], config: SpikeConfig) -> bool:
    """Whether the loss that follows these (oldest first) is a spike. NaN and infinity always are."""
    return not math.isfinite(loss) or loss > spike_limit(losses, config)
