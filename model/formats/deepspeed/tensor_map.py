"""Maps logical tensors to the parameters of a DeepSpeed checkpoint, by Hugging Face's names or our own."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lockstep.distributed.checkpoint.tensors import Box, whole
from lockstep.model.config import ModelConfig
from lockstep.model.formats.deepspeed.stored_tensors import BadDeepSpeedFolder, RankTensors
from lockstep.model.formats.huggingface.tensor_names import STORED, Stored
from lockstep.model.weights.names import logical_tensors
from lockstep.model.weights.sharding import parameter_pieces


@dataclass(frozen=True)
class Place:
    """A box of a logical tensor, and the rank, parameter and box where it is stored."""

    box: Box
    rank: int
    """The model-parallel rank that holds it."""
    name: str
    """Of the parameter there."""
    local: Box
    """In the parameter: as large as `box`, after leading dims of one place each in a stack, and in the file's order."""
    transposed: bool = False


Places = dict[str, list[Place]]
"""By logical tensor."""

_OUT = ".attention.out.weight"


def places_of(model: ModelConfig, ranks: Sequence[RankTensors]) -> Places:
    """Locate every logical tensor in what the model-parallel ranks store.

    Raises:
        BadDeepSpeedFolder: when the checkpoint lacks a value of the model, or has one that the model lacks.
    """
    ours = any(name.startswith("blocks.") and name.endswith(_OUT) for name in ranks[0].weights)
    places = _in_lockstep(model, ranks) if ours else _in_huggingface(model, ranks)
    _check(places, model, ranks)
    return places


def _in_lockstep(model: ModelConfig, ranks: Sequence[RankTensors]) -> Places:
    """Of a `Transformer`; model-parallel ranks are counted along the tensor axis first."""
    shapes, degree = logical_tensors(model), _tensor_degree(model, ranks)
    places = defaultdict(list)
    for rank, path in ((rank, path) for rank, here in enumerate(ranks) for path in here.weights):
        try:
            found = [*parameter_pieces(path, model, shapes, (rank % degree, degree))]
        except KeyError as error:
            raise BadDeepSpeedFolder(f"{path} is no parameter of this model: give its own configuration") from error
        for piece in found:
            places[piece.name].append(Place(piece.box, rank, path, piece.local))
    return places


def _tensor_degree(model: ModelConfig, ranks: Sequence[RankTensors]) -> int:
    inputs = next(tensor.shape[1] for here in ranks for name, tensor in here.weights.items() if name.endswith(_OUT))
    return model.heads * model.head_dim // inputs


def _in_huggingface(model: ModelConfig, ranks: Sequence[RankTensors]) -> Places:
    if len(ranks) > 1:
        raise BadDeepSpeedFolder(
            f"the checkpoint has {len(ranks)} model-parallel ranks, and Lockstep's own parameter names are not in it: "
            "only a Transformer of Lockstep can be read in parts"
        )
    return {
        name: [place for place in huggingface_places(name, shape, model) if place.name in ranks[0].weights][:1]
        for name, shape in logical_tensors(model).items()
    }


def huggingface_places(name: str, shape: tuple[int, ...], model: ModelConfig) -> Iterator[Place]:
    """Where a logical tensor may be stored: as in `transformers` 5 first, then as in older versions and bare models."""
    yield from _stacked(name, shape)
    in_files = STORED.get(model.family, Stored)(name)
    in_module = in_files if model.family == "gpt2" else Stored(name)
    for stored in (in_module, in_files, replace(in_files, name=in_files.name.removeprefix("transformer."))):
        yield Place(whole(shape), 0, stored.name, _local(shape, stored), stored.transposed)


def _local(shape: tuple[int, ...], stored: Stored) -> Box:
    *outer, last = shape[::-1] if stored.transposed else shape
    return (*whole(tuple(outer)), (stored.part * last, (stored.part + 1) * last))


_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def _stacked(name: str, shape: tuple[int, ...]) -> Iterator[Place]:
    """In a stack of all experts' matrices, where gate and up are one."""
    if match := _EXPERT.fullmatch(name):
        experts, index, kind = match[1], int(match[2]), match[3]
        rows, columns = shape
        first = rows if kind == "up" else 0
        local = ((index, index + 1), (first, first + rows), (0, columns))
        yield Place(whole(shape), 0, f"{experts}.{'down_proj' if kind == 'down' else 'gate_up_proj'}", local)


_PADDED = ("embedding.weight", "head.weight")
"""Parameters of a `Transformer` that have rows of padding."""


def _check(places: Places, model: ModelConfig, ranks: Sequence[RankTensors]) -> None:
    used: Counter[tuple[int, str]] = Counter()
    for name, shape in logical_tensors(model).items():
        found = places.get(name, ())
        if sum(_volume(box) for box in {place.box for place in found}) != math.prod(shape):
            raise BadDeepSpeedFolder(f"the checkpoint lacks {name}, or a part of it: give the model's own config.json")
        for place in found:
            used[place.rank, place.name] += _volume(place.box) if _fits(place, ranks) else 0
    for rank, here in enumerate(ranks):
        for name, tensor in here.weights.items():
            if used[rank, name] != math.prod(tensor.shape) and not (name in _PADDED and used[rank, name]):
                raise BadDeepSpeedFolder(
                    f"{name} is {list(tensor.shape)} in the checkpoint, which does not fit the configuration: "
                    "give the one that the model was trained with"
                )
            _check_whole(name, here)


def _check_whole(name: str, here: RankTensors) -> None:
    for kind, tensor in here.kinds(name).items():
        if not tensor.is_whole:
            raise BadDeepSpeedFolder(f"the checkpoint has only a part of {name}'s {kind}: take another checkpoint")


def _fits(place: Place, ranks: Sequence[RankTensors]) -> bool:
    shape = ranks[place.rank].weights[place.name].shape
    return len(shape) == len(place.local) and all(b <= n for (_, b), n in zip(place.local, shape, strict=True))


def _volume(box: Box) -> int:
    return math.prod(b - a for a, b in box)
