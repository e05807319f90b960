"""The process groups of a layout: the only module that touches megatron-core's global state.

`join` initializes torch.distributed and returns a `Groups`; all else takes the groups that it needs as arguments.
"""

import datetime
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from lockstep.distributed.device import take_device
from lockstep.distributed.layout import Layout, LayoutError
from lockstep.distributed.libraries import parallel_state
from lockstep.distributed.world.gloo import own_devices, share_device


@dataclass(frozen=True)
class Groups:
    """This rank's process groups, and its rank on each axis of the layout, counted from 0."""

    layout: Layout
    rank: int
    tensor: dist.ProcessGroup
    tensor_rank: int
    pipeline: dist.ProcessGroup
    stage: int
    context: dist.ProcessGroup
    context_rank: int
    data_rank: int
    """Which share of a batch this rank computes, of `layout.replicas`."""
    expert: dist.ProcessGroup
    """Ranks that hold different experts of the same layers (expert parallelism)."""
    expert_rank: int
    replicas: dist.ProcessGroup
    """Ranks that hold the same weights, experts aside: the context, expert and data axes together."""
    expert_replicas: dist.ProcessGroup
    """Ranks that hold the same experts."""
    model: dist.ProcessGroup
    """The tensor and pipeline axes together."""
    embedding: dist.ProcessGroup | None

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head and sees the loss."""
        return self.stage == self.layout.pipeline - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage in this rank's pipeline."""
        return dist.get_global_rank(self.pipeline, self.layout.pipeline - 1)

    @property
    def owns_replicated(self) -> bool:
        """Whether this rank is the first of those that hold the same weights, experts aside."""
        return dist.get_rank(self.replicas) == 0

    @property
    def owns_experts(self) -> bool:
        """Whether this rank is the first of those that hold the same experts."""
        return dist.get_rank(self.expert_replicas) == 0


def join(layout: Layout, *, rank: int, meeting: Store, timeout_s: float = 600.0) -> Groups:
    """Initialize torch.distributed (gloo, or NCCL) and the process groups of a layout; all ranks call this together.

    Args:
        meeting: the rendezvous store that all ranks share.

    Raises:
        LayoutError: when rank does not belong to the layout.
    """
    if not 0 <= rank < layout.processes:
        raise LayoutError(f"rank {rank} does not exist in a layout of {layout.processes} processes")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(layout.processes))
    take_device(rank)
    if not dist.is_initialized():
        share_device()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if _has_cuda() else "gloo",
            store=meeting,
            rank=rank,
            world_size=layout.processes,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
    )
    return _current(layout, rank)


def alone() -> Groups:
    """Initialize torch.distributed and the groups for a single process."""
    return join(Layout(), rank=0, meeting=HashStore())


def has_joined() -> bool:
    """Whether this process is part of a world; it can be part of one only."""
    return dist.is_initialized()


_before_leaving: list[Callable[[], None]] = []


def before_leaving(end: Callable[[], None]) -> None:
    """Register `end` to be called by `leave`: for objects whose references to process groups nothing else drops."""
    _before_leaving.append(end)


def leave() -> None:
    """Destroy the process groups and torch.distributed. Threads of a group poll while anything refers to it."""
    while _before_leaving:
        _before_leaving.pop()()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
        own_devices()
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # who finds them would wait for others
            os.environ.pop(name, None)
    gc.collect()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available() and dist.is_nccl_available()


def _current(layout: Layout, rank: int) -> Groups:
    stage = parallel_state.get_pipeline_model_parallel_rank()
    # Not is_rank_in_embedding_group: it remembers the ranks of a world that this process has left.
    in_embedding = stage in (0, layout.pipeline - 1)
    return Groups(
        layout=layout,
        rank=rank,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        stage=stage,
        context=parallel_state.get_context_parallel_group(),
        context_rank=parallel_state.get_context_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        expert=parallel_state.get_expert_model_parallel_group(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        replicas=parallel_state.get_data_parallel_group(with_context_parallel=True),
        expert_replicas=parallel_state.get_expert_data_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        embedding=parallel_state.get_embedding_group() if in_embedding else None,
    )
