"""The untrusted side of a sandbox: runs a program and answers calls of its functions. No other side trusts it.

The process knows the program and the arguments of each call, and never a test, an expected value or the way by which
verdicts leave. A program that tampers with this module changes what it answers, which it can do by returning it.
"""

import ast
import atexit
import builtins
import io
import json
import operator
import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lockstep.data.tasks.code_tests import tested_name
from lockstep.rl.sandbox import preamble
from lockstep.rl.sandbox.wire import Channel, decode, encode

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, arguments, named: function(*arguments, **named),
    "get": getattr,
    "set": setattr,
    "item": operator.getitem,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
}


def assembled(prefix: str, completion: str, entry_point: str) -> str:
    """The source to run: prefix and completion, or the completion alone if it is whole and the prefix cannot parse."""
    name = tested_name(entry_point)
    if not name or name not in _defined(completion):
        return prefix + completion
    return f"{prefix}\n{completion}" if _defined(prefix) is not _UNREADABLE else completion


_UNREADABLE: frozenset[str] = frozenset({"\0"})


def _defined(source: str) -> frozenset[str]:
    """Names of functions and classes, and of plain assignments, at the top of a source."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _UNREADABLE
    named = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return frozenset(named + [target.id for target in targets if isinstance(target, ast.Name)])


def run_whole(source: str) -> int:
    """Runs a program that reads standard input and prints; returns its exit code."""
    _open_streams()
    code = _exit_code(source)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.__stdout__, sys.stderr):
        if stream is not None:
            with suppress(Exception):
                stream.flush()
    return code


def _exit_code(source: str) -> int:
    try:
        _execute(source, _module("__main__"))
    except SystemExit as end:
        return exit_code(end)
    except BaseException:
        traceback.print_exc(limit=-1)
        return 1
    return 0


def exit_code(end: SystemExit) -> int:
    """The exit code of a SystemExit, as the interpreter computes it."""
    if isinstance(end.code, (int, type(None))):
        return (end.code or 0) & 0xFF
    print(end.code, file=sys.stderr)
    return 1


def _open_streams() -> None:
    """New ones, since those that were opened before the fork took the files behind them for something else."""
    files = [io.FileIO(number, mode, closefd=False) for number, mode in enumerate(("r", "w", "w"))]
    buffers = io.BufferedReader(files[0]), io.BufferedWriter(files[1]), io.BufferedWriter(files[2])
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(buffer, encoding="utf-8", errors="surrogateescape") for buffer in buffers
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]


def run_functions(source: str, channel: Channel) -> None:
    """Loads a program, reports that, and answers requests to its objects until the tests have ended."""
    try:
        module = _module("program")
        _execute(source, module)
    except Exception as error:
        channel.send(_raised(error))
        return
    service = _Service(module)
    channel.send(["value", None, None])
    while True:
        channel.send(service.answer(channel.receive()))


def _execute(source: str, module: dict[str, Any]) -> None:
    """Runs a program as judges of competitive sites do: with their imports, deep recursion and long integers."""
    code = compile(source, "program.py", "exec")
    module["__builtins__"] = preamble.offer()
    sys.setrecursionlimit(preamble.RECURSION_LIMIT)
    sys.set_int_max_str_digits(0)
    exec(code, module)


def _module(name: str) -> dict[str, Any]:
    """The names of a new module, which pickle and dataclasses find by its name."""
    module = type(sys)(name)
    sys.modules[name] = module
    return module.__dict__


class _Service:
    """The program's objects, numbered as they are first spoken of; number 0 is the dict of its names."""

    def __init__(self, module: dict[str, Any]) -> None:
        self._objects: list[object] = [module]
        self._numbers = {id(module): 0}

    def answer(self, request: Any) -> list[Any]:
        """["value", result, changed arguments or None], or ["raised", builtin type, arguments, text]."""
        operation, target, *rest = request
        try:
            arguments = [decode(part, self._objects.__getitem__, trusted=True) for part in rest]
            result = _OPERATIONS[operation](self._objects[target], *arguments)
            changed = self._encoded(arguments) if operation == "call" and result is None else None
            return ["value", self._encoded(result), changed]
        except Exception as error:
            return _raised(error)

    def _encoded(self, value: object) -> Any:
        return encode(value, self._number)

    def _number(self, value: object) -> int:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return self._numbers[id(value)]


def _raised(error: Exception) -> list[Any]:
    """An exception as the first builtin type among its bases, with those of its arguments that are plain values."""
    base = next(base for base in type(error).__mro__ if vars(builtins).get(base.__name__) is base)
    arguments = [part for part in error.args if type(part) in (str, int, float, bool, type(None))]
    text = ""
    with suppress(Exception):
        text = f"{type(error).__name__}: {error}"[:500]
    return ["raised", base.__name__, [encode(part, lambda _: None) for part in arguments], text]


def load(descriptor: int) -> str:
    """Reads the program in a file descriptor, which is closed; returns the source to run."""
    with os.fdopen(descriptor, "rb") as file:
        given = json.loads(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0))
    return assembled(given["prefix"], given["completion"], given["entry_point"])
