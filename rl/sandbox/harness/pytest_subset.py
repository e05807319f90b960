"""The part of pytest that tests of programs use, and its collection of `test…` functions and `Test…` classes.

pytest itself takes longer to import than most tests to run, and wants files. What is here follows its documentation
(approx, raises, fixtures, parametrize, marks); tests that ask for more are `Unsupported`.
"""

import importlib
import inspect
import itertools
import re
import types
import unittest
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any


class Unsupported(Exception):
    """The tests need something of pytest that is not offered here."""


class Skipped(BaseException):
    """Ends a test that says itself that it does not count."""


class Approx:
    """Equal to numbers within a tolerance, and to lists, tuples, dicts and arrays of such: `pytest.approx`."""

    __array_ufunc__ = None  # so that NumPy leaves the comparison to this side
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None, nan_ok: bool = False) -> None:
        self._expected, self._rel, self._abs, self._nan_ok = expected, rel, abs, nan_ok

    def __eq__(self, actual: object) -> bool:
        return self._same(actual, self._expected.tolist() if hasattr(self._expected, "tolist") else self._expected)

    def __repr__(self) -> str:
        return f"approx({self._expected!r})"

    def _same(self, actual: Any, expected: Any) -> bool:
        actual = actual.tolist() if type(actual).__module__ == "numpy" else actual
        if isinstance(expected, Mapping):
            return (
                isinstance(actual, dict)
                and actual.keys() == expected.keys()
                and all(self._same(actual[key], value) for key, value in expected.items())
            )
        if isinstance(expected, (list, tuple)):
            fits = isinstance(actual, (list, tuple)) and len(actual) == len(expected)
            return fits and all(map(self._same, actual, expected))
        if isinstance(expected, bool) or not isinstance(expected, (int, float, complex)) or isinstance(actual, bool):
            return bool(actual == expected)
        return isinstance(actual, (int, float, complex)) and self._near(actual, expected)

    def _near(self, actual: complex, expected: complex) -> bool:
        if actual == expected:
            return True
        if actual != actual or expected != expected:
            return self._nan_ok and actual != actual and expected != expected
        if abs(expected) == float("inf"):
            return False
        absolute = 1e-12 if self._abs is None else self._abs
        relative = (
            0.0
            if self._rel is None and self._abs is not None
            else abs(expected) * (1e-6 if self._rel is None else self._rel)
        )
        return abs(actual - expected) <= max(absolute, relative)


class _Raised:
    """What `pytest.raises` gives: the exception, once it was raised."""

    value: BaseException

    @property
    def type(self) -> type[BaseException]:
        return self.value.__class__

    def match(self, pattern: str) -> bool:
        assert re.search(pattern, str(self.value)), f"{pattern!r} is not in {str(self.value)!r}"
        return True


def raises(kind: Any, *call: Any, match: str | None = None, **named: Any) -> Any:
    """A context in which an exception of this kind must be raised, or that for a call of a function."""
    if not call:
        return _raising(kind, match)
    with _raising(kind, match) as raised:
        call[0](*call[1:], **named)
    return raised


@contextmanager
def _raising(kind: Any, match: str | None) -> Iterator[_Raised]:
    raised = _Raised()
    try:
        yield raised
    except kind as error:
        raised.value = error
        if match is not None:
            raised.match(match)
    else:
        raise AssertionError(f"did not raise {kind}")


def fail(reason: str = "", pytrace: bool = True) -> None:
    """Ends a test that has failed."""
    raise AssertionError(reason)


def skip(reason: str = "", **_: object) -> None:
    """Ends a test that does not count."""
    raise Skipped(reason)


@dataclass(frozen=True)
class _Parameters:
    """One set of arguments of `parametrize`."""

    values: tuple[Any, ...]


def param(*values: Any, id: str | None = None, marks: object = ()) -> _Parameters:
    """A set of arguments that has a name or marks."""
    return _Parameters(values)


