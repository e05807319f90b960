"""Judged groups of random rollouts whose tokens all have numbers of their own, and losses of what is made of them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lockstep.data.batch import Floats, Sample
from lockstep.data.packing import RowRules, rows_for_ranks
from lockstep.model.objectives.objective import Objective, loss_inputs
from lockstep.rl.algorithms.aggregation import GroupSamples, updates_of
from lockstep.rl.algorithms.config import RLConfig
from lockstep.rl.algorithms.rewards import RewardConfig, reward_of
from lockstep.rl.algorithms.samples import samples_of, teaches, with_advantages
from lockstep.rl.types import Estimated, Estimates, Judged, Prompt, Rollout
from lockstep.rl.verdict import Outcome, Verdict

LIMIT = 9
"""Tokens that a completion may have."""


def floats(draw: np.random.Generator, count: int, spread: float) -> Floats:
    return (spread * draw.standard_normal(count)).astype(np.float32)


def groups_of(seed: int, *, masked: bool = True) -> list[list[Estimated]]:
    """Groups of all verdicts, one all right and one all wrong, with prompts and completions of mixed lengths."""
    draw = np.random.default_rng(seed)
    groups, next_token = [], 0
    for index in range(5):
        prompt = Prompt(index, "", tuple(range(900 + index, 900 + 2 * index + 1)), "")
        group = []
        for place in range(4):
            length = int(draw.integers(1, LIMIT + 1))
            outcome = (Outcome.correct, Outcome.incorrect)[int(draw.integers(2)) if index > 1 else index]
            if index == 3 and place == 0:
                outcome = Outcome.ungradable
            logp = -np.abs(floats(draw, length, 1))
            written = draw.random(length) < 0.7
            written[0] = True
            rollout = Rollout(
                place,
                tuple(range(next_token, next_token + length)),
                tuple(logp.tolist()),
                "",
                "length" if length == LIMIT else "stop",
                (0,) * length,
                written=tuple(written.tolist()) if masked and index == 4 else (),
                prompt=prompt,
            )
            near, far = (logp + floats(draw, length, spread) for spread in (0.2, 0.4))
            known = Estimates(near, far, floats(draw, length, 1))
            verdict = Verdict(outcome)
            group.append(Estimated(rollout, verdict, reward_of(Judged(rollout, verdict), RewardConfig()), known))
            next_token += length
        groups.append(group)
    return groups


def samples_from(groups: Sequence[Sequence[Estimated]], config: RLConfig) -> list[Sample]:
    """The samples of the first update of a batch of these groups."""
    return next(updates_of(parts_of(groups, config), config, 0))


def parts_of(groups: Sequence[Sequence[Estimated]], config: RLConfig) -> list[GroupSamples]:
    """What a step learns from each of these groups."""
    rewarded = [[_punished(s, config) for s in group] for group in groups]
    teaching = [teaches(group, config) for group in rewarded]
    return samples_of([with_advantages(group, config) for group in rewarded], teaching, config)


def _punished(estimated: Estimated, config: RLConfig) -> Estimated:
    punishment = config.punishment(len(estimated.rollout.tokens))
    return replace(estimated, reward=replace(estimated.reward, punishment=punishment))


def policy_of(groups: Sequence[Sequence[Estimated]], seed: int, spread: float = 0.4) -> Tensor:
    """Log-probabilities of all tokens by their numbers, near to those of the rollouts."""
    draw = np.random.default_rng(seed)
    reported = np.concatenate([s.rollout.logp for group in groups for s in group]).astype(np.float32)
    return torch.from_numpy(reported + floats(draw, len(reported), spread)).requires_grad_()


def total(
    samples: Sequence[Sample], logp: Tensor, objective: Objective, *, budget: int = 100, ranks: int = 1
) -> tuple[Tensor, dict[str, float]]:
    """The loss and the metrics of a global batch: sums or means over all rows of all ranks, or the largest of any."""
    loss, found = torch.zeros(()), dict[str, list[Tensor]]()
    for rows in rows_for_ranks(samples, RowRules(ranks, budget, multiple=4)):
        for row in rows:
            value, report = objective(logp[torch.from_numpy(row.targets)], loss_inputs(row, torch.device("cpu")))
            loss = loss + value
            for name, number in report.items():
                found.setdefault(name, []).append(number.detach())
    return loss, {name: _joined(name, torch.stack(parts)) for name, parts in found.items()}


def _joined(name: str, parts: Tensor) -> float:
    """As the engine joins micro-batches: two numbers are a sum and a count."""
    if parts.dim() == 2:
        return (parts[:, 0].sum() / parts[:, 1].sum().clamp_min(1)).item()
    return (parts.max() if name.endswith("_max") else parts.sum()).item()
