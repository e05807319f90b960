"""Pickles may name members of enumerations in each way that Pythons write them, and nothing else by it."""

import io
import pickle
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch.distributed.checkpoint.planner import LoadItemType

from lockstep.model.formats.files.safe_unpickler import UnreadFile, load_pickle, load_torch

LISTED = {"torch.distributed.checkpoint.planner": ("LoadItemType",)}


class ByAttribute:
    """Pickled as Python 3.11.2 does it with the member of an enumeration: a call of `getattr`."""

    def __init__(self, of: Any, name: str) -> None:
        self._given = of, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self._given


def torch_file(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_members_of_enumerations() -> None:
    member = ByAttribute(LoadItemType, "TENSOR")
    assert load_pickle(io.BytesIO(pickle.dumps([member])), LISTED, "it") == [LoadItemType.TENSOR]
    found = load_torch(torch_file({"mask": ByAttribute(AttnMaskType, "causal"), "weight": torch.ones(2)}), "it")
    assert found["mask"] is AttnMaskType.causal


@pytest.mark.parametrize("name", ["__class__", "mro", "_member_map_", "TENSORS"])
def test_nothing_else_of_an_enumeration(name: str) -> None:
    with pytest.raises(UnreadFile, match=r"it is not read: it holds builtins\.getattr\(.*LoadItemType"):
        load_pickle(io.BytesIO(pickle.dumps(ByAttribute(LoadItemType, name))), LISTED, "it")
    with pytest.raises(UnreadFile, match="it is"):
        load_torch(torch_file(ByAttribute(AttnMaskType, name)), "it")


def test_attributes_of_nothing_else() -> None:
    with pytest.raises(UnreadFile, match=r"it holds builtins\.getattr\(torch.float32"):
        load_pickle(io.BytesIO(pickle.dumps(ByAttribute(torch.float32, "itemsize"))), LISTED, "it")
    with pytest.raises(UnreadFile, match="not on the list"):
        load_torch(torch_file(ByAttribute(dict, "fromkeys")), "it")
