"""Advantages and training samples from groups of rollouts: pure functions of the groups and the recipe."""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from lockstep.data.batch import Floats, Sample, Tokens, compact, sample
from lockstep.rl.algorithms.advantage import (
    Doubles,
    best,
    centred,
    distance,
    gae,
    leave_one_out,
    returns,
    whitened,
)
from lockstep.rl.algorithms.aggregation import GroupSamples
from lockstep.rl.algorithms.config import RLConfig
from lockstep.rl.algorithms.methods import Method
from lockstep.rl.types import Advantaged, Estimated, Rewarded

Group = TypeVar("Group")
ROUNDING = 1e-12
"""Relative difference up to which rewards are equal: sums of the same terms in another order differ by 1e-16."""
Pieces = list[tuple[Doubles, Doubles]]
"""Of each rollout: advantages and returns of the tokens that the model wrote."""


def teaches(group: Sequence[Rewarded], config: RLConfig) -> bool:
    """Whether a group has anything to learn from.

    Where a method compares the rollouts of a group, two rewards have to differ by more than rounding. A KL in the
    reward does not count: it is known only after the models were asked. Best-of-N needs a reward above its bound; a
    critic or a comparison over the batch needs one rollout with a reward, and a teacher needs none.
    """
    rewards = [net for rewarded in group if (net := rewarded.reward.net) is not None]
    match config.advantage:
        case "teacher":
            return bool(group)
        case "gae" | "reinforce_pp":
            return bool(rewards)
        case "best":
            return max(rewards, default=-math.inf) > config.accept_above
        case _:
            return bool(rewards) and not math.isclose(max(rewards), min(rewards), rel_tol=ROUNDING, abs_tol=ROUNDING)


def with_advantages(group: Sequence[Estimated], config: RLConfig) -> tuple[Advantaged, ...]:
    """The rollouts of a group with their advantages; the ungradable get None and do not count for the others.

    A method that takes no baseline from the group, but from a critic, a teacher or the whole batch, has the reward
    here, and the advantages of its tokens in `samples_of`. In a group that does not teach, rewards count as equal, and
    KL in the reward, which has no deviation of rewards beside it to be divided by, stays as it is.
    """
    live = teaches(group, config)
    rewards = [_net_reward(s, config, live=live) for s in group]
    graded = iter(_compared([r for r in rewards if r is not None], config, live=live))
    advantages = [None if reward is None else next(graded) for reward in rewards]
    return tuple(
        Advantaged(s.rollout, s.verdict, s.reward, s.estimates, advantage, score=s.score)
        for s, advantage in zip(group, advantages, strict=True)
    )


def asked_for(groups: Sequence[Group], teaching: Sequence[bool], count: int) -> tuple[list[Group], list[bool]]:
    """The batch of a step: `count` groups, those that teach and as many of the others as there is room for.

    Where dynamic sampling asked for more, groups that teach nothing were replaced and are not in the batch; those whose
    place nobody took still are.
    """
    silent = [place for place, live in enumerate(teaching) if not live][: max(0, count - sum(teaching))]
    chosen = sorted([*silent, *(place for place, live in enumerate(teaching) if live)])
    return [groups[place] for place in chosen], [teaching[place] for place in chosen]


def samples_of(
    groups: Sequence[Sequence[Advantaged]], teaching: Sequence[bool], config: RLConfig
) -> list[GroupSamples]:
    """What a step learns from each group of its batch, with the columns of the method, to be weighted by `updates_of`.

    A completion without a signal, because its group does not teach or it has no advantage itself, is learned from
    where KL or entropy are in the loss, with an advantage of 0: the policy is kept near to the reference there, too.
    Not so under `denominator="kept"`, or where a critic would learn from it.

    Args:
        groups: of the batch; what `config.scores` names is in the estimates of every rollout.
        teaching: whether each of them has anything to learn from.
    """
    by_kl = config.compares_kl and config.denominator == "batch"
    heard = [
        [s for s in group if s.advantage is not None and (live or by_kl)]
        for group, live in zip(groups, teaching, strict=True)
    ]
    every = [s for group in heard for s in group]
    pieces = {id(s): piece for s, piece in zip(every, _pieces(every, config), strict=True)}
    return [_group_samples(group, [pieces.get(id(s)) for s in group], config) for group in groups]


def _group_samples(
    group: Sequence[Advantaged], pieces: Sequence[tuple[Doubles, Doubles] | None], config: RLConfig
) -> GroupSamples:
    found = [(s, piece) for s, piece in zip(group, pieces, strict=True) if _counts(s, piece is not None, config)]
    prompt = np.array(group[0].rollout.prompt.tokens, np.int32)  # which all share
    return GroupSamples(
        tuple(_sample(s, prompt, *(piece or _nothing(s))) for s, piece in found if _is_learned(s, piece, config)),
        tuple(int(_written(s).sum()) for s, _ in found),
    )


def _counts(estimated: Estimated, signal: bool, config: RLConfig) -> bool:
    """Whether the mean is over this completion, among others."""
    return config.denominator == "batch" or (signal and not _dropped(estimated, config))


def _is_learned(advantaged: Advantaged, piece: tuple[Doubles, Doubles] | None, config: RLConfig) -> bool:
    """Whether anything in the loss has a gradient at a completion that counts."""
    if _dropped(advantaged, config):
        return False
    if config.advantage == "gae" or config.denominator == "kept":
        return piece is not None
    return config.regularised or (piece is not None and bool(piece[0].any()))


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


def _net_reward(estimated: Estimated, config: RLConfig, *, live: bool) -> float | None:
    """The reward, less the KL of the whole rollout where the method has it in the reward and compares whole rollouts.

    0 where a teacher judges, and where rewards of the group are equal.
    """
    if config.advantage == "teacher":
        return 0.0
    net = estimated.reward.net
    if net is None:
        return None
    net = net if live or config.advantage == "best" else 0.0
    return net - float(config.kl.in_reward * _distance(estimated, config).sum()) if config.compares_kl else net


def _compared(rewards: list[float], config: RLConfig, *, live: bool) -> Sequence[float | None]:
    match config.advantage:
        case "grpo":
            return centred(rewards, scale_by_deviation=live)
        case "dr_grpo" | "reinforce_pp_baseline":
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


def _nothing(advantaged: Advantaged) -> tuple[Doubles, Doubles]:
    return _alike(np.broadcast_to(0.0, int(_written(advantaged).sum())))


def _alike(advantages: Doubles) -> tuple[Doubles, Doubles]:
    """The advantages, which are one number in memory where all are the same, and returns of 0."""
    return compact(advantages), np.broadcast_to(0.0, len(advantages))


def _whole(advantaged: Advantaged) -> Doubles:
    """The rollout's advantage at every token that the model wrote, as one number in memory."""
    assert advantaged.advantage is not None
    return np.broadcast_to(advantaged.advantage, int(_written(advantaged).sum()))


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


def _sample(advantaged: Advantaged, prompt: Tokens, advantages: Doubles, goals: Doubles) -> Sample:
    rollout, known = advantaged.rollout, advantaged.estimates
    written = _written(advantaged)

    def spread(values: Doubles) -> Floats:
        column = np.zeros(len(written), np.float32)
        column[written] = values
        return column

    return sample(
        prompt,
        rollout.tokens,
        weight=written.astype(np.float32),
        advantage=spread(advantages),
        old_logp=np.asarray(rollout.logp, np.float32),
        proximal_logp=known.proximal_logp,
        reference_logp=0.0 if known.reference_logp is None else known.reference_logp,
        value=0.0 if known.value is None else known.value,
        returns=spread(goals),
        experts=rollout.experts,
    )
