"""Names that programs of competitive sites use without importing them, as `List` and `heapq`.

LeetCode, and LiveCodeBench in its own grader, put these imports before a program. Here they lie
beneath a program's own names, as builtins do, and never hide a builtin or count as something that it defines.
"""

import _sitebuiltins
import builtins
import importlib
import sys
import types
from typing import Any

_MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json", "typing",
)  # fmt: skip
RECURSION_LIMIT = 50_000
"""LiveCodeBench's; Python's own is 1,000."""
_STREAMS = ("stdin", "stdout", "stderr")


def _names() -> dict[str, Any]:
    """The public names of all modules, the modules, and what the interpreter has with `site`: exit, quit and help."""
    modules = {name: importlib.import_module(name) for name in _MODULES}
    found: dict[str, Any] = {}
    for module in modules.values():
        found |= {name: vars(module)[name] for name in _public(module)}
    for name in _STREAMS:  # opened anew in each process
        del found[name]
    known = {name: value for name, value in found.items() if name not in vars(builtins)}
    ends = {name: _sitebuiltins.Quitter(name, "Ctrl-D") for name in ("exit", "quit")}
    return known | modules | ends | {"help": _sitebuiltins._Helper()}


def _public(module: types.ModuleType) -> list[str]:
    return getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]


NAMES = _names()
"""By name: modules, functions, classes and constants."""


def _builtins() -> types.ModuleType:
    made = types.ModuleType("builtins", builtins.__doc__)
    vars(made).update(NAMES | vars(builtins))
    return made


_BUILTINS = _builtins()


def offer() -> types.ModuleType:
    """Puts a module with these names in the place of `builtins`, for who imports it from here on; returns it.

    Made before any fork: to give them to the module that is there would copy the page of each after a fork, which took
    1 ms of the 13 that a small program takes.
    """
    sys.modules["builtins"] = _BUILTINS
    return _BUILTINS
