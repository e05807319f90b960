"""What a trainer's models say of the tokens of rollouts: rows go out as in training, and numbers by rollout come back.

A row does not know whose its tokens are. So each token that is to be scored carries its own number, in the column of
the old log-probabilities, which scoring does not read.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from lockstep.data.batch import Floats, Ints, Sample, TokenBatch, sample
from lockstep.rl.types import Rollout

MOST = 1 << 24
"""Whole numbers that fp32 can tell apart."""


def of_tokens(rollouts: Sequence[Rollout]) -> list[Sample]:
    """Samples whose every token is scored: by its log-probability, or by the value before it."""
    return of_completions([(r.prompt.tokens, r.tokens) for r in rollouts])


def of_completions(texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Sample]:
    """`of_tokens` of prompts and completions that nobody drew."""
    starts = _starts([len(tokens) for _, tokens in texts])
    return [
        sample(prompt, tokens, old_logp=np.arange(a, b, dtype=np.float32))
        for (prompt, tokens), a, b in zip(texts, starts, starts[1:], strict=False)
    ]


def of_answers(rollouts: Sequence[Rollout]) -> list[Sample]:
    """Samples of which the value behind the last token is a score: one token more, which is not read, stands there."""
    found = []
    for number, rollout in enumerate(rollouts):
        last = np.zeros(len(rollout.tokens) + 1, np.float32)
        last[-1] = 1
        found.append(sample(rollout.prompt.tokens, (*rollout.tokens, 0), weight=last, old_logp=number * last))
    _starts([1] * len(rollouts))
    return found


def scores_of(rows: Sequence[TokenBatch], scores: Sequence[Floats]) -> tuple[Ints, Floats]:
    """The numbers of a rank's tokens, and what it says of each."""
    numbers = [row.old_logp.astype(np.int64) for row, _ in zip(rows, scores, strict=False)]
    return np.concatenate([np.zeros(0, np.int64), *numbers]), np.concatenate([np.zeros(0, np.float32), *scores])


def columns(found: Iterable[tuple[Ints, Floats]], lengths: Sequence[int]) -> list[Floats]:
    """The scores of rollouts of so many tokens each, from those of all ranks."""
    starts = _starts(lengths)
    whole, came = np.zeros(starts[-1], np.float32), np.zeros(starts[-1], bool)
    for numbers, scores in found:
        whole[numbers], came[numbers] = scores, True
    assert came.all()
    return np.split(whole, starts[1:-1])


def _starts(lengths: Sequence[int]) -> Ints:
    starts = np.cumsum([0, *lengths])
    if starts[-1] > MOST:
        raise ValueError(f"{starts[-1]} tokens are to be scored at once, and {MOST} can be: lower rl.prompts_per_step")
    return starts
