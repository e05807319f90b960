"""The trusted side: holds the tests and decides, beside an untrusted process that holds the program.

Tests of functions run here, and what they call is a `Remote`: arguments go to the program's process, results come back
as plain values (see `values`). Equality, containment and truth of results are therefore those of Python's own types; an
object that cannot cross equals itself alone. The program can neither read a test nor change how it is judged.

Correct means that the tests ran to their end, called the program, and that the program was alive and well formed to the
end; whatever tests swallow, a program that ended, or sent what is no value, is incorrect.
"""

import builtins
import json
import os
import re
import selectors
import socket
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

from lockstep.data.tasks.code_tests import Case, CodeTests
from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.verifiers.values import Channel, ClosedError, MalformedError, decode, encode

Start = Callable[[list[int]], Callable[[], str]]
"""Starts a run of the program with these descriptors (input, output, errors, and a channel for functions); the result
waits for its end and says how that was, empty for exit code 0. Descriptor 0 of the examiner is /dev/null."""

_PIECE = 1 << 16
_SHOWN = 200
"""Characters of a value in a reason."""


@dataclass(frozen=True)
class Observation:
    """What a program printed, and what went wrong with it, as "ended with exit code 1 …"; empty where nothing did."""

    output: str
    problem: str = ""


class _ProgramFailed(BaseException):
    """Ends the tests whatever they catch; the session remembers it where they catch even this."""


class _Unusable(BaseException):
    """The tests ask for what this examiner cannot do; remembered likewise."""


def examine(tests: CodeTests, start: Start, longest: int) -> Verdict:
    """The verdict of all tests on the program that `start` runs; `longest` bounds outputs and values, in bytes."""
    if not tests.program and not tests.cases:
        return Verdict(Outcome.ungradable, "there are no tests: give a program of tests, or cases")
    if tests.program:
        verdict = _examine_functions(tests, start, longest)
        if verdict.outcome is not Outcome.correct:
            return verdict
    for number, case in enumerate(tests.cases, 1):
        if problem := _examine_case(case, start, longest):
            return Verdict(Outcome.incorrect, f"case {number} of {len(tests.cases)}: {problem}")
    return Verdict(Outcome.correct)


class _Session:
    """One run of the program, and what went wrong in it."""

    def __init__(self, start: Start, longest: int) -> None:
        ours, theirs = socket.socketpair()
        self._ended = start([0, 0, 0, theirs.fileno()])
        theirs.close()
        self._channel = Channel(ours, longest)
        self._remotes: dict[int, Remote] = {}
        self.failure = ""
        self.unusable = ""
        self.calls = 0

    def ready(self) -> str:
        """Empty once the program is loaded, else why it is not."""
        try:
            reply = self._channel.receive()
        except MalformedError as error:
            return f"the program answers with what is no value: {error}"
        except ClosedError:
            return f"the program {self._ended() or 'ended'} while it was loaded"
        kind, *parts = reply if isinstance(reply, list) and reply else [None]
        return "" if kind == "value" else f"the program raises when it is loaded: {str(parts[-1:])[2:-2][:_SHOWN]}"

    def ask(self, operation: str, target: int, *arguments: object) -> Any:
        """The result of an operation in the program's process; raises what it raised there."""
        if self.failure:
            raise _ProgramFailed
        self.calls += operation == "call"
        parts = [self._encoded(argument) for argument in arguments]
        try:
            self._channel.send([operation, target, *parts])
            return self._result(self._channel.receive(), arguments if operation == "call" else ())
        except ClosedError:
            self.fail(f"the program {self._ended() or 'ended'} while the tests called it")
        except (MalformedError, RecursionError) as error:
            self.fail(f"the program answers with what is no value: {error}")

    def fail(self, reason: str) -> NoReturn:
        """Makes the verdict incorrect, whatever the tests do from here."""
        self.failure = self.failure or reason
        raise _ProgramFailed(reason)

    def _encoded(self, argument: object) -> Any:
        try:
            return encode(
                argument, lambda item: object.__getattribute__(item, "_target") if type(item) is Remote else None
            )
        except (TypeError, RecursionError) as error:
            self.unusable = f"the tests pass what cannot cross: {error}"
            raise _Unusable from None

    def _result(self, reply: Any, arguments: tuple[object, ...]) -> Any:
        match reply:
            case ["value", result, changed]:
                if changed is not None and result is None:
                    _update(list(arguments), decode(changed, self._remote))
                return decode(result, self._remote)
            case ["raised", str(name), list(parts), str(text)]:
                raise _exception(name, [decode(part, self._remote) for part in parts], text)
        raise MalformedError("a message has no known form")

    def _remote(self, number: int) -> "Remote":
        return self._remotes.setdefault(number, Remote(self, number))


