"""Samples to learn from, out of judged groups: pure functions of the groups and the recipe."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lockstep.data.batch import Floats, Sample, documents, sample
from lockstep.rl.algorithms.advantage import (
    Doubles,
    best,
    centred,
    distance,
    generalised,
    leave_one_out,
    overlong,
    returns,
    whitened,
)
from lockstep.rl.algorithms.config import RLConfig
from lockstep.rl.algorithms.methods import Aggregation, Method
from lockstep.rl.types import Scored

Pieces = list[tuple[Doubles, Doubles]]
"""For each rollout the advantages and the returns of the tokens that it wrote."""


def with_advantages(group: Sequence[Scored], config: RLConfig) -> list[Scored]:
    """The group with what its rewards are worth beside each other; the ungradable get None and do not count.

    A method that compares by itself, with a critic, a teacher or the whole batch, has the reward here, and its
    advantages in `samples_of`.
    """
    earned = [_earned(s, config) for s in group]
    graded = iter(_compared([e for e in earned if e is not None], config))
    return [s if e is None else replace(s, advantage=next(graded)) for s, e in zip(group, earned, strict=True)]


def teaches(group: Sequence[Scored], config: RLConfig) -> bool:
    """Whether a group has anything to learn from; where rewards are compared and alike, every advantage is 0."""
    if config.advantage in ("gae", "teacher", "reinforce_pp"):
        return any(s.advantage is not None for s in group)
    return any(s.advantage for s in group)


def samples_of(groups: Sequence[Sequence[Scored]], config: RLConfig) -> list[Sample]:
    """What a step learns from judged groups: the rollouts that teach, with the columns of the method, weighted.

    Groups whose rewards are all alike, and ungradable rollouts, are left out; what `config.scores` names is in the
    estimates of every rollout.
    """
    compared = [with_advantages(group, config) for group in groups]
    kept = [s for group in compared if teaches(group, config) for s in group if s.advantage is not None]
    pieces = _pieces(kept, config)
    samples = [_sample(s, *piece) for s, piece in zip(kept, pieces, strict=True) if not _dropped(s, config)]
    return weighted(samples, config.aggregation, config.sampling.max_new_tokens)


def weighted(samples: Sequence[Sample], aggregation: Aggregation = "tokens", constant: int = 1) -> list[Sample]:
    """The samples with weights that make sums over the global batch the mean that a method wants.

    Args:
        aggregation: a mean over all tokens; or a mean over samples, of the mean over each one's tokens, or of their sum
            divided by a constant number of tokens.
    """
    masks = [(s.weight != 0).astype(np.float32) for s in samples]
    counts = [float(mask.sum()) for mask in masks]
    match aggregation:
        case "tokens":
            parts = [sum(counts)] * len(counts)
        case "sequences":
            parts = [len(counts) * max(count, 1.0) for count in counts]
        case "constant":
            parts = [float(len(counts) * constant)] * len(counts)
    return [replace(s, weight=mask / np.float32(n)) for s, mask, n in zip(samples, masks, parts, strict=True)]


def updates_of(samples: Sequence[Sample], config: RLConfig, seed: int) -> Iterator[list[Sample]]:
    """The global batch of each update that a step makes of its samples: all of them, or `minibatches` parts in a new
    order each epoch. Samples that share a prompt stay together, and each part's weights are of that part."""
    if config.minibatches == 1:
        yield from [list(samples)] * config.epochs
        return
    shared = documents(samples)
    for epoch in range(config.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(shared))
        for chosen in np.array_split(order, min(config.minibatches, len(shared))):
            part = [s for place in chosen for s in shared[place].samples]
            yield weighted(part, config.aggregation, config.sampling.max_new_tokens)


def preference_samples(
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    preferences: Sequence[float],
    *,
    group: int,
    groups: int,
    judged: bool = False,
    reference_logp: Sequence[Floats] | None = None,
) -> list[Sample]:
    """The samples of `pair_loss` from completions of one prompt and how good they are; more is better.

    Args:
        group: a number of this comparison alone, among those of the prompt.
        groups: how many comparisons the global batch has.
        judged: for a reward model, whose score is the value at the last token: the sample has one token more, which
            nothing is learned of but this value.
    """
    found = []
    for place, (completion, preference) in enumerate(zip(completions, preferences, strict=True)):
        tokens = [*completion, 0] if judged else completion
        weight = np.full(len(tokens), 1 / groups, np.float32)
        weight[: len(completion) if judged else 0] = 0
        reference: float | Floats = reference_logp[place] if reference_logp is not None else 0.0
        found.append(
            sample(prompt, tokens, weight=weight, reference_logp=reference, group=group, preference=float(preference))
        )
    return found


