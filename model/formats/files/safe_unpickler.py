"""Unpickles files from elsewhere with a list of allowed classes, because a pickle can call any function."""

import enum
import importlib
import io
import pickle
from collections.abc import Callable, Mapping
from typing import IO, Any

import torch

_PLAIN = {"argparse": "Namespace", "types": "SimpleNamespace", "pathlib": "PosixPath", "signal": "Signals"}
"""By module: classes that may stand beside tensors in a file of `torch.save`."""

_GETATTR = "builtins.getattr"
"""What Python 3.11 before 3.11.4 writes where a pickle has a member of an enumeration; `_member` stands in for it."""


class UnreadFile(ValueError):
    """A file that is damaged, or holds a class that is not allowed."""


class _Foreign(Exception):
    """A class that is not allowed."""


def load_torch(content: bytes, what: str) -> Any:
    """Load bytes of `torch.save`: tensors, containers, namespaces, and enumerations of megatron-core.

    Args:
        what: name of the file, for the error.

    Raises:
        UnreadFile: names the class that was in the way, or says that the file is damaged.
    """

    def load() -> Any:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
        known: list[Any] = [(_member, name) if name == _GETATTR else _known_class(name) for name in names]
        with torch.serialization.safe_globals(known):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    return _guarded(load, what)


def load_pickle(file: IO[bytes], listed: Mapping[str, tuple[str, ...]], what: str) -> Any:
    """Unpickle classes that are `listed` by module, and torch's dtypes.

    Raises:
        UnreadFile: as `load_torch`.
    """
    return _guarded(_Restricted(file, listed).load, what)


class _Restricted(pickle._Unpickler):
    """In Python: for a memo's number, that in C allocates as much memory as the number says."""

    def __init__(self, file: IO[bytes], listed: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__(file)
        self._listed = listed

    def find_class(self, module: str, name: str) -> Any:
        if name in self._listed.get(module, ()):
            return super().find_class(module, name)
        if f"{module}.{name}" == _GETATTR:
            return _member
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _Foreign(f"{module}.{name}")


def _member(kind: object, name: str) -> enum.Enum:
    """A member of an enumeration by its name, and no other attribute of anything."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__):
        raise _Foreign(f"{_GETATTR}({kind!r}, {name!r})")
    return kind[name]


def _known_class(path: str) -> type:
    module, _, name = path.rpartition(".")
    if _PLAIN.get(module) == name:
        return getattr(importlib.import_module(module), name)
    found = _enumeration(module, name) if module.startswith("megatron.core.") else None
    if found is None:
        raise _Foreign(path)
    return found


def _enumeration(module: str, name: str) -> type | None:
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and issubclass(found, enum.Enum) else None


def _guarded(load: Callable[[], Any], what: str) -> Any:
    try:
        return load()
    except _Foreign as error:
        held = " ".join(str(error).split())
        raise UnreadFile(f"{what} is not read: it holds {held}, which is not on the list of what may be") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UnreadFile(f"{what} is damaged ({type(error).__name__}): copy it again") from error
