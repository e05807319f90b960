"""Advantages and training samples from groups of rollouts: pure functions of the groups and the recipe."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lockstep.data.batch import Floats, Sample, sample
from lockstep.data.packing import documents
from lockstep.rl.algorithms.advantage import (
    Doubles,
    best,
    centred,
    distance,
    gae,
    leave_one_out,
    overlong,
    returns,
    whitened,
)
from lockstep.rl.algorithms.config import RLConfig
from lockstep.rl.algorithms.methods import Aggregation, Method
from lockstep.rl.types import Advantaged, Estimated, Rewarded

Pieces = list[tuple[Doubles, Doubles]]
"""Of each rollout: advantages and returns of the tokens that the model wrote."""


def teaches(group: Sequence[Rewarded], config: RLConfig) -> bool:
    """Whether a group has anything to learn from.

    Where a method compares the rollouts of a group, two rewards have to differ: equal ones have advantages of 0, up to
    rounding. A KL in the reward does not count: it is known only after the models were asked. Best-of-N needs a reward
    above its bound; a critic, a teacher or a comparison over the batch needs one rollout with a reward.
    """
    rewards = [r for rewarded in group if (r := _reward(rewarded, config)) is not None]
    match config.advantage:
        case "gae" | "teacher" | "reinforce_pp":
            return bool(rewards)
        case "best":
            return max(rewards, default=-math.inf) > config.accept_above
        case _:
            return bool(rewards) and max(rewards) != min(rewards)


def with_advantages(group: Sequence[Estimated], config: RLConfig) -> tuple[Advantaged, ...]:
    """The rollouts of a group with their advantages; the ungradable get None and do not count for the others.

    A method that takes no baseline from the group, but from a critic, a teacher or the whole batch, has the reward
    here, and the advantages of its tokens in `samples_of`.
    """
    rewards = [_net_reward(s, config) for s in group]
    graded = iter(_compared([r for r in rewards if r is not None], config))
    advantages = [None if reward is None else next(graded) for reward in rewards]
    return tuple(
        Advantaged(s.rollout, s.verdict, s.reward, s.estimates, advantage, score=s.score)
        for s, advantage in zip(group, advantages, strict=True)
    )


def samples_of(groups: Sequence[Sequence[Advantaged]], config: RLConfig) -> list[Sample]:
    """The samples that a step learns from, weighted, with the columns of the method.

    Args:
        groups: those that teach something, see `teaches`; what `config.scores` names is in the estimates of every
            rollout. Rollouts without an advantage are left out.
    """
    kept = [s for group in groups for s in group if s.advantage is not None]
    pieces = _pieces(kept, config)
    samples = [_sample(s, *piece) for s, piece in zip(kept, pieces, strict=True) if not _dropped(s, config)]
    return weighted(samples, config.aggregation, config.sampling.max_new_tokens)


def weighted(samples: Sequence[Sample], aggregation: Aggregation = "tokens", constant: int = 1) -> list[Sample]:
    """Sets the samples' weights, so that weighted sums over the global batch are the mean that the method wants.

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
    """Yields the global batch of each update of a step: all samples, or `minibatches` parts in a new order each epoch.

    Samples that share a prompt stay together, and the weights of each part are normalised over that part.
    """
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
    """Samples for `pair_loss` from the completions of one prompt and their preferences; more is better.

    Args:
        group: number of this comparison, unique among those of the prompt.
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


def _reward(rewarded: Rewarded, config: RLConfig) -> float | None:
    """The reward of a rollout with the method's overlong punishment; None if ungradable, 0 where a teacher judges."""
    if config.advantage == "teacher":
        return 0.0
    reward = rewarded.reward.total
    if reward is None or not config.overlong_share:
        return reward
    limit = config.sampling.max_new_tokens
    return reward + overlong(len(rewarded.rollout.tokens), limit, config.overlong_share * limit)


def _net_reward(estimated: Estimated, config: RLConfig) -> float | None:
    """`_reward` less the KL of the whole rollout, where the method has it in the reward and compares whole rollouts."""
    reward = _reward(estimated, config)
    if reward is None or not config.kl.in_reward or config.advantage in ("gae", "reinforce_pp", "teacher"):
        return reward
    return reward - float(config.kl.in_reward * _distance(estimated, config).sum())


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


def _pieces(kept: Sequence[Advantaged], config: RLConfig) -> Pieces:
    """Advantages and returns of each token, by the method, from the rollouts' advantages."""
    match config.advantage:
        case "gae":
            rewards = [_rewards(s, config) for s in kept]
            if config.whiten_rewards:
                rewards = whitened(rewards, shift=False)
            found = [
                gae(r, _of_written(s, s.estimates.value), discount=config.discount, trace=config.gae_trace)
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


def _whole(advantaged: Advantaged) -> Doubles:
    """The rollout's advantage at every token that the model wrote."""
    assert advantaged.advantage is not None
    return np.full(int(_written(advantaged).sum()), advantaged.advantage)


def _rewards(advantaged: Advantaged, config: RLConfig) -> Doubles:
    """The reward of each token written: minus its KL, and at the last one the rollout's reward, too."""
    assert advantaged.advantage is not None
    cost = config.kl.in_reward * _distance(advantaged, config) if config.kl.in_reward else _whole(advantaged) * 0
    rewards = -cost
    rewards[-1:] += advantaged.advantage
    return rewards


def _distance(estimated: Estimated, config: RLConfig) -> Doubles:
    """KL to the reference, or to the teacher, of each token written."""
    before = _of_written(estimated, _before(estimated))
    estimator = "k1" if config.advantage == "teacher" else config.kl.estimator
    return distance(before, _of_written(estimated, estimated.estimates.reference_logp), estimator)


def _before(estimated: Estimated) -> Floats:
    """Log-probabilities under the policy that the update starts from."""
    known = estimated.estimates.proximal_logp
    return np.asarray(estimated.rollout.logp, np.float32) if known is None else known


def _written(estimated: Estimated) -> np.ndarray:
    rollout = estimated.rollout
    return np.asarray(rollout.written, bool) if rollout.written else np.ones(len(rollout.tokens), bool)


def _of_written(estimated: Estimated, column: Floats | None) -> Doubles:
    """A column at the tokens that the model wrote: what stands between is its environment's."""
    assert column is not None, "a method needs estimates of every rollout before it makes samples of them"
    return np.asarray(column, np.float64)[_written(estimated)]


def _dropped(estimated: Estimated, config: Method) -> bool:
    """Whether nothing is learned of a rollout that was compared with the others: one cut off, or with no token."""
    cut = config.overlong == "drop" and estimated.rollout.finish_reason == "length"
    return cut or not _written(estimated).any()


def _sample(advantaged: Advantaged, advantages: Doubles, goals: Doubles) -> Sample:
    rollout, known = advantaged.rollout, advantaged.estimates
    written = _written(advantaged)

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
        proximal_logp=_before(advantaged),
        reference_logp=0.0 if known.reference_logp is None else known.reference_logp,
        value=0.0 if known.value is None else known.value,
        returns=spread(goals),
    )
