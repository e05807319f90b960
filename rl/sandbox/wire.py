"""Encodes values that cross between a program and its tests; decoding builds exact builtin types and nothing else.

An untrusted program may return an object that is equal to everything. What arrives on the other side is made there,
of None, bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, slice, Fraction,
Decimal, deque and NumPy's arrays alone; a subclass crosses as its base, NumPy's scalars as Python's. Any other object
stays where it is and crosses as a number, and so does a range that a program gives and nobody could count to the end.
Each message is JSON (scalars as they are, the rest as ["name", ...]) behind its length in four bytes.
"""

import importlib
import json
import operator
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

_DEPTH = 150
_PLAIN_INT = 1 << 62
_LONGEST_RANGE = 1 << 16
_HIGHEST_EXPONENT = 1 << 16
"""Of a Decimal: an integer of more digits than that takes long to make."""
_ARRAYS = "biufcUS"
"""Kinds of elements of NumPy's arrays that cross: no objects."""


class MalformedError(ValueError):
    """The other side sent something that is no message, or one that is too long."""


class ClosedError(EOFError):
    """The other side has closed the connection."""


Encoder = Callable[[object], int | None]
"""Gives the number of an object that stays on this side; None refuses it."""


def encode(value: object, refer: Encoder, trusted: bool = False, depth: int = 0) -> Any:
    """A value as JSON. Raises TypeError if it holds what cannot cross, RecursionError if it is nested too deeply.

    Args:
        trusted: it comes from the tests, and may be twice as deep as what a program gives, ranges of any length.
    """
    if depth > (2 * _DEPTH if trusted else _DEPTH):
        raise RecursionError(f"a value is nested more than {_DEPTH} deep")

    def each(values: Any) -> list[Any]:
        return [encode(item, refer, trusted, depth + 1) for item in values]

    match value:
        case None | bool() | str() | float():
            return _scalar(value)
        case int():
            whole = int(value)
            return whole if -_PLAIN_INT < whole < _PLAIN_INT else ["int", hex(whole)]
        case complex():
            return ["complex", value.real, value.imag]
        case bytes() | bytearray():
            return ["bytearray" if isinstance(value, bytearray) else "bytes", bytes(value).hex()]
        case dict():
            return ["dict", each(dict.keys(value)), each(dict.values(value))]
        case list() | tuple() | set() | frozenset() | deque():
            kind = next(name for name, base in _SEQUENCES.items() if isinstance(value, base))
            return [kind, *each(_SEQUENCES[kind].__iter__(value))]
        case range() if trusted or _is_short(value):
            return ["range", *each((value.start, value.stop, value.step))]
        case slice():
            return ["slice", *each((value.start, value.stop, value.step))]
        case Fraction():
            return ["Fraction", *each((value.numerator, value.denominator))]
        case Decimal() if trusted or _is_moderate(value):
            return ["Decimal", Decimal.__str__(value)]
    array = _array(value)
    if array is not None:
        return array if isinstance(array, list) else encode(array[0], refer, trusted, depth + 1)
    number = refer(value)
    if number is None:
        raise TypeError(f"an object of type {type(value).__name__} cannot cross between a program and its tests")
    return ["object", number]


def _array(value: object) -> list[Any] | tuple[Any] | None:
    """An array of NumPy as JSON, a scalar of NumPy as a tuple of Python's, or None for anything else."""
    numpy: Any = sys.modules.get("numpy")
    if isinstance(value, getattr(numpy, "generic", ())):
        return (value.item(),)  # type: ignore[attr-defined]
    if isinstance(value, getattr(numpy, "ndarray", ())) and value.dtype.kind in _ARRAYS:  # type: ignore[attr-defined]
        plain = numpy.array(value, order="C", subok=False)
        return ["ndarray", plain.dtype.str, list(plain.shape), plain.tobytes().hex()]
    return None


def _is_short(value: range) -> bool:
    return abs(value.stop - value.start) <= _LONGEST_RANGE * abs(value.step)


def _is_moderate(value: Decimal) -> bool:
    return abs(value.adjusted()) <= _HIGHEST_EXPONENT


def _scalar(value: bool | str | float | None) -> Any:
    """Of exactly its type."""
    if isinstance(value, str):
        return str.__str__(value) if type(value) is str else "".join(str.__iter__(value))
    return float.__float__(value) if isinstance(value, float) else value


_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}


