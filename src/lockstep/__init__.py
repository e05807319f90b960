"""Lockstep: language models trained with the same numbers in any layout.

`train` and `submit` run recipes, and `load` opens a checkpoint to generate text; they are imported when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lockstep.cluster.api import submit, train
    from lockstep.cluster.language_model import LanguageModel, load

__version__ = "0.1.0"
__all__ = ["LanguageModel", "load", "submit", "train"]
_MODULES = {"train": "api", "submit": "api", "load": "language_model", "LanguageModel": "language_model"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"lockstep.cluster.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'lockstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