def _earned(scored: Scored, config: RLConfig) -> float | None:
    """The reward of a rollout, less what its length and, for methods that compare whole rollouts, its KL cost."""
    if config.advantage == "teacher":
        return 0.0
    reward = scored.reward
    if reward is None:
        return None
    if config.overlong_share:
        limit = config.sampling.max_new_tokens
        reward += overlong(len(scored.rollout.tokens), limit, config.overlong_share * limit)
    if config.kl.in_reward and config.advantage not in ("gae", "reinforce_pp"):
        reward -= float(config.kl.in_reward * _distance(scored, config).sum())
    return reward


def _compared(rewards: list[float], config: RLConfig) -> Sequence[float | None]:
    match config.advantage:
        case "grpo" | "dr_grpo":
            return centred(rewards, scale_by_deviation=config.advantage == "grpo")
        case "reinforce_pp_baseline":
            return centred(rewards, scale_by_deviation=False)
        case "rloo":
            return leave_one_out(rewards)
        case "best":
            return best(rewards, config.accept_above)
        case "gae" | "reinforce_pp" | "teacher":
            return rewards


def _pieces(kept: Sequence[Scored], config: RLConfig) -> Pieces:
    """What the method makes of what `with_advantages` found, token by token."""
    match config.advantage:
        case "gae":
            rewards = [_rewards(s, config) for s in kept]
            if config.whiten_rewards:
                rewards = whitened(rewards, shift=False)
            found = [
                generalised(r, _of_written(s, s.estimates.value), discount=config.discount, trace=config.gae_trace)
                for s, r in zip(kept, rewards, strict=True)
            ]
            white = whitened([advantages for advantages, _ in found])
            return [(advantages, goal) for advantages, (_, goal) in zip(white, found, strict=True)]
        case "teacher":
            return [_alike(-_distance(s, config)) for s in kept]
        case "reinforce_pp":
            return [_alike(a) for a in whitened([returns(_rewards(s, config), config.discount) for s in kept])]
        case "reinforce_pp_baseline":
            return [_alike(a) for a in whitened([_whole(s) for s in kept])]
        case _:
            return [_alike(_whole(s)) for s in kept]


def _alike(advantages: Doubles) -> tuple[Doubles, Doubles]:
    return advantages, np.zeros_like(advantages)


def _whole(scored: Scored) -> Doubles:
    """The rollout's advantage at every token that it wrote."""
    assert scored.advantage is not None
    return np.full(int(_written(scored).sum()), scored.advantage)


def _rewards(scored: Scored, config: RLConfig) -> Doubles:
    """Of each token written: its KL off the reward, and at the last what the rollout earned."""
    assert scored.advantage is not None
    cost = config.kl.in_reward * _distance(scored, config) if config.kl.in_reward else _whole(scored) * 0
    rewards = -cost
    rewards[-1:] += scored.advantage
    return rewards


def _distance(scored: Scored, config: RLConfig) -> Doubles:
    """KL to the reference, or to the teacher, of each token written."""
    before = _of_written(scored, _before(scored))
    estimator = "k1" if config.advantage == "teacher" else config.kl.estimator
    return distance(before, _of_written(scored, scored.estimates.reference_logp), estimator)


def _before(scored: Scored) -> Floats:
    """Log-probabilities under the policy that the update starts from."""
    known = scored.estimates.proximal_logp
    return np.asarray(scored.rollout.logp, np.float32) if known is None else known


def _written(scored: Scored) -> np.ndarray:
    rollout = scored.rollout
    return np.asarray(rollout.written, bool) if rollout.written else np.ones(len(rollout.tokens), bool)


def _of_written(scored: Scored, column: Floats | None) -> Doubles:
    """A column at the tokens that the model wrote: what stands between is its environment's."""
    assert column is not None, "a method needs estimates of every rollout before it makes samples of them"
    return np.asarray(column, np.float64)[_written(scored)]


def _dropped(scored: Scored, config: Method) -> bool:
    """Whether nothing is learned of a rollout that was compared with the others: one cut off, or with no token."""
    cut = config.overlong == "drop" and scored.rollout.finish_reason == "length"
    return cut or not _written(scored).any()


def _sample(scored: Scored, advantages: Doubles, goals: Doubles) -> Sample:
    rollout, known = scored.rollout, scored.estimates
    written = _written(scored)

    def spread(values: Doubles) -> Floats:
        column = np.zeros(len(written), np.float32)
        column[written] = values
        return column

    return sample(
        rollout.prompt.tokens,
        rollout.tokens,
        weight=written.astype(np.float32),
        advantage=spread(advantages),
        old_logp=np.asarray(rollout.logp, np.float32),
        proximal_logp=_before(scored),
        reference_logp=0.0 if known.reference_logp is None else known.reference_logp,
        value=0.0 if known.value is None else known.value,
        returns=spread(goals),
    )
