"""What a loss is a mean over: weights of samples, and the updates that the samples of a step are divided into.

A mean has two choices. `aggregation` says what counts alike: tokens, sequences, or sums over a constant length.
`denominator` says over which completions: all that a step asks for (`batch`), so that a group weighs as much beside
groups that teach nothing as beside others and the gradient is an unbiased estimate; or those that are learned from
(`kept`), as DAPO's token mean behind its filter. The choice is in `GroupSamples.lengths`, made by `samples_of`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lockstep.data.batch import Floats, Sample, compact
from lockstep.rl.algorithms.config import RLConfig
from lockstep.rl.algorithms.methods import Aggregation


@dataclass(frozen=True)
class GroupSamples:
    """What a step learns from a group, and what the group counts for in the mean."""

    samples: tuple[Sample, ...]
    lengths: tuple[int, ...]
    """Tokens of each completion that the mean is over, whether or not there is a sample of it."""


def weighted(
    samples: Sequence[Sample],
    aggregation: Aggregation = "tokens",
    constant: int = 1,
    lengths: Sequence[int] | None = None,
) -> list[Sample]:
    """Sets the samples' weights, so that weighted sums over the global batch are the mean that the method wants.

    Args:
        aggregation: a mean over all tokens; or a mean over samples, of the mean over each one's tokens, or of their sum
            divided by a constant number of tokens.
        lengths: tokens of every completion that the mean is over; those of the samples where it is not given.
    """
    masks: list[Floats] = [compact((s.weight != 0).astype(np.float32)) for s in samples]
    counts = [float(mask.sum()) for mask in masks]
    over = counts if lengths is None else lengths
    match aggregation:
        case "tokens":
            parts = [float(sum(over))] * len(counts)
        case "sequences":
            parts = [len(over) * max(count, 1.0) for count in counts]
        case "constant":
            parts = [float(len(over) * constant)] * len(counts)
    return [replace(s, weight=compact(mask / np.float32(n))) for s, mask, n in zip(samples, masks, parts, strict=True)]


def updates_of(groups: Sequence[GroupSamples], config: RLConfig, seed: int) -> Iterator[list[Sample]]:
    """Yields the global batch of each update of a step: all samples, or `minibatches` parts in a new order each epoch.

    A group is in one part, and each part is a mean over its own completions. Parts without samples are left out.
    """
    counted = [group for group in groups if group.lengths]
    for epoch in range(config.epochs):
        order = np.arange(len(counted))
        if config.minibatches > 1:
            order = np.random.default_rng([seed, epoch]).permutation(len(counted))
        for chosen in np.array_split(order, max(1, min(config.minibatches, len(counted)))):
            part = [counted[place] for place in chosen]
            samples = [s for group in part for s in group.samples]
            lengths = [length for group in part for length in group.lengths]
            if samples:
                yield weighted(samples, config.aggregation, config.sampling.max_new_tokens, lengths)
