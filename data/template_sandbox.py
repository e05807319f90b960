"""A Jinja sandbox for chat templates that bounds the work of a rendering: loops, calls and the sizes of texts.

Templates come with models, from anybody. Jinja's sandbox keeps them from Python's internals, but not from looping for
ever or from building a text that fills the memory. Here every iteration, call and character is charged to a budget.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextvars import ContextVar
from functools import wraps
from math import prod
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

BUDGET = 5_000_000
"""Iterations of one rendering at most; calls and texts cost as many as take about as long."""
LONGEST = 1 << 25
"""Characters of a text that a template builds, or items of a list, at most."""
_CHARACTERS, _CALL, _BITS = 64, 16, 1 << 14
"""Characters that cost as much as an iteration, iterations that cost as much as a call, bits of a number at most."""
_WIDTH = re.compile(r"\d{6}|\*|:[^{}]*\{[^}]*[.\[]")
"""A width in a format string that is too large, or comes from an argument by `*` or out of an object."""
_GROWING = {"batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "pprint", "replace"} | {
    "rjust",
    "round",
    "slice",
    "tojson",
    "truncate",
    "urlize",
    "wordwrap",
    "xmlattr",
    "zfill",
}
"""Filters and methods of texts whose result may be much larger than their arguments."""

_spent: ContextVar[list[int]] = ContextVar("spent")


class TooMuchWork(jinja2.TemplateRuntimeError):
    """A rendering that takes too many steps, or builds too large a text."""


def begin() -> None:
    """Start the budget of a rendering anew, for this thread."""
    _spent.set([0])


def _charge(cost: int) -> None:
    spent = _spent.get()
    spent[0] += cost
    if spent[0] > BUDGET:
        raise TooMuchWork(f"it takes more than {BUDGET} steps")


def _allow(size: int) -> None:
    if size > LONGEST:
        raise TooMuchWork(f"it builds a text or a list of more than {LONGEST} characters or items")
    _charge(1 + size // _CHARACTERS)


def _size(value: object) -> int:
    return len(value) if isinstance(value, Sized) else 1


def _check(name: str, value: object, options: Sequence[object]) -> None:
    """Bound what a function may make of a value: its size times that of the largest option, and times numbers."""
    sizes = [_size(value), *map(_size, options)]
    _charge(_CALL + sum(sizes) // 8)
    if name not in _GROWING:
        return
    numbers = [abs(each) for each in options if isinstance(each, int)]
    if max(numbers, default=0) > MAX_RANGE or prod((*sorted(sizes)[-2:], *numbers)) > LONGEST * _CHARACTERS:
        raise TooMuchWork(f"it calls {name!r} with arguments that are too large")
    if name.startswith("format") and _WIDTH.search(str(value)):
        raise TooMuchWork("it formats with a width that is too large")


def _bounded(name: str, filtered: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are bounded; wraps keeps the attributes by which Jinja passes its context."""
    first = 1 if hasattr(filtered, "jinja_pass_arg") else 0

    @wraps(filtered)
    def call(*args: Any, **kwargs: Any) -> Any:
        _check(name, args[first], (*args[first + 1 :], *kwargs.values()))
        found = filtered(*args, **kwargs)
        if isinstance(found, str | list):
            _allow(len(found))
        return found

    return call


def _counted(values: Iterable[Any]) -> Iterable[Any]:
    return values if isinstance(values, Undefined) else _Counted(values)


class _Counted:
    """What a loop iterates over: each item is charged. It has a length where the values have one."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            _charge(1)
            yield value

    def __len__(self) -> int:
        if not isinstance(self._values, Sized):
            raise TypeError("the values of this loop have no length")
        return len(self._values)


def _joined(values: Sequence[Any]) -> str:
    texts = [str(value) for value in values]
    _allow(sum(map(len, texts)))
    return "".join(texts)


class _Charging(NodeTransformer):
    """Has every loop and every `~` of a template charged."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "concatenated", [], [], None, None, lineno=node.lineno)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with the work of a rendering bounded; `begin` starts each."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        """
        Args:
            options: those of `jinja2.Environment`.
        """
        super().__init__(**options)
        self.globals.pop("lipsum")  # writes any number of paragraphs
        self.filters = {name: _bounded(name, each) for name, each in self.filters.items()}
        self.filters |= {"counted": _counted, "concatenated": _joined}

    def bound(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter, bounded as all are."""
        self.filters[name] = _bounded(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Charging().visit(super()._parse(source, name, filename))
        return tree

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join what a block, a macro or the template wrote."""
        return _joined(list(pieces))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function of a template, which may be a method of a text."""
        owner, given = getattr(__obj, "__self__", None), (*args, *kwargs.values())
        _check(__obj.__name__ if isinstance(owner, str) else "", owner if isinstance(owner, str) else 0, given)
        found = super().call(__context, __obj, *args, **kwargs)
        if isinstance(found, str):
            _allow(len(found))
        return found

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's own `format` of a text, with widths that are not too large."""
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            named = [each for arg in args if isinstance(arg, Mapping) for each in arg.values()]
            _check("format", value.__self__, (*args, *named, *kwargs.values()))
            return formatted(*args, **kwargs)

        return bounded

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `+`, `*`, `**` or `%` where the result is not too large."""
        if operator == "%" and isinstance(left, str):
            _check("format", left, right if isinstance(right, tuple) else (right,))
        elif operator == "**":
            _allow_bits(_bits(left) * (abs(right) if isinstance(right, int) else 1))
        elif operator == "*":
            _allow(_repeated(left, right))
            _allow_bits(_bits(left) + _bits(right))
        elif isinstance(left, str | list | tuple):
            _allow(len(left) + _size(right))
        return super().call_binop(context, operator, left, right)


def _bits(value: object) -> int:
    return value.bit_length() if isinstance(value, int) else 1


def _allow_bits(bits: int) -> None:
    if bits > _BITS:
        raise TooMuchWork(f"it computes a number of more than {_BITS} bits")
    _charge(1)


def _repeated(left: Any, right: Any) -> int:
    """Characters or items of a product of a text or a list and a number."""
    for many, times in ((left, right), (right, left)):
        if isinstance(many, str | list | tuple):
            return len(many) * max(0, times) if isinstance(times, int) else 0
    return 0
