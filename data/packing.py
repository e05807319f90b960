"""Packs documents (a prompt with its completions) into rows of tokens, and shares rows out to data-parallel ranks.

The completions of a prompt are one document, so that it is computed once. Where that would be longer than a row may
be, the document is split by its completions, and its prompt is repeated. All of this is a function of the batch alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.data.batch import COLUMNS, PREDICTED, Experts, Sample, TokenBatch, members_of, sample

PAIRS_PER_TOKEN = 8192
"""Pairs of query and key that cost as much as the products of a token with weights, for `Document.cost`.

By operations it is weights / (2 · layers · heads · head_dim): 3,900 for SmolLM2-135M, 13,600 for Qwen3-4B, 28,600 for
Llama 3 8B. With one number for all, the busiest of 16 ranks has at most 1.2 points more work than with each one's own.
"""


@dataclass(frozen=True)
class Document:
    """Samples that share a prompt, whose tokens are stored and computed once."""

    samples: tuple[Sample, ...]

    @property
    def branches(self) -> list[int]:
        """Number of tokens of each completion that are inputs; the last token is only a target."""
        return [len(s.completion) - 1 for s in self.samples]

    @property
    def cost(self) -> int:
        """Work of training on it, in tokens: its own, and one for all `PAIRS_PER_TOKEN` pairs of query and key.

        Pairs of the prompt and of each completion are counted apart, in whole tokens, so that short ones cost none.
        """
        prompt = len(self.samples[0].prompt)
        pairs = [prompt * (prompt + 1) // 2, *(b * prompt + b * (b + 1) // 2 for b in self.branches)]
        return len(self) + sum(count // PAIRS_PER_TOKEN for count in pairs)

    def __len__(self) -> int:
        return len(self.samples[0].prompt) + sum(self.branches)


def documents(samples: Sequence[Sample], budget: int | None = None) -> list[Document]:
    """Group samples by prompt, in order of first appearance; groups longer than `budget` tokens are `split`."""
    groups: dict[bytes, list[Sample]] = {}
    for each in samples:
        groups.setdefault(each.prompt.tobytes(), []).append(each)
    found = [Document(tuple(group)) for group in groups.values()]
    return found if budget is None else [part for document in found for part in split(document, budget)]


def split(document: Document, budget: int) -> list[Document]:
    """Split a document that is longer than `budget` tokens into documents within it, which repeat the prompt.

    A sample stays whole, and so do samples that a preference loss compares: only one of these that is longer by itself,
    with its prompt, makes a longer document. The parts are as few as first-fit decreasing finds: full ones and a rest,
    since rests of several documents share rows and even out data ranks, which parts of even lengths do not.
    """
    if len(document) <= budget:
        return [document]
    units = _inseparable(document.samples)
    lengths = [sum(len(document.samples[i].completion) - 1 for i in unit) for unit in units]
    parts = _first_fit(lengths, budget - len(document.samples[0].prompt))
    chosen = sorted(sorted(i for u in part for i in units[u]) for part in parts)
    return [Document(tuple(document.samples[i] for i in part)) for part in chosen]


def _inseparable(samples: Sequence[Sample]) -> list[list[int]]:
    """Indices of samples that have to be in one row: those of a group with more than one preference, or one alone."""
    groups: dict[int, list[int]] = {}
    for i, each in enumerate(samples):
        groups.setdefault(each.group, []).append(i)
    compared = [len({samples[i].preference for i in members}) > 1 for members in groups.values()]
    return [
        unit
        for members, together in zip(groups.values(), compared, strict=True)
        for unit in ([members] if together else [[i] for i in members])
    ]


def _first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of lengths in bins of at most `room`: longest first, each to the first that has room, or to a new one."""
    bins: list[list[int]] = []
    filled: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((b for b, load in enumerate(filled) if load + lengths[i] <= room), len(bins))
        if place == len(bins):
            bins.append([])
            filled.append(0)
        bins[place].append(i)
        filled[place] += lengths[i]
    return bins


def row(chosen: Sequence[Document], length: int, experts: tuple[int, ...] | None = None) -> TokenBatch:
    """Concatenate documents into a row, padded to `length` tokens by a document without predictions.

    Args:
        experts: see `PlannedRow`.
    """
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
        tokens=_joined(tokens, np.int64),
        positions=np.concatenate(positions),
        documents=tuple(shapes),
        predictors=_joined(predictors, np.int64),
        targets=_joined([s.completion for s in members], np.int64),
        samples=np.repeat(np.arange(len(members)), [len(s.completion) for s in members]),
        numbers=_joined([s.number + np.arange(len(s.completion)) for s in members], np.int64),
        members=members_of(members),
        experts=None if experts is None else _experts(chosen, (length, *experts)),
        **{c: _joined([getattr(s, c) for s in members], np.float32) for c in COLUMNS},
    )
    return _without_silent(batch)


