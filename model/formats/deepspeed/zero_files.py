"""Reads the files of a DeepSpeed checkpoint, as each ZeRO stage lays tensors out.

`engine.save_checkpoint` writes for every model-parallel rank the module (`mp_rank_XX_model_states.pt`, or with ZeRO 3
one file for each data rank), and with ZeRO for each data rank `…zero_pp_rank_D_mp_rank_XX_optim_states.pt`, in which
fp32 weights and moments lie flat: cut anywhere by ZeRO 1 and 2, in equal parts of each parameter by ZeRO 3. See
`deepspeed.runtime.engine`, `.zero.stage_1_and_2` and `.zero.stage3` beside it, and `deepspeed.checkpoint`.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lockstep.distributed.checkpoint.file_names import path_inside
from lockstep.model.formats.deepspeed.stored_tensors import (
    BadDeepSpeedFolder,
    FlatTensor,
    RankTensors,
    TensorFile,
    between,
    load,
    param,
)
from lockstep.model.formats.files.extents import checked_tensor

MOMENTS = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum_buffer": "momentum"}
"""Tensors of an optimizer's state, by their names in files, and the kinds that they are."""

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")


def read_folder(folder: Path) -> list[RankTensors]:
    """Read what each model-parallel rank of a checkpoint stores.

    Args:
        folder: the one that has the files, such as `global_step100`.

    Raises:
        BadDeepSpeedFolder: when a file is missing, damaged, or not of a kind that can be read.
    """
    models, optimizers = _files(folder, _MODEL), _files(folder, _OPTIMIZER)
    if not models:
        raise BadDeepSpeedFolder(f"{folder} has no mp_rank_XX_model_states.pt: give what save_checkpoint wrote")
    if (folder / "zero").is_dir():
        return [_universal(folder / "zero", [load(path) for path in models.values()])]
    first = load(models[min(models)])
    _check_all_there(folder, models, optimizers, first)
    return [
        _read_rank(*([load(files[key]) for key in sorted(files) if key[0] == rank] for files in (models, optimizers)))
        for rank in range(first["mp_world_size"])
    ]


def _files(folder: Path, pattern: re.Pattern[str]) -> dict[tuple[int, int], Path]:
    """By model-parallel rank and data rank."""
    found = ((pattern.fullmatch(path.name), path) for path in folder.glob("*.pt"))
    return {(int(match[2]), int(match[1] or 0)): path for match, path in found if match}


def _check_all_there(
    folder: Path, models: Mapping[Any, Path], optimizers: Mapping[Any, Path], said: Mapping[str, Any]
) -> None:
    model, data = said["mp_world_size"], said["dp_world_size"] if said.get("param_shapes") else 0
    parted = models[min(models)].name.startswith("zero")
    wanted = [
        (models, "model", ((m, d) for m in range(model) for d in range(data if parted else 1))),
        (optimizers, "optim", ((m, d) for m in range(model) for d in range(data))),
    ]
    for files, kind, keys in wanted:
        for m, d in keys:
            if (m, d) not in files:
                part = f"model-parallel rank {m}" + (f", data rank {d}" if data else "")
                raise BadDeepSpeedFolder(
                    f"{folder} lacks the *_{kind}_states.pt file of {part}, and the run had {model} such ranks"
                    f"{f' with {data} data ranks each' if data else ''}: gather the files of all machines in one folder"
                )


def _read_rank(models: Sequence[dict[str, Any]], optimizers: Sequence[dict[str, Any]]) -> RankTensors:
    """One model-parallel rank, from its files in the order of data ranks."""
    module = _module(models[0])
    if not optimizers:
        return _without_zero(models[0], module)
    saved = [file["optimizer_state_dict"] for file in optimizers]
    if saved[0].get("zero_stage") == 3:
        return _zero3(models, module, saved)
    return _zero12(models[0], module, saved)


