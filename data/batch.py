"""Sample and TokenBatch: tokens with per-token loss columns (weight, advantage, log-probabilities, …).

Samples that continue the same prompt form one document, a tree: the prompt is computed once and every completion sees
the prompt and itself. A prediction is a triple (predictor, target, columns): the activations at one token of the row
predict one token, and the last token of a prompt predicts the first token of each of its completions. Losses are
sums of weighted predictions, already divided by the size of the global batch, so packing never changes them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Tokens = NDArray[np.int32]
Experts = NDArray[np.integer]
"""[N, L, K]: the K experts that each of the first N tokens of a text went to in each of L layers, best first, in uint8
where there are up to 256 experts and in int16 where there are more."""
COLUMNS = ("weight", "advantage", "old_logp", "proximal_logp", "reference_logp", "value", "returns")
"""Names of the per-token columns; `Sample` documents each."""
PREDICTED = ("targets", "samples", "numbers", *COLUMNS)

Number = TypeVar("Number", bound=float)
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Sample:
    """A prompt and its completion of C tokens; every column has length C.

    A column whose numbers are all the same is one number in memory, where it was given as one, and in pickles.
    """

    prompt: Tokens
    completion: Tokens
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
    number: int = 0
    """Of the completion's first token in the global batch, which the others follow: scores come back by it."""
    group: int = 0
    """Samples with the same number are compared with each other by preference losses."""
    preference: float = 0.0
    """Of two samples of a group, the one with the higher preference is better."""
    experts: Experts | None = None
    """That the tokens of prompt and completion, from the first on, are to go to instead of those that a router chooses;
    None, and for the tokens behind the last record, for those that it chooses."""

    def __reduce__(self) -> tuple[Any, ...]:
        columns = {name: getattr(self, name) for name in COLUMNS}
        short = {name: column[0] if is_constant(column) else column for name, column in columns.items()}
        rest = {name: getattr(self, name) for name in ("number", "group", "preference", "experts")}
        return _read, (self.prompt, self.completion, short | rest)


def is_constant(array: NDArray[Any]) -> bool:
    """Whether an array, [N], has one number at least, and the bits of all are the same."""
    if not len(array) or array.strides == (0,):
        return bool(len(array))
    bits = _bits(array)
    return bool(bits[0] == bits[-1] and (bits == bits[0]).all())


def _bits(array: NDArray[Any]) -> NDArray[np.unsignedinteger]:
    """The numbers of an array as integers of the same bits."""
    return array.view(f"u{array.itemsize}")


class Column(Sequence[Number], Generic[Number]):
    """An immutable array, [N], that compares, adds up and hashes like a tuple of its numbers.

    It takes 4 bytes a number in memory and in pickles, where a tuple takes 32, and `np.asarray` gives the array without
    a copy. Where all numbers are the same it travels as one.
    """

    __slots__ = ("array",)

    array: NDArray[Any]
    """The numbers, [N], which cannot be changed."""

    def __init__(self, numbers: "Iterable[Number] | NDArray[Any]", dtype: DTypeLike) -> None:
        """
        Args:
            dtype: what numbers are rounded to, if they are not of that type.
        """
        if isinstance(numbers, Column):
            numbers = numbers.array
        elif not isinstance(numbers, np.ndarray):
            numbers = tuple(numbers)
        self.array = np.asarray(numbers, dtype).view()
        self.array.flags.writeable = False
        assert self.array.ndim == 1

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy:
            return np.array(self.array, dtype)
        return self.array if dtype is None else self.array.astype(dtype, copy=False)

    def __len__(self) -> int:
        return len(self.array)

    def has_bits_of(self, other: "Column[Number]") -> bool:
        """Whether the numbers of another column have the same bits, zeros' signs included."""
        return self.array.dtype == other.array.dtype and np.array_equal(_bits(self.array), _bits(other.array))

    @overload
    def __getitem__(self, place: int) -> Number: ...
    @overload
    def __getitem__(self, place: slice) -> "Column[Number]": ...
    def __getitem__(self, place: int | slice) -> "Number | Column[Number]":
        found = self.array[place]
        return Column(found, found.dtype) if isinstance(place, slice) else found.item()

    def __iter__(self) -> Iterator[Number]:
        return iter(self.array.tolist())

    def __add__(self, other: Iterable[Number]) -> "Column[Number]":
        more = other if isinstance(other, Column) else Column(other, self.array.dtype)
        return Column(np.concatenate([self.array, more.array]), self.array.dtype)

    def __radd__(self, other: tuple[Number, ...]) -> tuple[Number, ...]:
        return (*other, *self)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Column):
            return np.array_equal(self.array, other.array)
        return tuple(self) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        if is_constant(self.array):
            return _constant, (self.array[0], len(self.array))
        return Column, (self.array, self.array.dtype)


def _constant(number: np.generic, length: int) -> "Column[Any]":
    return Column(np.broadcast_to(number, length), number.dtype)


def compact(column: NDArray[Scalar]) -> NDArray[Scalar]:
    """A column, [N], that is one number in memory where all of its numbers are the same."""
    return np.broadcast_to(column[0], len(column)) if is_constant(column) else column


def _read(prompt: Tokens, completion: Tokens, columns: dict[str, Any]) -> Sample:
    return sample(prompt, completion, **columns)


def sample(
    prompt: Sequence[int] | NDArray[np.integer],
    completion: Sequence[int] | NDArray[np.integer],
    *,
    weight: float | Floats = 1.0,
    advantage: float | Floats = 1.0,
    old_logp: float | Floats = 0.0,
    proximal_logp: float | Floats | None = None,
    reference_logp: float | Floats = 0.0,
    value: float | Floats = 0.0,
    returns: float | Floats = 0.0,
    number: int = 0,
    group: int = 0,
    preference: float = 0.0,
    experts: Experts | None = None,
) -> Sample:
    """Make a sample; a column may be given as one number, and `proximal_logp` defaults to `old_logp`.

    Raises:
        ValueError: when prompt or completion is empty.
    """
    if not len(prompt) or not len(completion):
        raise ValueError(
            f"a sample needs a prompt and a completion, and has {len(prompt)} and {len(completion)} tokens"
        )
    columns = (weight, advantage, old_logp, proximal_logp, reference_logp, value, returns)
    shaped: dict[str, Any] = {
        name: compact(np.broadcast_to(np.asarray(column, np.float32), len(completion)))
        for name, column in zip(COLUMNS, columns, strict=True)
        if column is not None
    }
    shaped.setdefault("proximal_logp", shaped["old_logp"])  # one array, which is pickled once
    tokens = np.asarray(prompt, np.int32), np.asarray(completion, np.int32)
    return Sample(*tokens, **shaped, number=number, group=group, preference=preference, experts=experts)


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
    experts: NDArray[np.int16] | None = None
    """[T, L, K] that tokens are to go to; −1 for those that go where a router sends them; None where all do,
    in all rows of a global batch."""


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
        experts=None if batch.experts is None else batch.experts[places],
        **{c: getattr(batch, c)[held] for c in PREDICTED},
    )


def sequences_of(batch: TokenBatch) -> tuple[Ints, Floats]:
    """The document of each token of a row, [T], and the weight of each document, [D]: the sum over its predictions.

    A prompt and its branches are one document. Padding is a document of weight 0.
    """
    lengths = [sum(d) for d in batch.documents]
    document = np.repeat(np.arange(len(lengths)), lengths)
    weight = np.bincount(document[batch.predictors], weights=batch.weight, minlength=len(lengths))
    return document, weight.astype(np.float32)