Finder = Callable[[int], object]
"""Gives the object of a number."""


def decode(item: Any, find: Finder, trusted: bool = False, depth: int = 0) -> Any:
    """The value that `encode` wrote, of exact builtin types. Raises MalformedError for anything else.

    Args:
        trusted: as for `encode`.
    """
    if depth > (2 * _DEPTH if trusted else _DEPTH) + 1:
        raise MalformedError("a value is nested too deeply")
    if item is None or isinstance(item, (bool, int, float, str)):
        return item
    if not isinstance(item, list) or not item or not isinstance(item[0], str):
        raise MalformedError("a value has no known form")
    kind, *parts = item
    try:
        value = _rebuilt(kind, parts, lambda part: decode(part, find, trusted, depth + 1), find)
    except (TypeError, ValueError, ArithmeticError, LookupError, ImportError) as error:
        raise MalformedError(f"a value of type {kind[:20]!r} cannot be rebuilt: {error}"[:200]) from None
    match value:
        case range() if not (trusted or _is_short(value)):
            raise MalformedError("a range is too long")
        case Decimal() if not (trusted or _is_moderate(value)):
            raise MalformedError("a Decimal is too large, or too small")
    return value


def _rebuilt(kind: str, parts: list[Any], inner: Callable[[Any], Any], find: Finder) -> Any:
    match kind:
        case "list" | "tuple" | "set" | "frozenset" | "deque":
            return _SEQUENCES[kind]([inner(part) for part in parts])
        case "dict":
            keys, values = parts
            return dict(zip(map(inner, keys), map(inner, values), strict=True))
        case "int":
            return int(parts[0], 16)
        case "complex":
            return complex(*parts)
        case "bytes":
            return bytes.fromhex(*parts)
        case "bytearray":
            return bytearray.fromhex(*parts)
        case "range":
            return range(*map(inner, parts))
        case "slice":
            return slice(*map(inner, parts))
        case "Fraction":
            numerator, denominator = map(inner, parts)
            return Fraction(operator.index(numerator), operator.index(denominator))
        case "Decimal":
            return Decimal(str(parts[0]))
        case "ndarray":
            return _rebuilt_array(*parts)
        case "object":
            return find(int(parts[0]))
    raise MalformedError(f"{kind[:20]!r} is no type of value")


def _rebuilt_array(elements: str, shape: list[int], content: str) -> Any:
    numpy = importlib.import_module("numpy")
    kind = numpy.dtype(str(elements))
    if kind.kind not in _ARRAYS:
        raise TypeError(f"elements of type {elements[:20]!r}")
    return numpy.frombuffer(bytes.fromhex(content), kind).reshape(shape).copy()


_WRITER = json.JSONEncoder(separators=(",", ":"))
"""Made once: `json.dumps` makes one for each message where separators are given."""


class Channel:
    """Sends and receives messages over a connected socket. Used by one thread at a time."""

    def __init__(
        self, connection: socket.socket, longest: int, look: Callable[[bytes], object] = lambda _: None
    ) -> None:
        """
        Args:
            longest: message that it takes, in bytes.
            look: sees each message before it is read.
        """
        self._connection, self._longest, self._look = connection, longest, look

    def send(self, message: Any) -> None:
        """Sends a message. Raises ClosedError where nobody reads any more."""
        payload = _WRITER.encode(message).encode()
        try:
            self._connection.sendall(struct.pack(">I", len(payload)) + payload)
        except OSError as error:
            raise ClosedError(str(error)) from None

    def receive(self) -> Any:
        """The next message. Raises ClosedError at the end, MalformedError for one that is malformed or too long."""
        (length,) = struct.unpack(">I", self._exactly(4))
        if length > self._longest:
            raise MalformedError(f"a value takes {length} bytes, and {self._longest} are allowed")
        message = self._exactly(length)
        self._look(message)
        try:
            return json.loads(message)
        except (ValueError, RecursionError, MemoryError) as error:
            raise MalformedError(f"a message cannot be read: {error}"[:200]) from None

    def _exactly(self, count: int) -> bytes:
        pieces = bytearray()
        while len(pieces) < count:
            try:
                piece = self._connection.recv(min(count - len(pieces), 1 << 16))
            except OSError as error:
                raise ClosedError(str(error)) from None
            if not piece:
                raise ClosedError("the other side has ended")
            pieces += piece
        return bytes(pieces)
