"""Reads `pytorch_model.bin` files by slices: the pickle gives each tensor's offset, and no tensor is loaded.

Format: https://docs.pytorch.org/docs/stable/notes/serialization.html. Only what `weights_only` allows is unpickled.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lockstep.distributed.checkpoint.tensors import to_numpy
from lockstep.model.formats.files.extents import BadFile, Extent, checked_tensor


def read_torch(path: Path) -> dict[str, Extent]:
    """The extent of each tensor of a file of `torch.save`, by name.

    Raises:
        BadFile: when it is damaged, has the format of before PyTorch 1.6, or holds more than tensors by name.
    """
    try:
        with FakeTensorMode():
            state: Any = torch.load(path, weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds a {foreign[1]}" if foreign else "it is damaged or cut off"
        raise BadFile(f"{path} cannot be read as weights alone, because {reason}: save it as safetensors") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise BadFile(f"{path} holds more than tensors by name: save the model's state_dict alone")
    found = {checked_tensor(name, path): _extent(path, name, tensor) for name, tensor in state.items()}
    end, size = max((e.offset + e.size for e in found.values()), default=0), path.stat().st_size
    if end > size:
        raise BadFile(f"{path} is cut off: it has {size} bytes, and its tensors end at {end}")
    return found


def _extent(path: Path, name: str, tensor: Tensor) -> Extent:
    begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if begin is None or not tensor.is_contiguous():
        raise BadFile(f"{name} in {path} does not lie there row after row: save it again as safetensors")
    offset = begin + tensor.storage_offset() * tensor.element_size()
    return Extent(path, offset, tuple(tensor.shape), _numpy_dtype(tensor.dtype))


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    try:
        return to_numpy(torch.empty(0, dtype=dtype)).dtype
    except TypeError as error:
        raise BadFile(f"a tensor has the dtype {dtype}, which is not read: save it as safetensors") from error
