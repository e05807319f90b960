"""Digests of the data and functions that a run learns from, by their key: a run that resumes needs the same content.

Files are read whole up to a size, and beyond it at evenly spaced places: an index of lengths tells most edits of large
token files, and terabytes are not read at each start.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from lockstep.cluster.own_modules import own_modules
from lockstep.cluster.recipe.paths import functions
from lockstep.cluster.recipe.schema import Recipe
from lockstep.data.corpus.indexed_dataset import beside, prefix
from lockstep.data.row_reader import SUFFIXES
from lockstep.data.tasks.difficulty.pass_rates import counts_file
from lockstep.data.tasks.user_function import module_search, parse

BLOCK, BLOCKS = 1 << 20, 256
"""Bytes of a block, and how many are read of a larger file, the first and the last included."""


def data_digests(recipe: Recipe) -> dict[str, str]:
    """By key, a digest of the content of local files, 32 hex digits.

    Names of generators, of the Hub and of functions that are installed have none.
    """
    sources = ((key, _sources(text)) for key, text in functions(recipe))
    return {key: _digest(files) for key, files in (*_data(recipe), *sources) if files}


def _sources(text: str) -> list[Path]:
    """The files of a function's module, and of the user's modules beside it that it imports."""
    top, search = parse(text).top_level(module_search())
    return list(own_modules([top], search)[0].values())


def _data(recipe: Recipe) -> Iterator[tuple[str, list[Path]]]:
    if recipe.pretrain:
        data, retain = recipe.pretrain.data, recipe.pretrain.retain
        blends = {
            "pretrain.data.blend": data.blend if data else (),
            "pretrain.retain.old": retain.old if retain else (),
        }
        for key, parts in blends.items():
            for number, part in enumerate(parts):
                store = prefix(Path(part.path))
                yield f"{key}[{number}].path", [beside(store, ".idx"), beside(store, ".bin")]
        return
    for number, evaluated in enumerate(recipe.evaluation.tasks):
        yield f"evaluation.tasks[{number}].held_out_from", _rows(evaluated.held_out_from or evaluated.generator)
    for number, task in enumerate(recipe.mixture):
        key = f"tasks[{number}]" if recipe.tasks else "task"
        yield f"{key}.generator", _rows(task.generator)
        yield f"{key}.held_out_from", _rows(task.held_out_from)
        yield f"{key}.pass_rates", _rows(counts_file(task.pass_rates))
    yield "supervised.source", _rows(recipe.supervised.source if recipe.supervised else "")
    yield "preference.source", _rows(recipe.preference.source if recipe.preference else "")


def _rows(name: str) -> list[Path]:
    """The files that hold rows; none where the name is not of a file or folder here."""
    path = Path(name)
    if name and path.is_dir():
        return [p for p in sorted(path.rglob("*")) if p.name.endswith(SUFFIXES) and p.is_file()]
    return [path] if path.is_file() else []


def _digest(files: Iterable[Path]) -> str:
    found = xxhash.xxh3_128()
    for path in files:
        size = path.stat().st_size
        found.update(f"{size}\n".encode())
        with path.open("rb") as file:
            for start in _starts(size):
                file.seek(start)
                found.update(file.read(BLOCK))
    return found.hexdigest()


def _starts(size: int) -> list[int]:
    """Where blocks begin that are read of a file of this size."""
    if size <= BLOCKS * BLOCK:
        return list(range(0, size, BLOCK))
    return [int(start) for start in np.linspace(0, size - BLOCK, BLOCKS, dtype=np.int64)]