class Remote:
    """What stays with the program: to call, to read from and to go through. It is equal to itself alone."""

    __slots__ = ("_session", "_target")

    def __init__(self, session: _Session, target: int) -> None:
        object.__setattr__(self, "_session", session)
        object.__setattr__(self, "_target", target)

    def _ask(self, operation: str, *arguments: object) -> Any:
        session: _Session = object.__getattribute__(self, "_session")
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
        case _ if hasattr(old, "extend"):
            old.clear()
            old.extend(new)


def _updated(old: Any, new: Any) -> Any:
    if type(old) is type(new) and isinstance(old, (list, dict, set, tuple, bytearray)):
        _update(old, new)
        return old
    return new


def _exception(name: str, arguments: list[Any], text: str) -> Exception:
    """A new exception of a builtin type; RuntimeError where there is none of that name."""
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return RuntimeError(text)
    with suppress(TypeError, ValueError):
        return kind(*arguments)
    return RuntimeError(text)


def _examine_functions(tests: CodeTests, start: Start, longest: int) -> Verdict:
    try:
        code = compile(tests.program, "tests.py", "exec")
    except (SyntaxError, ValueError) as error:
        return Verdict(Outcome.ungradable, f"the tests do not compile: {error}")
    session = _Session(start, longest)
    if problem := session.ready():
        return Verdict(Outcome.incorrect, problem)
    names = _names_of_prefix(tests)
    root = re.split(r"\W", tests.entry_point, maxsplit=1)[0]
    for name in {root} | _free_names(code) - set(names) - set(vars(builtins)) - {""}:
        with suppress(Exception):
            names[name] = session.ask("item", 0, name)
    if root and not isinstance(names.get(root), Remote):
        return Verdict(Outcome.incorrect, f"the program does not define {root}")
    return _judged(session, lambda: _run_tests(code, names, tests.entry_point))


def _names_of_prefix(tests: CodeTests) -> dict[str, Any]:
    """What the data set defines before the completion: HumanEval's tests call helpers that stand there."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    for source in (tests.prefix, tests.prefix + "    pass\n"):
        with suppress(Exception):
            exec(compile(source, "prefix.py", "exec"), module.__dict__)
            break
    return module.__dict__


def _free_names(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*(_free_names(part) for part in inner))


def _run_tests(code: types.CodeType, names: dict[str, Any], entry_point: str) -> None:
    exec(code, names)
    if entry_point and callable(check := names.get("check")) and not isinstance(check, Remote):
        check(_reached(entry_point, names))
    cases = [kind for kind in names.values() if isinstance(kind, type) and issubclass(kind, unittest.TestCase)]
    load = unittest.defaultTestLoader.loadTestsFromTestCase
    result = unittest.TestResult()
    unittest.TestSuite(load(kind) for kind in cases).run(result)
    if problems := result.failures + result.errors:
        raise AssertionError(problems[0][1].strip().splitlines()[-1])


def _reached(entry_point: str, names: dict[str, Any]) -> Any:
    """A function by its name, or a method as in "Solution().twoSum"."""
    first, *attributes = entry_point.split(".")
    found = names[first.removesuffix("()")]
    found = found() if first.endswith("()") else found
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


def _judged(session: _Session, run: Callable[[], None]) -> Verdict:
    """What the end of the tests says. Before the first call an error is the tests' own."""
    try:
        run()
        reason = ""
    except (_ProgramFailed, _Unusable):
        reason = session.failure
    except AssertionError as error:
        reason = f"an assertion failed: {error}"[:_SHOWN].removesuffix(": ")
    except SystemExit as end:
        reason = f"the tests ended with {end.code!r}" if end.code not in (None, 0) else ""
    except BaseException as error:
        reason = f"the tests raised {type(error).__name__}: {error}"[:_SHOWN]
    reason = session.failure or reason
    if session.unusable and not session.failure:
        return Verdict(Outcome.ungradable, session.unusable)
    if session.calls == 0:
        return Verdict(Outcome.ungradable, reason or "the tests never called the program")
    return Verdict(Outcome.incorrect, reason) if reason else Verdict(Outcome.correct)


