"""How much better a rollout was than the others of its group."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lockstep.rl.types import Scored


def centred(rewards: Sequence[float], *, scale_by_deviation: bool) -> list[float]:
    """Rewards less their mean, divided by their standard deviation if wanted.

    With the division this is GRPO (Shao et al. 2024, §4.1.2), without it Dr. GRPO (Liu et al. 2025).
    """
    values = np.asarray(rewards, np.float64)
    values = values - values.mean() if len(values) else values
    deviation = values.std() if len(values) else 0.0
    return (values / (deviation + 1e-6) if scale_by_deviation and deviation > 0 else values).tolist()


def with_advantages(group: Sequence[Scored], *, scale_by_deviation: bool) -> list[Scored]:
    """The group with advantages; ungradable rollouts get none and do not count in the mean."""
    rewards = [s.verdict.reward for s in group]
    graded = iter(centred([r for r in rewards if r is not None], scale_by_deviation=scale_by_deviation))
    return [s if r is None else replace(s, advantage=next(graded)) for s, r in zip(group, rewards, strict=True)]


def teaches(group: Sequence[Scored]) -> bool:
    """Whether the rollouts of a group differ in reward; where they do not, every advantage is 0."""
    return any(s.advantage for s in group)
