"""Encodes values that cross between a program and its tests; decoding builds exact builtin types and nothing else.

An untrusted program may return an object that is equal to everything. What arrives on the other side is made there,
of None, bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, slice, Fraction,
Decimal and deque alone; a subclass crosses as its base. Any other object stays where it is and crosses as a number.
Each message is JSON (scalars as they are, the rest as ["name", ...]) behind its length in four bytes.
"""

import json
import operator
import socket
import struct
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

_DEPTH = 150
_PLAIN_INT = 1 << 62


class MalformedError(ValueError):
    """The other side sent something that is no message, or one that is too long."""


class ClosedError(EOFError):
    """The other side has closed the connection."""


Encoder = Callable[[object], int | None]
"""Gives the number of an object that stays on this side; None refuses it."""


def encode(value: object, refer: Encoder, depth: int = 0) -> Any:
    """A value as JSON. Raises TypeError if it holds what cannot cross, RecursionError if it is nested too deeply."""
    if depth > _DEPTH:
        raise RecursionError(f"a value is nested more than {_DEPTH} deep")

    def each(values: Any) -> list[Any]:
        return [encode(item, refer, depth + 1) for item in values]

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
        case range() | slice():
            return [type(value).__name__, *each((value.start, value.stop, value.step))]
        case Fraction():
            return ["Fraction", *each((value.numerator, value.denominator))]
        case Decimal():
            return ["Decimal", Decimal.__str__(value)]
    number = refer(value)
    if number is None:
        raise TypeError(f"an object of type {type(value).__name__} cannot cross between a program and its tests")
    return ["object", number]


def _scalar(value: bool | str | float | None) -> Any:
    """Of exactly its type."""
    if isinstance(value, str):
        return str.__str__(value) if type(value) is str else "".join(str.__iter__(value))
    return float.__float__(value) if isinstance(value, float) else value


_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}


def decode(item: Any, find: Callable[[int], object], depth: int = 0) -> Any:
    """The value that `encode` wrote, of exact builtin types. Raises MalformedError for anything else."""
    if depth > _DEPTH + 1:
        raise MalformedError("a value is nested too deeply")
    if item is None or isinstance(item, (bool, int, float, str)):
        return item
    if not isinstance(item, list) or not item or not isinstance(item[0], str):
        raise MalformedError("a value has no known form")
    kind, *parts = item
    try:
        return _rebuilt(kind, parts, lambda part: decode(part, find, depth + 1), find)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise MalformedError(f"a value of type {kind[:20]!r} cannot be rebuilt: {error}"[:200]) from None


def _rebuilt(kind: str, parts: list[Any], inner: Callable[[Any], Any], find: Callable[[int], object]) -> Any:
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
        case "object":
            return find(int(parts[0]))
    raise MalformedError(f"{kind[:20]!r} is no type of value")


class Channel:
    """Sends and receives messages over a connected socket. Used by one thread at a time."""

    def __init__(self, connection: socket.socket, longest: int) -> None:
        self._connection, self._longest = connection, longest

    def send(self, message: Any) -> None:
        """Sends a message. Raises ClosedError where nobody reads any more."""
        payload = json.dumps(message, separators=(",", ":")).encode()
        try:
            self._connection.sendall(struct.pack(">I", len(payload)) + payload)
        except OSError as error:
            raise ClosedError(str(error)) from None

    def receive(self) -> Any:
        """The next message. Raises ClosedError at the end, MalformedError for one that is malformed or too long."""
        (length,) = struct.unpack(">I", self._exactly(4))
        if length > self._longest:
            raise MalformedError(f"a value takes {length} bytes, and {self._longest} are allowed")
        try:
            return json.loads(self._exactly(length))
        except (ValueError, RecursionError) as error:
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