def _module(model: Mapping[str, Any]) -> dict[str, Tensor]:
    """Parameters of the module, empty where ZeRO 3 keeps them elsewhere, without buffers; tied ones once."""
    if not isinstance(model.get("module"), dict):
        raise BadDeepSpeedFolder(
            "the checkpoint keeps its layers apart, as DeepSpeed's PipelineModule writes them, which is not supported: "
            "save the model's state_dict instead"
        )
    ignored = {*(model.get("buffer_names") or ()), *(model.get("shared_params") or ())}
    first: dict[Any, str] = {}
    for name, tensor in model["module"].items():
        if isinstance(tensor, Tensor) and name not in ignored:
            checked_tensor(name, Path("mp_rank_XX_model_states.pt"))
            first.setdefault(tensor.data_ptr() if tensor.numel() else name, name)
    return {name: model["module"][name] for name in first.values()}


def _as_saved(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, FlatTensor]:
    return {name: FlatTensor(tuple(t.shape), [t], t.dtype) for name, t in tensors}


def _zero12(model: Mapping[str, Any], module: dict[str, Tensor], saved: Sequence[Mapping[str, Any]]) -> RankTensors:
    """ZeRO 1 and 2: the parameters of a group follow one another, and each rank has an equal part of that.

    Not by `param_slice_mappings`, which are wrong where `round_robin_gradients` reorders a group.
    """
    result = RankTensors(_as_saved(module.items()), updates=_updates(_group_state(saved[0], 0), model))
    for index, shapes in enumerate(model["param_shapes"]):
        flats = [_flats(_group_state(s, index), s["single_partition_of_fp32_groups"][index]) for s in saved]
        paddings = saved[0]["param_alignment_paddings"][index] if "param_alignment_paddings" in saved[0] else ()
        sizes = [math.prod(shape) for shape in shapes.values()]
        padded = itertools.zip_longest(sizes, paddings, fillvalue=0)
        starts = itertools.accumulate(map(sum, padded), initial=0)
        for (name, shape), size, start in zip(shapes.items(), sizes, starts, strict=False):
            for kind in flats[0]:
                result.add(kind, name, shape, [*between([flat[kind] for flat in flats], start, start + size)])
    return result


