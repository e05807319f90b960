"""Packs documents (a prompt with its completions) into rows of tokens, and shares rows out to data-parallel ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.data.batch import COLUMNS, PREDICTED, Sample, TokenBatch, members_of, sample


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
    return replace(batch, **{c: getattr(batch, c)[loud] for c in ("predictors", *PREDICTED)})


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
