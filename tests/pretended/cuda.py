"""What `torch.cuda` answers on the pretended device of `tests.pretended.device`, and what else Python asks torch."""

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.pretended import device
from tests.pretended.device import state, wait


class Stream:
    """A stream; all work is done when it is asked for."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cuda", _index(device))

    def wait_stream(self, stream: "Stream") -> None:
        """Nothing is left to wait for."""

    def wait_event(self, event: "Event") -> None:
        """Nothing is left to wait for."""

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        wait("stream")


class Event:
    """A mark in a stream."""

    def __init__(self, **_: Any) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        """Nothing is left to wait for."""

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing is left to wait for."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 0.0

    def synchronize(self) -> None:
        wait("event")


def _index(given: Any = None) -> int:
    """The index of a device, as torch.cuda's functions take one.

    Raises:
        RuntimeError: when this process has no such device.
    """
    if given is None:
        return device.current_device()
    index = given if isinstance(given, int) else torch.device(given).index
    index = device.current_device() if index is None else index
    if not 0 <= index < state.count:
        raise RuntimeError(f"CUDA error: invalid device ordinal: {index} of {state.count}")
    return index


def set_device(given: Any) -> None:
    """Sets this thread's device."""
    state.guard.set_device(_index(given))


@contextlib.contextmanager
def _device(given: Any) -> Any:
    before = device.current_device()
    set_device(given)
    try:
        yield
    finally:
        set_device(before)


def _properties(given: Any = None) -> types.SimpleNamespace:
    _index(given)
    return types.SimpleNamespace(name="pretended", major=9, minor=0, total_memory=1 << 34, multi_processor_count=1)


def _reset_peak(given: Any = None) -> None:
    state.peak[_index(given)] = state.live[_index(given)]


_ANSWERS: dict[str, Callable[..., Any]] = {
    "_lazy_init": lambda: None,
    "_lazy_call": lambda call, **_: call(),
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: state.count,
    "current_device": device.current_device,
    "set_device": set_device,
    "device": _device,
    "synchronize": lambda device=None: wait("synchronize"),
    "Stream": Stream,
    "Event": Event,
    "stream": lambda stream: contextlib.nullcontext(),
    "set_stream": lambda stream: None,
    "current_stream": Stream,
    "default_stream": Stream,
    "empty_cache": lambda: None,
    "ipc_collect": lambda: None,
    "memory_allocated": lambda device=None: state.live[_index(device)],
    "max_memory_allocated": lambda device=None: state.peak[_index(device)],
    "memory_reserved": lambda device=None: state.live[_index(device)],
    "max_memory_reserved": lambda device=None: state.peak[_index(device)],
    "memory_stats": lambda device=None: {},
    "reset_peak_memory_stats": _reset_peak,
    "get_device_properties": _properties,
    "get_device_name": lambda device=None: "pretended",
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda including_emulation=True: True,
    "is_current_stream_capturing": lambda: False,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
}


_MAKING = [
    "arange",
    "empty",
    "empty_like",
    "empty_strided",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
]
"""Functions of torch that make tensors."""


def _making(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes tensors: with page-locked memory for those who ask, and where a device is a number."""

    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        if type(kwargs.get("device")) is int:
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        tensor = make(*args, **kwargs)
        return device.pin(tensor) if pin_memory else tensor

    return made


def _page_locked(tensor: Tensor, device_of_pages: Any = None) -> Tensor:
    """A page-locked copy."""
    return tensor if device.is_pinned(tensor) else device.pin(tensor.clone())


def _init_process_group(begin: Callable[..., Any]) -> Callable[..., Any]:
    """Initialization of torch.distributed with gloo for both kinds of tensors."""

    def init(backend: Any = None, **kwargs: Any) -> None:
        assert backend == "cpu:gloo,cuda:nccl", backend
        begin("cpu:gloo,cuda:gloo", **kwargs)

    return init


def install(devices: int, guard: str) -> None:
    """Gives this process so many pretended devices.

    Args:
        guard: see `device.compile_guard`.
    """
    device.install_kernels(devices, guard)
    for name, answer in _ANSWERS.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_, **__: 0
    for name in _MAKING:
        setattr(torch, name, _making(getattr(torch, name)))
    patched: Any = torch.Tensor
    patched.cuda = lambda tensor, device=None: tensor.to(torch.device("cuda", _index(device)))
    patched.pin_memory = _page_locked
    patched.is_pinned = device.is_pinned
    patched.record_stream = lambda tensor, stream: None
    dist.is_nccl_available = lambda: True
    dist.init_process_group = _init_process_group(dist.init_process_group)
