"""Targets of a conversion, written in independent parts: rows of stored tensors, small enough for memory.

So any process may write any part, in any order, and again after it was killed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lockstep.distributed.checkpoint.file_names import BadName
from lockstep.model.config import ModelConfig
from lockstep.model.formats.recast import Recast

GENERATION = "generation_config.json"
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)
"""What a checkpoint has besides its weights and its configuration, and every conversion keeps."""

LARGEST_PART = 64 << 20
"""Bytes of a part at most: large enough that disks do not notice, small enough that memory does not."""


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of a stored tensor, and their size in bytes."""

    tensor: str
    start: int
    stop: int
    size: int


class Target(Protocol):
    """A checkpoint that is being written into a folder of its own."""

    parts: Sequence[Part]
    """All that is to be written, the same for the same source and options."""

    def create(self) -> None:
        """Create the files that parts are written into; content that exists stays."""
        ...

    def write(self, part: Part) -> str:
        """Write one part; returns its digest when it is on disk."""
        ...

    def finish(self, digests: Mapping[Part, str]) -> None:
        """Write the metadata of the whole checkpoint, once every part is on disk."""
        ...


def write_whole(target: Target) -> None:
    """Write all parts, one after the other, in this process."""
    target.create()
    target.finish({part: target.write(part) for part in target.parts})


def rows_of_part(shape: Sequence[int], item_bytes: int, limit: int) -> int:
    """Rows of each part: a tensor is split into the fewest parts, a power of two, of at most `limit` bytes."""
    row_bytes, parts = math.prod(shape[1:]) * item_bytes, 1
    while -(-shape[0] // parts) * row_bytes > limit and parts < shape[0]:
        parts *= 2
    return -(-shape[0] // parts)


def split(tensor: str, shape: Sequence[int], item_bytes: int, limit: int) -> Iterator[Part]:
    """Split one tensor into parts, in order."""
    rows, row_bytes = rows_of_part(shape, item_bytes, limit), math.prod(shape[1:]) * item_bytes
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        yield Part(tensor, start, stop, (stop - start) * row_bytes)


@dataclass(frozen=True)
class Wanted:
    """What a target is made from: configuration, source, text files, and the limits on sizes."""

    model: ModelConfig
    source: Recast
    files: Mapping[str, str]
    shard_bytes: int
    part_bytes: int
    origin: str = ""
    """Where the model comes from."""

    def __post_init__(self) -> None:
        """Refuse text files that could stand in for one that a target or a reader of it makes something of.

        Raises:
            BadName: when there is one.
        """
        for name in self.files:
            if name not in TEXT_FILES:
                raise BadName(
                    f"{self.origin} keeps {name!r} beside its weights, and a conversion keeps {', '.join(TEXT_FILES)} "
                    "alone: take it off the list of files in its manifest"
                )
