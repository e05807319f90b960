"""A pretended CUDA device for a torch without CUDA: tensors on `cuda:N` whose memory is the host's.

They are plain tensors, to Python and to C++ alike. torch's CPU build has no kernels for them, so the fallback that is
registered here runs every operation on CPU aliases of their memory: the numbers are those of the CPU. What a GPU would
refuse is refused (tensors of two devices in one operation), and what it would make the host wait for is counted, under
the name of the function that asked for it; so are the bytes that live on each device.

`install` changes torch for the whole process: call it in a process of its own, before anything asks for CUDA.
"""

import collections
import contextlib
import ctypes
import functools
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
_ON_CPU, _ON_CUDA = 1, 2
"""DLPack's numbers of kinds of devices."""

_READ = frozenset(
    [
        "_local_scalar_dense",
        "equal",
        "is_nonzero",
        "nonzero",
        "masked_select",
        "_unique",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "bincount",
        "histc",
        "multinomial",
    ]
)
"""Operations whose kernels for CUDA copy to the host, for a number or for the size of their result."""

_SHARING = ("view", "as_strided", "_reshape_alias", "unfold", "set_")
"""Operations that give a tensor other sizes over the same memory: those of the CPU do so on every device."""

BETWEEN = (
    "torch.",
    "tests.pretended.device",
    "tests.pretended.cuda",
    "deepspeed.accelerator",
    "contextlib",
    "lockstep.distributed.device",
)
"""Modules that ask on behalf of others."""

_capsule = ctypes.pythonapi.PyCapsule_GetPointer
_capsule.restype, _capsule.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_on_cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_libraries: list[torch.library.Library] = []


class MixedDevices(RuntimeError):
    """An operation was given tensors of several devices."""


@dataclass(frozen=True)
class Move:
    """A tensor that was moved from the host to a device."""

    who: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    launched: int
    """Operations that the block had launched before."""


@dataclass
class Watch:
    """What happened within a block; see `watched`."""

    waits: collections.Counter[str] = field(default_factory=collections.Counter)
    """How often the host waited for a device: by who asked, `module.function`, and for what."""
    moved: list[Move] = field(default_factory=list)
    launched: int = 0
    """Operations on devices, those of collectives aside."""


@dataclass
class _State:
    count: int = 1
    guard: Any = None
    live: collections.Counter[int] = field(default_factory=collections.Counter)
    peak: collections.Counter[int] = field(default_factory=collections.Counter)
    watch: Watch | None = None
    lock: Any = field(default_factory=threading.RLock)


state = _State()


def current_device() -> int:
    """Index of this thread's device."""
    return int(state.guard.current_device())


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    """Within this block waits and movements are recorded."""
    watch = state.watch = Watch()
    try:
        yield watch
    finally:
        state.watch = None


def wait(what: str) -> None:
    """The host waits for a device."""
    if state.watch is not None:
        with state.lock:
            state.watch.waits[f"{_asker()}: {what}"] += 1


