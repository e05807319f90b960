"""Proxies of an untrusted program's objects, on which tests operate over a channel to its process."""

import builtins
import re
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NoReturn

from lockstep.rl.sandbox.harness.runs import Runs
from lockstep.rl.sandbox.harness.standard_streams import SHOWN
from lockstep.rl.sandbox.wire import Channel, ClosedError, MalformedError, decode, encode

_HUGE = re.compile(rb'(?<![.\d])\d{7}|\de\+|"int"')
"""In an answer: a number up to which tests may count for ever."""


class ProgramFailed(BaseException):
    """Raised to end the tests when the program has failed; the session remembers it where the tests catch even this."""


class Unusable(BaseException):
    """Raised where the tests pass what cannot cross to the program; remembered likewise."""


class Session:
    """One run of the program and the channel to it; remembers what went wrong."""

    def __init__(self, runs: Runs) -> None:
        ours, theirs = socket.socketpair()
        self._clock = runs.clock
        self._clock.begin()
        self._ended = runs.start([0, 0, 0, theirs.fileno()])
        theirs.close()
        self._channel = Channel(ours, runs.longest, self._look)
        self._remotes: dict[int, Remote] = {}
        self.failure = ""
        self.unusable = ""
        self.calls = 0

    def ready(self) -> str:
        """Waits until the program is loaded; returns why it could not be, or an empty string."""
        try:
            reply = self._channel.receive()
        except MalformedError as error:
            return f"the program answers with what is no value: {error}"
        except ClosedError:
            return f"the program {self._ended() or 'ended'} while it was loaded"
        finally:
            self._clock.end()
        kind, *parts = reply if isinstance(reply, list) and reply else [None]
        return "" if kind == "value" else f"the program raises when it is loaded: {str(parts[-1:])[2:-2][:SHOWN]}"

    def ask(self, operation: str, target: int, *arguments: object) -> Any:
        """Runs an operation in the program's process; returns its result or raises what it raised there."""
        if self.failure:
            raise ProgramFailed
        self.calls += operation == "call"
        parts = [self._encoded(argument) for argument in arguments]
        self._clock.begin()
        try:
            self._channel.send([operation, target, *parts])
            result, raised = self._result(operation, self._channel.receive(), arguments)
        except ClosedError:
            self.fail(f"the program {self._ended() or 'ended'} while the tests called it")
        except (MalformedError, RecursionError, MemoryError) as error:
            self.fail(f"the program answers with what is no value: {error}")
        finally:
            self._clock.end()
        if raised:
            raise raised
        return result

    def fail(self, reason: str) -> NoReturn:
        """Makes the verdict incorrect, whatever the tests do from here on."""
        self.failure = self.failure or reason
        raise ProgramFailed(reason)

    def _encoded(self, argument: object) -> Any:
        try:
            return encode(argument, _number, trusted=True)
        except (TypeError, RecursionError) as error:
            self.unusable = f"the tests pass what cannot cross: {error}"
            raise Unusable from None

    def _result(
        self, operation: str, reply: Any, arguments: tuple[object, ...]
    ) -> tuple[Any, None] | tuple[None, Exception]:
        """What the program answers: a value, or what it raises."""
        match reply:
            case ["value", result, changed]:
                if operation == "call" and changed is not None and result is None:
                    _update(list(arguments), self._decoded(changed))
                return self._decoded(result), None
            case ["raised", str(name), list(parts), str(text)]:
                return None, _exception(name, [self._decoded(part) for part in parts], text, ends=operation == "next")
        raise MalformedError("a message has no known form")

    def _decoded(self, item: Any) -> Any:
        return decode(item, self._remote)

    def _look(self, message: bytes) -> None:
        if _HUGE.search(message):
            self._clock.saw_huge()

    def _remote(self, number: int) -> "Remote":
        return self._remotes.setdefault(number, Remote(self, number))


class Remote:
    """A proxy of an object in the program's process: can be called, read, indexed, iterated. Equal to itself alone."""

    __slots__ = ("_session", "_target")

    def __init__(self, session: Session, target: int) -> None:
        object.__setattr__(self, "_session", session)
        object.__setattr__(self, "_target", target)

    def _ask(self, operation: str, *arguments: object) -> Any:
        session: Session = object.__getattribute__(self, "_session")
        return session.ask(operation, object.__getattribute__(self, "_target"), *arguments)

    def __call__(self, *arguments: object, **named: object) -> Any:
        return self._ask("call", list(arguments), named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"the tests read {name} of an object that stays with the program")
        return self._ask("get", name)

    def __setattr__(self, name: str, value: object) -> None:
        self._ask("set", name, value)

    def __getitem__(self, key: object) -> Any:
        return self._ask("item", key)

    def __iter__(self) -> Iterator[Any]:
        iterator: Iterator[Any] = self._ask("iter")
        return iterator

    def __next__(self) -> Any:
        return self._ask("next")

    def __len__(self) -> int:
        return self._of(int, "len")

    def __bool__(self) -> bool:
        return self._of(bool, "bool")

    def __str__(self) -> str:
        return self._of(str, "str")

    def __repr__(self) -> str:
        return "<an object of the program>"

    def _of(self, kind: type[Any], operation: str) -> Any:
        result = self._ask(operation)
        if type(result) is not kind:
            raise TypeError(f"{operation} of an object of the program gave a {type(result).__name__}")
        return result


_CONTAINERS = (list, dict, set, tuple, bytearray, deque)


def _update(old: Any, new: Any) -> None:
    """Gives mutable arguments the content that they have with the program, in place, level by level."""
    if type(old) is not type(new):
        return
    match old:
        case list() if len(old) == len(new):
            old[:] = [_updated(one, other) for one, other in zip(old, new, strict=True)]
        case list() | bytearray():
            old[:] = new
        case dict():
            merged = {key: _updated(old[key], value) if key in old else value for key, value in new.items()}
            old.clear()
            old.update(merged)
        case set():
            old.clear()
            old.update(new)
        case tuple() if len(old) == len(new):
            for one, other in zip(old, new, strict=True):
                _update(one, other)
        case deque():
            old.clear()
            old.extend(new)
        case _ if hasattr(old, "dtype") and old.shape == new.shape:  # NumPy's
            old[...] = new


def _updated(old: Any, new: Any) -> Any:
    if type(old) is type(new) and (isinstance(old, _CONTAINERS) or hasattr(old, "dtype")):
        _update(old, new)
        return old
    return new


def _number(item: object) -> int | None:
    """By which the program knows an object of its own."""
    return object.__getattribute__(item, "_target") if type(item) is Remote else None


def _exception(name: str, arguments: list[Any], text: str, ends: bool) -> Exception:
    """A new exception of a builtin type; RuntimeError where there is none of that name.

    Args:
        ends: whether it may say that an iterator is at its end. From anything else this would end a loop of the tests
            that makes calls, as one over `map(candidate, inputs)`, before it has looked at an answer.
    """
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return RuntimeError(text)
    if issubclass(kind, (StopIteration, StopAsyncIteration)) and not (ends and kind is StopIteration):
        return RuntimeError(f"the program raised {name}")
    with suppress(TypeError, ValueError):
        return kind(*arguments)
    return RuntimeError(text)