class _Marks:
    """`pytest.mark`: parametrize and skip mean something, other marks nothing here."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def mark(*arguments: Any, **named: Any) -> Any:
            return arguments[0] if arguments and inspect.isfunction(arguments[0]) else lambda marked: marked

        return mark

    def parametrize(self, names: str | Iterable[str], sets: Iterable[Any], **_: object) -> Callable[[Any], Any]:
        """Runs a test once for each set of arguments; several of these run it for each combination."""
        each = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)

        def mark(function: Any) -> Any:
            cases = [dict(zip(each, _set(one, len(each)), strict=True)) for one in sets]
            function.parameter_sets = [cases, *getattr(function, "parameter_sets", [])]
            return function

        return mark

    def skip(self, *given: Any, **_: object) -> Any:
        """A test that does not count."""

        def mark(function: Any) -> Any:
            function.skipped = True
            return function

        return mark(given[0]) if given and callable(given[0]) else mark

    def skipif(self, condition: object, **_: object) -> Callable[[Any], Any]:
        """A test that does not count where the condition is true."""
        return self.skip() if condition else lambda function: function


def _set(one: Any, count: int) -> tuple[Any, ...]:
    if isinstance(one, _Parameters):
        return one.values
    return tuple(one) if count > 1 else (one,)


def fixture(function: Any = None, **settings: Any) -> Any:
    """A function whose result tests get as the argument of its name."""

    def mark(function: Any) -> Any:
        if settings.get("params"):
            raise Unsupported("the tests have a fixture with params, which is not offered")
        function.fixture_name, function.autouse = settings.get("name") or function.__name__, settings.get("autouse")
        return function

    return mark if function is None else mark(function)


def module(names: dict[str, Any]) -> types.ModuleType:
    """The module `pytest` as tests import it; `pytest.main()` runs what stands in `names`."""
    made = types.ModuleType("pytest")
    made.__dict__.update(
        approx=Approx, raises=raises, fail=fail, skip=skip, param=param, mark=_Marks(), fixture=fixture
    )

    def main(*_: object, **__: object) -> int:
        run(names, names["__file__"], spared=set())
        return 0

    made.__dict__.update(main=main, importorskip=importlib.import_module)
    return made


@dataclass
class _Test:
    """A collected function: with which arguments and in which instance it runs."""

    function: Any
    owner: Any = None
    arguments: dict[str, Any] = field(default_factory=dict)


def run(names: dict[str, Any], file: str, spared: set[str], candidate: Any = None) -> None:
    """Runs the tests among `names` that were defined in `file` and are not spared; raises what one of them raises.

    Args:
        candidate: what tests get that have an argument of this name, as HumanEval's have.
    """
    own = {name: value for name, value in names.items() if _is_from(value, file)}
    fixtures = {value.fixture_name: value for value in own.values() if hasattr(value, "fixture_name")}
    tests = [test for name, value in own.items() if name not in spared for test in _collected(name, value)]
    for test in tests:
        _check_arguments(test, fixtures, candidate)
    for test in tests:
        with ExitStack() as stack:
            try:
                _run_test(test, fixtures, candidate, stack)
            except Skipped:
                continue


def _is_from(value: Any, file: str) -> bool:
    """Whether a function or class was defined by the tests, and is neither imported nor the program's."""
    if isinstance(value, type):
        return value.__module__ == "__main__" and not issubclass(value, unittest.TestCase)
    return isinstance(value, types.FunctionType) and value.__code__.co_filename == file


def _collected(name: str, value: Any) -> Iterator[_Test]:
    if getattr(value, "skipped", False) or hasattr(value, "fixture_name"):
        return
    if isinstance(value, type) and name.startswith("Test") and "__init__" not in vars(value):
        for method in [one for one in dir(value) if one.startswith("test")]:
            yield from _combined(getattr(value, method), value)
    elif isinstance(value, types.FunctionType) and name.startswith("test"):
        yield from _combined(value, None)


def _combined(function: Any, owner: type | None) -> Iterator[_Test]:
    """A test for each combination of its sets of arguments."""
    if getattr(function, "skipped", False):
        return
    sets = [*getattr(owner, "parameter_sets", []), *getattr(function, "parameter_sets", [])]
    for combination in itertools.product(*sets):
        arguments = {name: value for one in combination for name, value in one.items()}
        yield _Test(function, owner, arguments)


def _needed(function: Any, test: _Test) -> list[str]:
    """Names of arguments that are still to be given."""
    given = list(inspect.signature(function).parameters.values())[
        1 if test.owner and function is test.function else 0 :
    ]
    return [one.name for one in given if one.default is one.empty and one.name not in test.arguments]


def _check_arguments(test: _Test, fixtures: dict[str, Any], candidate: Any) -> None:
    for name in _needed(test.function, test):
        if name not in fixtures and not (name == "candidate" and candidate is not None):
            raise Unsupported(f"the tests need pytest's fixture {name!r}, which is not offered")


def _run_test(test: _Test, fixtures: dict[str, Any], candidate: Any, stack: ExitStack) -> None:
    made: dict[str, Any] = {"candidate": candidate}

    def value_of(name: str) -> Any:
        if name not in made:
            made[name] = _made(fixtures[name], {one: value_of(one) for one in _needed(fixtures[name], test)}, stack)
        return made[name]

    for name in [name for name, one in fixtures.items() if one.autouse]:
        value_of(name)
    arguments = test.arguments | {name: value_of(name) for name in _needed(test.function, test)}
    if test.owner is None:
        test.function(**arguments)
        return
    instance = test.owner()
    for name in ("setup_class", "setup_method"):
        _set_up(instance, name)
    stack.callback(_set_up, instance, "teardown_method")
    test.function(instance, **arguments)


def _made(function: Any, arguments: dict[str, Any], stack: ExitStack) -> Any:
    """What a fixture gives; what stands behind its `yield` runs when the test has ended."""
    if inspect.isgeneratorfunction(function):
        return stack.enter_context(contextmanager(function)(**arguments))
    return function(**arguments)


def _set_up(instance: Any, name: str) -> None:
    """Calls a method that prepares a test, with the test's place if it wants one."""
    if method := getattr(instance, name, None):
        method(*[None] * len(inspect.signature(method).parameters))