def _asker() -> str:
    """The innermost function that is none of torch's or of this module, as `module.function`."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(BETWEEN):
            return f"{module.removeprefix('lockstep.')}.{frame.f_code.co_qualname.split('.<locals>')[0]}"
        frame = frame.f_back
    return "autograd"


def _alias(tensor: Tensor, kind: int, index: int) -> Tensor:
    """The same memory as a tensor of another device, which keeps it alive (DLPack's DLManagedTensor)."""
    capsule = torch._C._to_dlpack(tensor)  # type: ignore[attr-defined]
    device = (ctypes.c_int32 * 2).from_address(_capsule(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p))
    device[0], device[1] = kind, index
    return torch._C._from_dlpack(capsule)  # type: ignore[attr-defined, no-any-return]


def on_host(tensor: Tensor) -> Tensor:
    """A CPU tensor over the memory of one of a pretended device."""
    return _alias(tensor, _ON_CPU, 0)


def _on_device(tensor: Tensor, index: int) -> Tensor:
    """A tensor of a pretended device over the memory of a new CPU tensor, whose bytes count as the device's."""
    made = _alias(tensor, _ON_CUDA, index)
    storage = made.untyped_storage()
    _account(index, storage.nbytes())
    weakref.finalize(storage, _account, index, -storage.nbytes()).atexit = False
    return made


def _account(index: int, size: int) -> None:
    with state.lock:
        state.live[index] += size
        state.peak[index] = max(state.peak[index], state.live[index])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(each, change) for each in value)
    return value


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation on tensors of a device, or that makes one there."""
    name = op._schema.name.split("::")[1]
    if name in _SHARING:
        return op.redispatch(_on_cpu, *args, **kwargs)
    index = _device_of(name, args, kwargs)
    if state.watch is not None:
        state.watch.launched += 1
    if name.rstrip("_") in _READ or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        wait(name)
    aliases: dict[int, Tensor] = {}

    def alias(tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor
        # An operation may make room for its result in an empty tensor, and not in memory that it does not own.
        held = on_host(tensor) if tensor.numel() else torch.empty(tensor.shape, dtype=tensor.dtype)
        aliases[id(held)] = tensor
        return held

    given = _mapped(args, alias), {k: _mapped(v, alias) for k, v in kwargs.items()}
    if isinstance(kwargs.get("device"), torch.device):
        given[1]["device"] = CPU
    before = {key: (t.shape, t) for key, t in aliases.items()}
    types = [str(argument.type) for argument in op._schema.arguments]
    if any(kind == "Tensor" and isinstance(value, (int, float)) for kind, value in zip(types, args, strict=False)):
        op = op._overloadpacket  # a number in the place of a tensor, of which torch tells us the value
    found = op(*given[0], **given[1])
    by_id = {id(t): t for t in _tensors(given)}
    for key, (shape, tensor) in before.items():
        if by_id[key].shape != shape:
            tensor.set_(_on_device(by_id[key], index))
    return _mapped(found, lambda t: aliases[id(t)] if id(t) in aliases else _on_device(t, index))


def _device_of(name: str, args: Any, kwargs: Any) -> int:
    """The index of the one device of an operation.

    Raises:
        MixedDevices: when there are several, or a tensor of the CPU that has dims.
    """
    indices = {t.device.index for t in _tensors((args, kwargs)) if t.is_cuda}
    plain = [t for t in _tensors((args, kwargs)) if not t.is_cuda and t.dim()]
    if name.startswith(("index", "_index_put", "_unsafe_index")):  # a GPU takes indices of the host, and copies them
        inside = {id(t) for value in args[1:2] if isinstance(value, (list, tuple)) for t in _tensors(value)}
        for _ in [t for t in plain if id(t) in inside]:
            wait("indices from the host")
        plain = [t for t in plain if id(t) not in inside]
    if len(indices) > 1 or (indices and plain):
        where = sorted(f"cuda:{index}" for index in indices) + [f"cpu {list(t.shape)}" for t in plain]
        raise MixedDevices(f"{name}: tensors are on {', '.join(where)}")
    if indices:
        return int(indices.pop())
    device = kwargs["device"]
    index = current_device() if device.index is None else device.index
    if index >= state.count:
        raise RuntimeError(f"CUDA error: invalid device ordinal: {index} of {state.count}")
    return int(index)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`copy_` within a device, between two, and to and from the host."""
    if target.is_cuda and source.is_cuda:
        on_host(target).copy_(on_host(source))
        return target
    host = source if target.is_cuda else target
    if not (non_blocking and is_pinned(host)):
        wait("copy to the device" if target.is_cuda else "copy to the host")
    if not target.is_cuda:
        target.copy_(on_host(source))
        return target
    if state.watch is not None:
        state.watch.moved.append(Move(_asker(), tuple(source.shape), source.dtype, state.watch.launched))
    on_host(target).copy_(source)
    return target


def _resize(tensor: Tensor, size: Any, *, memory_format: Any = None) -> Tensor:
    """`resize_`: new memory where the old is too small."""
    count = 1
    for length in size:
        count *= length
    if count * tensor.element_size() <= tensor.untyped_storage().nbytes():
        strides = torch.empty(size, device="meta").stride()
        return torch.ops.aten.as_strided_.default.redispatch(_on_cpu, tensor, size, strides)  # type: ignore[no-any-return]
    tensor.set_(torch.empty(size, dtype=tensor.dtype, device=tensor.device))
    return tensor


