"""Samples, packed into rows of tokens with per-token loss columns (weight, advantage, log-probabilities, …).

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
"""Names of the per-token columns; `Sample` documents each."""
_PREDICTED = ("targets", "samples", "numbers", *COLUMNS)


@dataclass(frozen=True)
class Sample:
    """A prompt and its completion of C tokens; every column has length C."""

    prompt: Ints
    completion: Ints
    weight: Floats
    """The token's weight in the loss; 0 for a token that is not trained on."""
    advantage: Floats
    """The advantage of each token."""
    old_logp: Floats
    """Log-probability under the behaviour policy, as the rollout reported it when it sampled the token."""
    proximal_logp: Floats
    """Log-probability under the proximal policy: the trainer's own before the update, or the behaviour policy's."""
    reference_logp: Floats
    """Log-probability under the reference policy, or under a teacher."""
    value: Floats
    """The critic's value before the update: expected rewards from this token on."""
    returns: Floats
    """The critic's target: the returns from this token on."""
    numbers: Ints
    """Each token's number in the global batch, by which the scores of single tokens are assigned to them."""
    group: int = 0
    """Samples with the same number are compared with each other by preference losses."""
    preference: float = 0.0
    """Of two samples of a group, the one with the higher preference is better."""


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
    """Make a sample; a column may be given as one number, and `proximal_logp` defaults to `old_logp`.

    Raises:
        ValueError: when prompt or completion is empty.
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
    """Per-sample values of the S samples of a row, the same on every context rank."""

    counted: Floats
    """Number of tokens that have weight."""
    weight: Floats
    """Mean weight of those tokens."""
    group: Ints
    preference: Floats


def members_of(samples: Sequence[Sample]) -> Members:
    """The `Members` of samples, in their order in a row."""
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
    """A packed row of T tokens and K predictions: the micro-batch."""

    tokens: Ints
    positions: Ints
    documents: tuple[tuple[int, ...], ...]
    """For each document the tokens of its prompt and of each of its branches; they add up to T, padding included."""
    predictors: Ints
    """[K] indices into the row."""
    targets: Ints
    """[K] the tokens to predict."""
    samples: Ints
    """[K] the index, within the row, of the sample that each belongs to."""
    numbers: Ints
    """[K] the numbers of the predicted tokens; see `Sample`."""
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
    """Samples that share a prompt, whose tokens are stored and computed once."""

    samples: tuple[Sample, ...]

    @property
    def branches(self) -> list[int]:
        """Number of tokens of each completion that are inputs; the last token is only a target."""
        return [len(s.completion) - 1 for s in self.samples]

    def __len__(self) -> int:
        return len(self.samples[0].prompt) + sum(self.branches)


def documents(samples: Sequence[Sample]) -> list[Document]:
    """Group samples by prompt, in order of first appearance."""
    groups: dict[bytes, list[Sample]] = {}
    for each in samples:
        groups.setdefault(each.prompt.tobytes(), []).append(each)
    return [Document(tuple(group)) for group in groups.values()]


def row(chosen: Sequence[Document], length: int) -> TokenBatch:
    """Concatenate documents into a row, padded to `length` tokens by a document without predictions."""
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
    """Drop predictions of weight 0: each would cost logits over the vocabulary and has no gradient."""
    loud = batch.weight != 0
    return replace(batch, **{c: getattr(batch, c)[loud] for c in ("predictors", *_PREDICTED)})


def part(batch: TokenBatch, places: Ints) -> TokenBatch:
    """The part of a row that one context rank computes: the tokens at `places`, and the predictions from them.

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
    """Pack documents into rows of at most `budget` tokens (more only for a single longer document), longest first.

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
    """Balance documents over `parts` data ranks: longest first, each to the rank with the fewest tokens so far."""
    shares: list[list[Document]] = [[] for _ in range(parts)]
    load = [0] * parts
    for document in sorted(chosen, key=len, reverse=True):
        lightest = load.index(min(load))
        shares[lightest].append(document)
        load[lightest] += len(document)
    return shares


def sequences_of(batch: TokenBatch) -> tuple[Ints, Floats]:
    """The document of each token of a row, [T], and the weight of each document, [D]: the sum over its predictions.

    A prompt and its branches are one document. Padding is a document of weight 0.
    """
    lengths = [sum(d) for d in batch.documents]
    document = np.repeat(np.arange(len(lengths)), lengths)
    weight = np.bincount(document[batch.predictors], weights=batch.weight, minlength=len(lengths))
    return document, weight.astype(np.float32)


@dataclass(frozen=True)
class RowRules:
    """What a layout requires of the rows of a global batch."""

    ranks: int = 1
    """Number of data ranks that share the batch."""
    budget: int = 2048
    """Tokens of a row at most, unless one document alone is longer."""
    multiple: int = 32
    """Rows are padded to a multiple of this many tokens."""
    equal: bool = False
    """Whether all rows of a rank have the same length."""
    count: int = 1
    """The number of rows of every rank is a multiple of this."""
    in_step: bool = False
    """Whether all ranks have the same number of rows."""

    def rows(self, needed: int) -> int:
        """The number of rows of a rank that needs at least so many."""
        return -(-needed // self.count) * self.count


def rows_for_ranks(samples: Sequence[Sample], rules: RowRules) -> list[list[TokenBatch]]:
    """Pack a global batch into rows for each data rank; missing rows are filled up with rows of weight 0."""
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