def _group_state(saved: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """State of the optimizer for one group of parameters; a list where `elastic_checkpoint` is set."""
    base = saved["base_optimizer_state"]
    return base[index] if isinstance(base, list) else base["state"].get(index, {})


def _flats(state: Mapping[str, Any], fp32: Tensor) -> dict[str, Tensor]:
    """Flat tensors by kind of state."""
    return {"master": fp32} | {kind: state[name] for name, kind in MOMENTS.items() if name in state}


def _zero3(
    models: Sequence[dict[str, Any]], module: dict[str, Tensor], saved: Sequence[Mapping[str, Any]]
) -> RankTensors:
    """ZeRO 3: an equal part of each parameter on every rank, then padding. Weights are the rounded fp32 ones."""
    result = RankTensors(updates=_updates(saved[0]["optimizer_state_dict"]["state"].get(0, {}), models[0]))
    for index, shapes in enumerate(models[0]["param_shapes"]):
        states = [s["optimizer_state_dict"]["state"].get(index, {}) for s in saved]
        flats = [_flats(state, s["fp32_flat_groups"][index]) for state, s in zip(states, saved, strict=True)]
        sizes = [-(-math.prod(shape) // len(saved)) for shape in shapes.values()]
        starts = itertools.accumulate(sizes, initial=0)
        for (name, shape), size, start in zip(shapes.items(), sizes, starts, strict=False):
            for kind in flats[0]:
                result.add(kind, name, shape, [flat[kind].narrow(0, start, size) for flat in flats])
    result.weights = _rounded(result.states["master"], module) | _frozen(models)
    return result


def _rounded(masters: Mapping[str, FlatTensor], module: Mapping[str, Tensor]) -> dict[str, FlatTensor]:
    """fp32 weights in the dtype of the module, whose own tensors are empty."""
    return {name: FlatTensor(tensor.shape, tensor.parts, module[name].dtype) for name, tensor in masters.items()}


def _frozen(models: Sequence[dict[str, Any]]) -> dict[str, FlatTensor]:
    """Parameters that ZeRO 3 has split, and no optimizer updates."""
    shapes = models[0].get("frozen_param_shapes") or {}
    parts = {name: [model["frozen_param_fragments"][name].flatten() for model in models] for name in shapes}
    return {name: FlatTensor(tuple(shape), parts[name], parts[name][0].dtype) for name, shape in shapes.items()}


def _without_zero(model: Mapping[str, Any], module: dict[str, Tensor]) -> RankTensors:
    """The optimizer's own state, by the parameters' numbers; in bf16 and fp16 with fp32 weights beside it."""
    result, optimizer = RankTensors(_as_saved(module.items())), model.get("optimizer") or {}
    inner = optimizer.get("optimizer_state_dict", optimizer)
    if not inner.get("state"):
        return result
    result.updates = _updates(next(iter(inner["state"].values())), model)
    masters = [*itertools.chain.from_iterable(optimizer.get("fp32_groups", ()))]
    for number, name in _numbered(inner, module).items():
        state = inner["state"].get(number, {})
        flats = {kind: state[key] for key, kind in MOMENTS.items() if key in state}
        for kind, tensor in (flats | ({"master": masters[number]} if masters else {})).items():
            result.add(kind, name, module[name].shape, [tensor])
    return result


def _numbered(optimizer: Mapping[str, Any], module: Mapping[str, Tensor]) -> dict[int, str]:
    """Names of the parameters that an optimizer numbers, group by group, each in the order of the module.

    Raises:
        BadDeepSpeedFolder: where tensors of one shape are in two groups, so that nobody can tell which is which.
    """
    shapes = {number: _shape_of(state) for number, state in optimizer["state"].items()}
    groups = [[number for number in group["params"] if number in shapes] for group in optimizer["param_groups"]]
    found: dict[int, str] = {}
    for group in groups:
        inside = {shapes[number] for number in group}
        names = [name for name, tensor in module.items() if tuple(tensor.shape) in inside]
        if [tuple(module[name].shape) for name in names] != [shapes[number] for number in group]:
            raise BadDeepSpeedFolder(
                "the optimizer's state has no names without ZeRO, and its groups do not tell which parameters it "
                "belongs to: save with ZeRO 1, or delete the optimizer's state"
            )
        found |= dict(zip(group, names, strict=True))
    return found


def _shape_of(state: Mapping[str, Any]) -> tuple[int, ...]:
    return next((tuple(state[key].shape) for key in MOMENTS if key in state), ())


def _updates(state: Mapping[str, Any], model: Mapping[str, Any]) -> int:
    """What the optimizer counts, or else the run."""
    return int(state["step"] if "step" in state else model["global_steps"] - model["skipped_steps"])


def _universal(zero: Path, models: Sequence[Mapping[str, Any]]) -> RankTensors:
    """A universal checkpoint: fp32 tensors, each in a file of its own. Weights are the rounded fp32 ones."""
    module = {name: tensor for model in models for name, tensor in _module(model).items()}
    steps = [{"step": load(path)} for path in itertools.islice(zero.glob("*/step.pt"), 1)]
    result = RankTensors(updates=_updates(steps[0] if steps else {}, models[0]))
    shapes = {
        name: shape for model in models for group in model.get("param_shapes", ()) for name, shape in group.items()
    }
    for name in (n for n in module if path_inside(zero, f"{n}/fp32.pt", zero.parent).is_file()):
        found = param(zero / name / "fp32.pt")
        shape = found.shape if found.dim() > 1 else shapes.get(name, found.shape)  # ZeRO 3's are laid flat
        for file, kind in ({"fp32": "master"} | MOMENTS).items():
            path = zero / name / f"{file}.pt"
            if path.is_file():
                result.add(kind, name, shape, [TensorFile(path, math.prod(shape))])
    result.weights = _rounded(result.states["master"], module)
    return result
