"""Log-probabilities and values of the tokens of rollouts: rows go to the models as in training, columns come back.

A row does not know whose its tokens are. So each token that is to be scored has a number of its own, and a rank returns
pairs of a number and a score, in whatever order its rows have.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from lockstep.data.batch import Floats, Ints, Sample, TokenBatch, sample
from lockstep.rl.types import Rollout


def of_tokens(rollouts: Sequence[Rollout]) -> list[Sample]:
    """Samples that ask for a score of every token of rollouts: its log-probability, or the critic's value before it."""
    return of_completions([(r.prompt.tokens, r.tokens) for r in rollouts])


def with_experts(samples: list[Sample], rollouts: Sequence[Rollout]) -> list[Sample]:
    """Samples `of_tokens` of rollouts, whose tokens go to the experts that they went to where those are recorded.

    The policy is scored and trained so; other models send tokens where their own routers do.
    """
    if all(r.experts is None for r in rollouts):
        return samples
    written = (r for r in rollouts if r.tokens)
    return [replace(s, experts=r.experts) for s, r in zip(samples, written, strict=True)]


def without_experts(samples: list[Sample]) -> list[Sample]:
    """Samples whose tokens go where routers send them."""
    return [s if s.experts is None else replace(s, experts=None) for s in samples]


def of_completions(texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Sample]:
    """The same for pairs of a prompt and a completion that are no rollouts; those without tokens have no sample."""
    starts = np.cumsum([0, *(len(tokens) for _, tokens in texts)])
    return [
        sample(prompt, tokens, number=int(start))
        for (prompt, tokens), start in zip(texts, starts, strict=False)
        if len(tokens)
    ]


def of_answers(rollouts: Sequence[Rollout]) -> list[Sample]:
    """Samples that ask for one score of each rollout, a reward model's: the value at its last token.

    The score is at the prediction of one token more, which stands behind the last one and is never read.
    """
    found = []
    for number, rollout in enumerate(rollouts):
        last = np.zeros(len(rollout.tokens) + 1, np.float32)
        last[-1] = 1
        text = np.append(rollout.tokens, 0)
        found.append(sample(rollout.prompt.tokens, text, weight=last, number=number - len(rollout.tokens)))
    return found


def scores_of(rows: Sequence[TokenBatch], scores: Sequence[Floats]) -> tuple[Ints, Floats]:
    """The numbers of the tokens in a rank's rows, and their scores."""
    numbers = [row.numbers for row, _ in zip(rows, scores, strict=False)]
    return np.concatenate([np.zeros(0, np.int64), *numbers]), np.concatenate([np.zeros(0, np.float32), *scores])


def columns(found: Iterable[tuple[Ints, Floats]], lengths: Sequence[int]) -> list[Floats]:
    """Scores by rollout, [C] each, from the numbers and scores of all ranks.

    Args:
        lengths: of the rollouts, in tokens.
    """
    starts = np.cumsum([0, *lengths])
    whole, came = np.zeros(starts[-1], np.float32), np.zeros(starts[-1], bool)
    for numbers, scores in found:
        whole[numbers], came[numbers] = scores, True
    assert came.all()
    return np.split(whole, starts[1:-1])