def _experts(chosen: Sequence[Document], shape: tuple[int, ...]) -> NDArray[np.int16]:
    """Recorded experts of a row's tokens, [T, L, K], −1 for those without a record.

    A prompt is computed once: of its completions' records of it, the first that there is counts.
    """
    whole = np.full(shape, -1, np.int16)
    start = 0
    for document in chosen:
        prompt = len(document.samples[0].prompt)
        _put(next((s.experts for s in document.samples if s.experts is not None), None), 0, whole[start:][:prompt])
        start += prompt
        for each, branch in zip(document.samples, document.branches, strict=True):
            _put(each.experts, prompt, whole[start:][:branch])
            start += branch
    return whole


def _put(experts: Experts | None, first: int, places: NDArray[np.int16]) -> None:
    """Write the records of a text's tokens from `first` on to their places in a row, as far as there are some."""
    if experts is not None:
        found = experts[first : first + len(places)]
        places[: len(found)] = found


def _joined(parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


def _without_silent(batch: TokenBatch) -> TokenBatch:
    """Drop predictions of weight 0: each would cost logits over the vocabulary and has no gradient."""
    loud = batch.weight != 0
    return replace(batch, **{c: getattr(batch, c)[loud] for c in ("predictors", *PREDICTED)})


@dataclass(frozen=True)
class PlannedRow:
    """The documents of a row, which whoever computes it assembles."""

    documents: tuple[Document, ...]
    length: int
    """Tokens, padding included."""
    experts: tuple[int, ...] | None = None
    """[L, K] of the column `experts`, which all rows of a global batch have where one of its samples does."""

    def assembled(self) -> TokenBatch:
        """The row."""
        return row(self.documents, self.length, self.experts)


def plan(chosen: Sequence[Document], *, budget: int, multiple: int = 32, equal: bool = False) -> list[PlannedRow]:
    """Pack documents into rows of at most `budget` tokens (more only for a single longer document), longest first.

    `documents` splits what need not be longer.

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
    return [PlannedRow(tuple(members), length) for members, length in zip(rows, padded, strict=True)]


def share(chosen: Sequence[Document], parts: int) -> list[list[Document]]:
    """Balance documents over `parts` data ranks by cost: costliest first, each to the rank with the least so far.

    Each rank has its documents in the order in which they were given.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    costs = [document.cost for document in chosen]
    for i in sorted(range(len(chosen)), key=lambda i: -costs[i]):
        lightest = load.index(min(load))
        shares[lightest].append(i)
        load[lightest] += costs[i]
    return [[chosen[i] for i in sorted(part)] for part in shares]


@dataclass(frozen=True)
class RowRules:
    """What a layout requires of the rows of a global batch."""

    ranks: int = 1
    """Number of data ranks that share the batch."""
    budget: int = 2048
    """Tokens of a row at most, unless one completion with its prompt is longer; see `split`."""
    splits: bool = True
    """Whether documents longer than that are split. Not where a loss is of documents, as the balance of experts is."""
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
    return [[each.assembled() for each in rows] for rows in plan_for_ranks(samples, rules)]


def plan_for_ranks(samples: Sequence[Sample], rules: RowRules) -> list[list[PlannedRow]]:
    """Say which documents are in which of the rows of `rows_for_ranks`, so that each rank can assemble its own."""
    silent = Document((sample([0], [0], weight=0.0),))
    shares = share(documents(samples, rules.budget if rules.splits else None), rules.ranks)
    packed = [
        plan(part or [silent], budget=rules.budget, multiple=rules.multiple, equal=rules.equal) for part in shares
    ]
    most = max(map(len, packed)) if rules.in_step else 0
    for rows in packed:
        wanted = rules.rows(max(most, len(rows)))
        length = rows[0].length if rules.equal else rules.multiple
        rows += [PlannedRow((silent,), length)] * (wanted - len(rows))
    experts = next((s.experts.shape[1:] for s in samples if s.experts is not None), None)
    return [[replace(each, experts=experts) for each in rows] for rows in packed] if experts else packed
