"""The pretraining data loader: sample n of a run is a pure function of (seed, blend, n), in any layout.

A global batch is a range of sample numbers. Every data rank computes from the indexes alone which samples are its own
and how many predictions the whole batch has, so ranks do not communicate, and a run can be resumed with any number of
ranks, any row size and any pipeline.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from lockstep.data.batch import COLUMNS, TokenBatch, members_of
from lockstep.data.corpus.blend import Blend
from lockstep.data.corpus.document_stream import Cut, DocumentStream, split
from lockstep.data.corpus.indexed_dataset import BadIndexedDataset, IndexedDataset
from lockstep.data.packing import RowRules


class BadBlend(ValueError):
    """A blend with too little data to train on."""


class BlendPart(BaseModel):
    """An indexed dataset and its weight in the blend."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[str, Path] = Field(description="an indexed dataset, without .bin or .idx")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="its share of the samples, among all weights")


class PretrainingConfig(BaseModel):
    """The data of pretraining: datasets and weights, sample length, held-out share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blend: tuple[BlendPart, ...] = Field(min_length=1, description="indexed datasets and their weights")
    length: int = Field(2048, ge=1, description="tokens of a sample")
    held_out: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="documents of each store kept for evaluation: a share or a number"
    )
    on_bad: Literal["stop", "skip"] = Field("stop", description="what to do about a document that cannot be used")

    @field_validator("held_out")
    @classmethod
    def _share_or_number(cls, value: float) -> float:
        if value > 1 and value != round(value):
            raise ValueError("give a share below 1 or a whole number of documents")
        return value


@dataclass(frozen=True)
class SourceSummary:
    """What one dataset of a blend contributes."""

    path: str
    share: float
    documents: int
    """Documents to train on; empty ones are not counted."""
    tokens: int
    held_out_documents: int
    held_out_tokens: int
    skipped_documents: int


@dataclass(frozen=True)
class _Source:
    store: IndexedDataset
    train: DocumentStream
    held_out: DocumentStream
    skipped: int


class PretrainingData:
    """The samples of a blend, in the order of training, and its held-out documents."""

    def __init__(self, config: PretrainingConfig, *, seed: int, vocabulary: int, tokenizer: str | None = None) -> None:
        """
        Args:
            vocabulary: the model's vocabulary size.
            tokenizer: digest of the tokenizer that goes with the model; stores of another one are refused.

        Raises:
            BadIndexedDataset: for a store that is damaged or was made with another tokenizer.
            BadBlend: for a store with less than one sample to train on.
        """
        self.config = config
        self.blend = Blend([part.weight for part in config.blend])
        self._sources = [
            _open(config, number, seed=seed, vocabulary=vocabulary, tokenizer=tokenizer)
            for number in range(len(config.blend))
        ]

    @property
    def summary(self) -> tuple[SourceSummary, ...]:
        """What each dataset contributes."""
        return tuple(
            SourceSummary(
                path=part.path,
                share=float(share),
                documents=source.train.documents,
                tokens=source.train.tokens,
                held_out_documents=source.held_out.documents,
                held_out_tokens=source.held_out.tokens,
                skipped_documents=source.skipped,
            )
            for part, share, source in zip(self.config.blend, self.blend.shares, self._sources, strict=True)
        )

    def epochs(self, samples: int) -> list[float]:
        """The number of epochs of each dataset after so many samples of the blend."""
        counts = self.blend.counts(samples)
        return [n * self.config.length / s.train.tokens for n, s in zip(counts, self._sources, strict=True)]

    def sample(self, number: int) -> Cut:
        """Sample `number` of the run: its tokens, and one more that is only a target."""
        sources, numbers = self.blend.take(number, number + 1)
        return self._cut(int(sources[0]), int(numbers[0]))

    def batch(self, samples: range) -> dict[str, NDArray[Any]]:
        """The content of these samples for inspection, as plain arrays (`numpy.savez`).

        Returns:
            samples [N]: their numbers.
            tokens [N, length + 1]: the last one of a sample is only predicted.
            documents [N, length + 1]: the number that each token's document has in its store.
            stores [N]: the paths of the stores.
        """
        sources, numbers = self.blend.take(samples.start, samples.stop)
        cuts = [self._cut(s, k) for s, k in zip(sources.tolist(), numbers.tolist(), strict=True)]
        return {
            "samples": np.array(samples, np.int64),
            "tokens": np.stack([c.tokens for c in cuts]),
            "documents": np.stack([np.repeat(c.documents, c.lengths) for c in cuts]),
            "stores": np.array([part.path for part in self.config.blend])[sources],
        }

    def predictions(self, samples: range) -> int:
        """The number of predicted tokens of a global batch, from the indexes alone."""
        sources, numbers = self.blend.take(samples.start, samples.stop)
        found = 0
        for source in np.unique(sources).tolist():
            first = numbers[sources == source] * self.config.length
            stop = first + self.config.length + 1
            found += int((stop - first - self._sources[source].train.pieces(first, stop)).sum())
        return found

    def rows(self, samples: range, rules: RowRules, rank: int = 0) -> list[TokenBatch]:
        """A data rank's rows of the global batch of these samples; sample i of the batch goes to rank i mod ranks.

        The weights of all predictions of all ranks add up to 1.
        """
        sources, numbers = self.blend.take(samples.start, samples.stop)
        mine = slice(rank, None, rules.ranks)
        cuts = [self._cut(s, k) for s, k in zip(sources[mine].tolist(), numbers[mine].tolist(), strict=True)]
        most = -(-len(samples) // rules.ranks)
        return _rows(cuts, rules, length=self.config.length, most=most, predictions=self.predictions(samples))

    def held_out_rows(self, rules: RowRules, rank: int = 0) -> list[TokenBatch]:
        """A data rank's rows of all held-out documents, in stored order, each token read once.

        Neighbouring documents share samples as in training. The weights of all predictions of all ranks add up to 1.
        """
        length = self.config.length
        spans = [
            (stream, first, min(first + length + 1, stream.tokens))
            for stream in (source.held_out for source in self._sources)
            for first in range(0, stream.tokens, length)
        ]
        predictions = sum(stream.tokens - stream.documents for stream in (s.held_out for s in self._sources))
        cuts = [stream.cut(first, stop) for stream, first, stop in spans[rank :: rules.ranks]]
        most = -(-len(spans) // rules.ranks)
        return _rows(cuts, rules, length=length, most=most, predictions=predictions) if spans else []

    def _cut(self, source: int, number: int) -> Cut:
        first = number * self.config.length
        return self._sources[source].train.cut(first, first + self.config.length + 1)


def _open(config: PretrainingConfig, number: int, *, seed: int, vocabulary: int, tokenizer: str | None) -> _Source:
    """Source `number` of the blend, checked, its documents split and put in order."""
    skip = config.on_bad == "skip"
    store = IndexedDataset(Path(config.blend[number].path), salvage=skip)
    note = store.note
    if note and note.tokenizer and tokenizer and note.tokenizer != tokenizer:
        raise BadIndexedDataset(
            f"{store.path} was made with another tokenizer (digest {note.tokenizer}, of {note.vocabulary} tokens) than "
            f"the model's (digest {tokenizer}): tokenize its sources again, or train the model that it was made for"
        )
    usable = store.complete.copy()
    if skip or not note or note.vocabulary > vocabulary:
        outside = store.out_of_vocabulary(vocabulary, all_of_it=skip)
        if outside.size and not skip:
            raise BadIndexedDataset(store.describe_out_of_vocabulary(vocabulary, int(outside[0])))
        usable[outside] = False
    train, held_out = split(np.flatnonzero(usable), config.held_out, seed=seed, source=number)
    source = _Source(
        store,
        DocumentStream(store, train, vocabulary=vocabulary, shuffle=(seed, number)),
        DocumentStream(store, held_out, vocabulary=vocabulary, shuffle=None),
        skipped=int((~usable).sum()),
    )
    if source.train.tokens <= config.length:
        raise BadBlend(
            f"{store.path} has {source.train.tokens} tokens in {source.train.documents} documents to train on, and one "
            f"sample takes {config.length + 1}: shorten length, hold out fewer documents, or give a larger store"
        )
    return source


def _rows(cuts: Sequence[Cut], rules: RowRules, *, length: int, most: int, predictions: int) -> list[TokenBatch]:
    """Pack samples into rows.

    Args:
        most: samples of the data rank that has most.
    """
    together = max(1, rules.budget // length)
    weight = 1 / max(1, predictions)
    groups = [cuts[i : i + together] for i in range(0, len(cuts), together)] or [[]]
    wanted = rules.rows(max(len(groups), -(-most // together) if rules.in_step else 0))
    groups += [[]] * (wanted - len(groups))
    tokens = length * min(together, most) if rules.equal else 1
    return [_row(g, tokens, length=length, multiple=rules.multiple, weight=weight) for g in groups]


def _row(cuts: Sequence[Cut], tokens: int, *, length: int, multiple: int, weight: float) -> TokenBatch:
    """Samples in a row of at least so many tokens, padded by a document that predicts nothing."""
    parts = [_Pieces(cut, length) for cut in cuts]
    filled = sum(len(p.tokens) for p in parts)
    spare = -(-max(filled, tokens) // multiple) * multiple - filled
    documents = [n for p in parts for n in p.lengths.tolist()] + ([spare] if spare else [])
    starts = np.cumsum([0, *(len(p.tokens) for p in parts)])
    predictors = _joined([p.predictors + start for p, start in zip(parts, starts, strict=False)])
    alike = np.ones(len(predictors), np.float32)
    return TokenBatch(
        tokens=_joined([*(p.tokens for p in parts), np.zeros(spare, np.int64)]),
        positions=_joined([np.arange(n) for n in documents]),
        documents=tuple((n,) for n in documents),
        predictors=predictors,
        targets=_joined([p.targets for p in parts]),
        samples=np.zeros(len(predictors), np.int64),
        numbers=np.zeros(len(predictors), np.int64),
        members=members_of([]),  # text has no samples that could be compared
        **dict.fromkeys(COLUMNS, alike * 0) | {"weight": alike * np.float32(weight), "advantage": alike},
    )


class _Pieces:
    """A sample as the model reads it: the first `length` tokens, each predicting the next one of its document."""

    def __init__(self, cut: Cut, length: int) -> None:
        self.tokens = cut.tokens[:length]
        last_of_document = np.zeros(len(cut.tokens), bool)
        last_of_document[np.cumsum(cut.lengths) - 1] = True
        self.predictors = np.flatnonzero(~last_of_document)
        self.targets = cut.tokens[self.predictors + 1]
        lengths = cut.lengths.copy()
        lengths[-1] -= len(cut.tokens) - len(self.tokens)
        self.lengths = lengths[lengths > 0]


def _joined(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *parts])
