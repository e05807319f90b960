"""Log-probabilities and values of the tokens of rollouts: rows go to the models as in training, columns come back.

A row does not know whose its tokens are. So each token that is to be scored carries its own number, and a rank returns
pairs of a number and a score, in whatever order its rows have.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from lockstep.data.batch import Floats, Ints, Sample, TokenBatch, sample
from lockstep.rl.types import Rollout


def of_tokens(rollouts: Sequence[Rollout]) -> list[Sample]:
    """Samples whose every token is scored: by its log-probability, or by the value before it."""
    return of_completions([(r.prompt.tokens, r.tokens) for r in rollouts])


def of_completions(texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Sample]:
    """`of_tokens` of prompts and completions that nobody drew."""
    starts = np.cumsum([0, *(len(tokens) for _, tokens in texts)])
    return [
        sample(prompt, tokens, numbers=np.arange(a, b))
        for (prompt, tokens), a, b in zip(texts, starts, starts[1:], strict=False)
    ]


def of_answers(rollouts: Sequence[Rollout]) -> list[Sample]:
    """Samples of which the value behind the last token is a score: one token more, which is not read, stands there."""
    found = []
    for number, rollout in enumerate(rollouts):
        last = np.zeros(len(rollout.tokens) + 1, np.float32)
        last[-1] = 1
        found.append(sample(rollout.prompt.tokens, (*rollout.tokens, 0), weight=last, numbers=number))
    return found


def scores_of(rows: Sequence[TokenBatch], scores: Sequence[Floats]) -> tuple[Ints, Floats]:
    """The numbers of a rank's tokens, and what it says of each."""
    numbers = [row.numbers for row, _ in zip(rows, scores, strict=False)]
    return np.concatenate([np.zeros(0, np.int64), *numbers]), np.concatenate([np.zeros(0, np.float32), *scores])


def columns(found: Iterable[tuple[Ints, Floats]], lengths: Sequence[int]) -> list[Floats]:
    """The scores of rollouts of so many tokens each, from those of all ranks."""
    starts = np.cumsum([0, *lengths])
    whole, came = np.zeros(starts[-1], np.float32), np.zeros(starts[-1], bool)
    for numbers, scores in found:
        whole[numbers], came[numbers] = scores, True
    assert came.all()
    return np.split(whole, starts[1:-1])
