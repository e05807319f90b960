"""A completion of several turns as a rollout that grows: what was said is appended to, and never encoded again.

Tokens that the environment wrote have a log-probability of 0 and the weight version of the token before them; `written`
keeps them out of everything that is learned or averaged.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from lockstep.rl.types import Rollout


def last_turn(rollout: Rollout) -> tuple[int, ...]:
    """Tokens that the model wrote since it was last answered."""
    if not rollout.written:
        return rollout.tokens
    answered = max((place + 1 for place, own in enumerate(rollout.written) if not own), default=0)
    return rollout.tokens[answered:]


def turns(rollout: Rollout) -> int:
    """How often the model was given the word and used it."""
    begins = [own and not before for before, own in pairwise((False, *rollout.written))]
    return sum(begins) if rollout.written else int(bool(rollout.tokens))


def own_logp(rollout: Rollout) -> tuple[float, ...]:
    """Log-probabilities of the tokens that the model wrote."""
    pairs = zip(rollout.logp, rollout.written or (True,) * len(rollout.logp), strict=True)
    return tuple(logp for logp, own in pairs if own)


def answered(rollout: Rollout, tokens: Sequence[int]) -> Rollout:
    """The rollout with tokens that its environment wrote behind it; the text stays that of before."""
    count, own = len(tokens), len(rollout.tokens)
    assert own, "there is nothing to answer"
    return replace(
        rollout,
        tokens=(*rollout.tokens, *tokens),
        logp=rollout.logp + (0.0,) * count,
        weight_versions=rollout.weight_versions + rollout.weight_versions[-1:] * count,
        sampling_logp=rollout.sampling_logp + (0.0,) * count,
        written=(rollout.written or (True,) * own) + (False,) * count,
        supports=rollout.supports and rollout.supports + ((),) * count,
    )


def continued(before: Rollout, after: Rollout, decode: Callable[[list[int]], str]) -> Rollout:
    """What was there before, and what the model wrote behind it."""
    tokens = before.tokens + after.tokens
    supports = _supports(before) + _supports(after) if before.supports or after.supports else ()
    return replace(
        after,
        tokens=tokens,
        logp=before.logp + after.logp,
        text=decode(list(tokens)),
        weight_versions=before.weight_versions + after.weight_versions,
        sampling_logp=before.sampling_logp + after.sampling_logp,
        written=before.written + (True,) * len(after.tokens),
        supports=supports,
    )


def _supports(rollout: Rollout) -> tuple[tuple[int, ...], ...]:
    return rollout.supports or ((),) * len(rollout.tokens)