def _set(tensor: Tensor, source: Tensor) -> Tensor:
    """`set_` to the memory of another tensor."""
    return torch.ops.aten.set_.source_Tensor.redispatch(_on_cpu, tensor, source)  # type: ignore[no-any-return]


def _made(op: Any) -> Any:
    """Makes a tensor of a range at once: torch's own way begins with an empty one, which it resizes."""

    def make(*args: Any, **kwargs: Any) -> Tensor:
        index = _device_of("arange", args, kwargs)
        return _on_device(op(*args, **kwargs | {"device": CPU}), index)

    return make


_pinned: weakref.WeakSet[Any] = weakref.WeakSet()


def pin(tensor: Tensor) -> Tensor:
    """Says that a tensor's memory is page-locked."""
    _pinned.add(tensor.untyped_storage())
    return tensor


def is_pinned(tensor: Tensor, device: Any = None) -> bool:
    """Whether a tensor of the host has page-locked memory."""
    return not tensor.is_cuda and tensor.untyped_storage() in _pinned


def _collective(op: Any) -> Any:
    """A collective operation on a device, which gloo runs on the memory."""

    def run(*args: Any, **kwargs: Any) -> Any:
        _device_of(op._schema.name, args, kwargs)
        given = _mapped(args, on_host), {k: _mapped(v, on_host) for k, v in kwargs.items()}
        back = {id(a): t for a, t in zip(_tensors(given), _tensors((args, kwargs)), strict=True)}
        return _mapped(op(*given[0], **given[1]), lambda t: back.get(id(t), t))

    return run


def compile_guard(folder: Path) -> Path:
    """Compiles `guard.cpp`, with the C++ compiler of the host."""
    library, torch_folder = folder / "guard.so", Path(torch.__file__).parent
    options = [
        "-std=c++20",
        "-shared",
        "-fPIC",
        f"-I{torch_folder / 'include'}",
        f"-L{torch_folder / 'lib'}",
        "-lc10",
        "-ltorch_cpu",
    ]
    source = str(Path(__file__).with_name("guard.cpp"))
    subprocess.run(["c++", source, "-o", str(library), *options], check=True)
    return library


has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key


def made_of_others(name: str) -> bool:
    """Whether torch has a way to run an operation on any device."""
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CUDA")


def install_kernels(devices: int, guard: str) -> None:
    """Gives this process so many devices, to torch's operations."""
    state.count = devices
    warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)  # c10d's, replaced below
    state.guard = ctypes.CDLL(guard)
    state.guard.set_device_count(devices)
    everywhere, aten, c10d = (torch.library.Library(name, "IMPL") for name in ("_", "aten", "c10d"))
    _libraries.extend((everywhere, aten, c10d))
    everywhere.fallback(_kernel, "CUDA")
    for name, op in _operations("aten"):  # which torch would make of others, with other numbers than the CPU's
        if has_kernel(name, "CPU") and not has_kernel(name, "CUDA") and made_of_others(name):
            aten.impl(name.removeprefix("aten::"), functools.partial(_kernel, op), "CUDA")
    del name, op
    aten.impl("copy_", _copy, "CUDA")
    aten.impl("resize_", _resize, "CUDA")
    aten.impl("set_.source_Tensor", _set, "CUDA")
    for name in ("arange", "arange.start", "arange.start_step", "randperm", "randperm.generator", "linspace"):
        packet, _, overload = name.partition(".")
        aten.impl(name, _made(getattr(getattr(torch.ops.aten, packet), overload or "default")), "CUDA")
    for name, op in _operations("c10d"):
        if has_kernel(name, "CUDA"):
            c10d.impl(name.removeprefix("c10d::"), _collective(op), "CUDA", allow_override=True)


def _operations(namespace: str) -> Iterator[tuple[str, Any]]:
    """Names and overloads of all operations."""
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith(f"{namespace}::"):
            packet, _, overload = name.removeprefix(f"{namespace}::").partition(".")
            yield name, getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
