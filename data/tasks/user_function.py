"""Functions and classes of the user's own, named in a recipe as `module:function` or `path/of/file.py:function`.

A function is called with keyword arguments, and gets those of the offered ones that its signature names.
"""

import hashlib
import inspect
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

LLM_JUDGE = "llm_judge"
"""What stands in the place of a function's name where an LLM judges."""
_FILE = ".py"


class BadFunction(ValueError):
    """A function that a recipe names and that cannot be loaded or called."""


@dataclass(frozen=True)
class FunctionName:
    """The two parts of a function's name."""

    place: str
    """A dotted module, or the path of a file that ends in .py."""
    function: str

    @property
    def is_file(self) -> bool:
        """Whether the place is a file."""
        return self.place.endswith(_FILE)

    def __str__(self) -> str:
        return f"{self.place}:{self.function}"

    def top_level(self, search: Sequence[str]) -> tuple[str, Sequence[str]]:
        """The top-level module that it is in, and the folders to find that in: a file's own, or those of `search`."""
        path = Path(self.place)
        return (path.stem, [str(path.parent)]) if self.is_file else (self.place.partition(".")[0], search)


def function_name(text: str) -> FunctionName | None:
    """The parts of `module:function` or `file.py:function`; None for any other text."""
    place, separator, function = text.rpartition(":")
    is_module = all(part.isidentifier() for part in place.split("."))
    is_place = is_module or (place.endswith(_FILE) and "://" not in place)
    return FunctionName(place, function) if separator and function.isidentifier() and is_place else None


def parse(text: str) -> FunctionName:
    """The parts of a function's name.

    Raises:
        BadFunction: when it is no such name.
    """
    name = function_name(text)
    if name is None:
        raise BadFunction(f"{text!r} names no function: write module:function, or file.py:function")
    return name


def module_search() -> list[str]:
    """The folders in which `module:function` is searched: Python's own, then the working directory."""
    return [*sys.path, str(Path.cwd())]


def load(text: str) -> Callable[..., Any]:
    """Import a function: of a module that is installed or in the working directory, or of a file.

    A file can import the modules beside it.

    Raises:
        BadFunction: says why it cannot be imported.
    """
    name = parse(text)
    try:
        module = _file_module(Path(name.place)) if name.is_file else _module(name.place)
        found = getattr(module, name.function)
    except Exception as error:
        raise BadFunction(f"{text} cannot be loaded ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise BadFunction(f"{text} is {type(found).__name__}, and has to be a function")
    return found


def accepting(function: Callable[..., Any], offered: Sequence[str], text: str) -> Callable[[Mapping[str, Any]], Any]:
    """A function of a mapping, which calls the user's with the arguments that its signature names.

    Args:
        offered: names of the arguments that there are.
        text: the function's name, for errors.

    Raises:
        BadFunction: when it needs an argument that is not offered, or one that has no name.
    """
    names = list[str]()
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            return lambda values: function(**{name: values[name] for name in offered})
        by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if by_name and parameter.name in offered:
            names.append(parameter.name)
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL:
            raise BadFunction(f"{text} takes {parameter.name}, and is called with {', '.join(offered)} by name")
    return lambda values: function(**{name: values[name] for name in names})


def check(text: str, offered: Sequence[str] = ()) -> None:
    """Load a function in a process of its own, as workers will, and check its arguments where some are offered.

    Raises:
        BadFunction: see `load` and `accepting`.
    """
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _check; _check({text!r}, {list(offered)})"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        said = done.stderr.strip().rpartition(f"{BadFunction.__name__}: ")[2]
        raise BadFunction(said or f"{text} cannot be loaded: it ended the process with exit code {done.returncode}")


def _check(text: str, offered: Sequence[str]) -> None:
    function = load(text)
    if offered:
        accepting(function, offered, text)


def _module(name: str) -> ModuleType:
    _search_last(Path.cwd())
    return import_module(name)


def _search_last(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _file_module(path: Path) -> ModuleType:
    """The module of a file, loaded once under a name that no other module has; its folder is searched last."""
    path = path.resolve(strict=True)
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    _search_last(path.parent)
    spec = spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
