"""Sequences packed head to tail into rows of tokens, with one number for each token that is to be predicted.

Samples that continue the same prompt form one document, a tree: the prompt is computed once and every completion sees
the prompt and itself. A prediction is a triple (predictor, target, columns): the activations at one token of the row
predict one token, and the last token of a prompt predicts the first token of each of its completions. Losses are
sums of weighted predictions, already divided by the size of the global batch, so packing never changes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
COLUMNS = ("weight", "advantage", "old_logp", "proximal_logp", "reference_logp", "value", "returns")
"""Of a sample's tokens; `Sample` says what each means."""
_PREDICTED = ("targets", "samples", "numbers", *COLUMNS)


@dataclass(frozen=True)
class Sample:
    """A prompt and its completion of C tokens; every column has length C."""

    prompt: Ints
    completion: Ints
    weight: Floats
    """What each token counts; 0 for a token that is not to be learned."""
    advantage: Floats
    """How much better than expected it was to write this token."""
    old_logp: Floats
    """Under the behaviour policy: what the rollout reported when it drew the token."""
    proximal_logp: Floats
    """Under the policy that ratios are to: the trainer's own before the update, or again the behaviour's."""
    reference_logp: Floats
    """Under the policy to stay near to, or under a teacher."""
    value: Floats
    """What a critic expected, before the update, of the rewards from this token on."""
    returns: Floats
    """What a critic should have expected."""
    numbers: Ints
    """Of each token, in the global batch, where scores of single tokens are asked for: by it they are told apart."""
    group: int = 0
    """Samples of one prompt with the same number are compared with each other."""
    preference: float = 0.0
    """Of two samples of a group, the one with more is better."""


def sample(
    prompt: Sequence[int],
    completion: Sequence[int],
    *,
    weight: float | Floats = 1.0,
    advantage: float | Floats = 1.0,
    old_logp: float | Floats = 0.0,
    proximal_logp: float | Floats | None = None,
    reference_logp: float | Floats = 0.0,
    value: float | Floats = 0.0,
    returns: float | Floats = 0.0,
    numbers: int | Ints = 0,
    group: int = 0,
    preference: float = 0.0,
) -> Sample:
    """A sample whose columns may be given as one number; `proximal_logp` is `old_logp` unless it is given.

    Raises:
        ValueError: when there is nothing to predict from, or nothing to predict.
    """
    if not len(prompt) or not len(completion):
        raise ValueError(
            f"a sample needs a prompt and a completion, and has {len(prompt)} and {len(completion)} tokens"
        )
    proximal_logp = old_logp if proximal_logp is None else proximal_logp
    columns = (weight, advantage, old_logp, proximal_logp, reference_logp, value, returns)
    shaped: dict[str, Any] = {
        name: np.broadcast_to(np.asarray(column, np.float32), len(completion))
        for name, column in zip(COLUMNS, columns, strict=True)
    }
    tokens = np.asarray(prompt, np.int64), np.asarray(completion, np.int64)
    numbered = np.broadcast_to(np.asarray(numbers, np.int64), len(completion))
    return Sample(*tokens, **shaped, numbers=numbered, group=group, preference=preference)


@dataclass(frozen=True)
class Members:
    """What is known of each of the S samples of a row as a whole, wherever its tokens are computed."""

    counted: Floats
    """Tokens that have weight."""
    weight: Floats
    """Mean weight of those."""
    group: Ints
    preference: Floats


def members_of(samples: Sequence[Sample]) -> Members:
    """Of samples in the order in which they stand in a row."""
    counted = np.array([np.count_nonzero(s.weight) for s in samples], np.float32)
    total = np.array([s.weight.sum() for s in samples], np.float32)
    return Members(
        counted=counted,
        weight=(total / np.maximum(counted, 1)).astype(np.float32),
        group=np.array([s.group for s in samples], np.int64),
        preference=np.array([s.preference for s in samples], np.float32),
    )


@dataclass(frozen=True)
class TokenBatch:
    """A row of T tokens and K predictions."""

    tokens: Ints
    positions: Ints
    documents: tuple[tuple[int, ...], ...]
    """For each document the tokens of its prompt and of each of its branches; they add up to T, padding included."""
    predictors: Ints
    """[K] indices into the row."""
    targets: Ints
    """[K] the tokens that are predicted."""
    samples: Ints
    """[K] the numbers, within the row, of the samples that they belong to."""
    numbers: Ints
    """[K] the numbers of the predicted tokens, see `Sample`."""
    members: Members
    weight: Floats
    advantage: Floats
    old_logp: Floats
    proximal_logp: Floats
    reference_logp: Floats
    value: Floats
    returns: Floats


@dataclass(frozen=True)
class Document:
    """Samples that share a prompt."""

    samples: tuple[Sample, ...]

    @property
    def branches(self) -> list[int]:
        """Tokens of each completion that are read; the last one is only predicted."""
        return [len(s.completion) - 1 for s in self.samples]

    def __len__(self) -> int:
        return len(self.samples[0].prompt) + sum(self.branches)


def documents(samples: Sequence[Sample]) -> list[Document]:
    """Samples grouped by prompt, in order of first appearance."""
    groups: dict[bytes, list[Sample]] = {}
    for each in samples:
        groups.setdefault(each.prompt.tobytes(), []).append(each)
    return [Document(tuple(group)) for group in groups.values()]


