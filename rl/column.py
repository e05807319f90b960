"""Column: an immutable numpy array that compares and adds up like a tuple.

Tokens, log-probabilities and versions of completions are columns: 4 bytes a number in memory and on the way between
processes, where a tuple takes 32, and `np.asarray` gives the array without a copy. A column whose numbers are all the
same travels as one number.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lockstep.data.batch import is_constant

Number = TypeVar("Number", bound=float)


class Column(Sequence[Number], Generic[Number]):
    """Numbers of one type; equal to a tuple of the same numbers, and hashed like it."""

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
        return isinstance(other, tuple) and tuple(self) == other

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