def observe(stdin: str, start: Start, longest: int) -> Observation:
    """What the program prints when it reads this; it is killed where it prints more than `longest` bytes."""
    pipes = [os.pipe() for _ in range(3)]
    (input_read, input_write), (output_read, output_write), (errors_read, errors_write) = pipes
    ended = start([input_read, output_write, errors_write])
    for descriptor in (input_read, output_write, errors_write):
        os.close(descriptor)
    output, errors = _converse(input_write, stdin.encode(), (output_read, errors_read), longest)
    printed = output.decode(errors="replace")
    if len(output) > longest:
        return Observation(printed, f"printed more than {longest} bytes")
    if problem := ended():
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        return Observation(printed, f"{problem} {''.join(last)}"[:_SHOWN].strip())
    return Observation(printed)


def _examine_case(case: Case, start: Start, longest: int) -> str:
    """Empty if the program prints what the case expects, else what is wrong."""
    seen = observe(case.stdin, start, longest)
    if seen.problem:
        return f"the program {seen.problem}"
    printed = seen.output
    return (
        "" if same_output(printed, case.stdout) else f"printed {printed[:_SHOWN]!r}, expected {case.stdout[:_SHOWN]!r}"
    )


def _converse(stdin: int, text: bytes, outputs: tuple[int, int], longest: int) -> tuple[bytes, bytes]:
    """Writes the input while it reads both outputs, until they close or one is over the longest. Closes all three."""
    collected = {descriptor: bytearray() for descriptor in outputs}
    with selectors.DefaultSelector() as selector:
        os.set_blocking(stdin, False)
        selector.register(stdin, selectors.EVENT_WRITE)
        for descriptor in outputs:
            selector.register(descriptor, selectors.EVENT_READ)
        while set(outputs) & set(selector.get_map()):
            for key, _ in selector.select():
                if key.fd == stdin:
                    text = _written(stdin, text)
                    done = not text
                else:
                    piece = os.read(key.fd, _PIECE)
                    collected[key.fd] += piece
                    done = not piece or len(collected[key.fd]) > longest
                if done:
                    selector.unregister(key.fd)
                    os.close(key.fd)
        for key in list(selector.get_map().values()):
            os.close(key.fd)
    return bytes(collected[outputs[0]]), bytes(collected[outputs[1]])


def _written(stdin: int, text: bytes) -> bytes:
    """What is left to write; nothing if nobody reads."""
    try:
        return text[os.write(stdin, text[:_PIECE]) :] if text else b""
    except BrokenPipeError:
        return b""


def same_output(printed: str, expected: str) -> bool:
    """Equal line by line, but for space around words and at the end; decimals are equal by value, as 1.0 and 1.00."""
    ours, theirs = (text.rstrip().split("\n") for text in (printed, expected))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(ours: str, theirs: str) -> bool:
    one, other = ours.split(), theirs.split()
    return one == other or (len(one) == len(other) and all(map(_same_word, one, other)))


def _same_word(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    with suppress(InvalidOperation):
        return "." in theirs and Decimal(ours) == Decimal(theirs)
    return False


def read_tests(descriptor: int) -> CodeTests | str:
    """The tests that lie in a file, which is closed; or what the program is to read, where it is only to be run."""
    with os.fdopen(descriptor, "rb") as file:
        given = json.loads(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0))
    if isinstance(given, str):
        return given
    return CodeTests(**{**given, "cases": tuple(Case(**case) for case in given["cases"])})