def row(chosen: Sequence[Document], length: int) -> TokenBatch:
    """Documents head to tail, padded to `length` tokens by a document that predicts nothing."""
    tokens, positions, shapes, predictors = [], [], [], []
    start = 0
    for document in chosen:
        prompt = document.samples[0].prompt
        tokens.append(prompt)
        positions.append(np.arange(len(prompt)))
        last, start = start + len(prompt) - 1, start + len(prompt)
        for each, branch in zip(document.samples, document.branches, strict=True):
            tokens.append(each.completion[:-1])
            positions.append(np.arange(branch) + len(prompt))
            predictors.append(np.concatenate([[last], np.arange(start, start + branch)]))
            start += branch
        shapes.append((len(prompt), *document.branches))
    spare = length - start
    assert spare >= 0
    if spare:
        tokens.append(np.zeros(spare, np.int64))
        positions.append(np.arange(spare))
        shapes.append((spare,))
    members = [s for d in chosen for s in d.samples]
    batch = TokenBatch(
        tokens=np.concatenate(tokens),
        positions=np.concatenate(positions),
        documents=tuple(shapes),
        predictors=_joined(predictors, np.int64),
        targets=_joined([s.completion for s in members], np.int64),
        samples=np.repeat(np.arange(len(members)), [len(s.completion) for s in members]),
        numbers=_joined([s.numbers for s in members], np.int64),
        members=members_of(members),
        **{c: _joined([getattr(s, c) for s in members], np.float32) for c in COLUMNS},
    )
    return _without_silent(batch)


def _joined(parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


def _without_silent(batch: TokenBatch) -> TokenBatch:
    """Predictions of weight 0 cost a row of the vocabulary each and teach nothing."""
    loud = batch.weight != 0
    return replace(batch, **{c: getattr(batch, c)[loud] for c in ("predictors", *_PREDICTED)})


def part(batch: TokenBatch, places: Ints) -> TokenBatch:
    """What a rank computes of a row that is split over ranks: the tokens at `places`, and what is predicted from them.

    `documents` still describes the whole row, which attention needs.
    """
    inside = np.full(len(batch.tokens), -1, np.int64)
    inside[places] = np.arange(len(places))
    local = inside[batch.predictors]
    held = local >= 0
    return replace(
        batch,
        tokens=batch.tokens[places],
        positions=batch.positions[places],
        predictors=local[held],
        **{c: getattr(batch, c)[held] for c in _PREDICTED},
    )


def pack(chosen: Sequence[Document], *, budget: int, multiple: int = 32, equal: bool = False) -> list[TokenBatch]:
    """Rows of at most `budget` tokens (more only for one longer document), similar lengths together.

    Args:
        multiple: rows are padded to a multiple of this many tokens.
        equal: pad all rows to the same length, as pipeline stages need.
    """
    rows: list[list[Document]] = []
    filled: list[int] = []
    for document in sorted(chosen, key=len, reverse=True):
        if not rows or filled[-1] + len(document) > budget:
            rows.append([])
            filled.append(0)
        rows[-1].append(document)
        filled[-1] += len(document)
    padded = [-(-n // multiple) * multiple for n in filled]
    if equal and padded:
        padded = [max(padded)] * len(padded)
    return [row(members, length) for members, length in zip(rows, padded, strict=True)]


def share(chosen: Sequence[Document], parts: int) -> list[list[Document]]:
    """Documents for each of `parts` data ranks: longest first, each to the rank with the fewest tokens so far."""
    shares: list[list[Document]] = [[] for _ in range(parts)]
    load = [0] * parts
    for document in sorted(chosen, key=len, reverse=True):
        lightest = load.index(min(load))
        shares[lightest].append(document)
        load[lightest] += len(document)
    return shares


def sequences_of(batch: TokenBatch) -> tuple[Ints, Floats]:
    """The document of each token of a row, [T], and what each document counts, [D]: the weight of its predictions.

    A prompt and its branches are one document. Padding is a document that counts 0.
    """
    lengths = [sum(d) for d in batch.documents]
    document = np.repeat(np.arange(len(lengths)), lengths)
    weight = np.bincount(document[batch.predictors], weights=batch.weight, minlength=len(lengths))
    return document, weight.astype(np.float32)


@dataclass(frozen=True)
class RowRules:
    """What a layout asks of the rows of a global batch."""

    ranks: int = 1
    """Shares that the batch is split into."""
    budget: int = 2048
    """Tokens of a row at most, unless one document alone is longer."""
    multiple: int = 32
    """Rows are padded to a multiple of this many tokens."""
    equal: bool = False
    """Whether all rows of a rank have the same length."""
    count: int = 1
    """Every rank has a multiple of this many rows."""
    in_step: bool = False
    """Whether all ranks have the same number of rows."""

    def rows(self, needed: int) -> int:
        """How many rows a rank has that needs so many."""
        return -(-needed // self.count) * self.count


def rows_for_ranks(samples: Sequence[Sample], rules: RowRules) -> list[list[TokenBatch]]:
    """A global batch as rows for each rank; where rows are missing, rows that weigh nothing stand in."""
    silent = Document((sample([0], [0], weight=0.0),))
    shares = share(documents(samples), rules.ranks)
    packed = [
        pack(part or [silent], budget=rules.budget, multiple=rules.multiple, equal=rules.equal) for part in shares
    ]
    most = max(map(len, packed)) if rules.in_step else 0
    for rows in packed:
        wanted = rules.rows(max(most, len(rows)))
        length = len(rows[0].tokens) if rules.equal else rules.multiple
        rows += [row([silent], length)] * (wanted - len(rows))
    return packed
