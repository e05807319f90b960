"""Runs micro-batches through megatron-core's pipeline schedules (none, 1F1B, interleaved), with or without backward."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.distributed.device import megatron_device
from lockstep.distributed.libraries import ModelType, TransformerConfig, get_forward_backward_func
from lockstep.distributed.world.groups import Groups

Forward = Callable[[nn.Module, Any, Tensor | None, int], Tensor]
"""(this rank's module, micro-batch, activations received from the stage before or None, virtual stage) → activations,
or the result on the last stage."""

Loss = Callable[[Tensor, Any], tuple[Tensor, dict[str, Tensor]]]
"""(result of the last stage, micro-batch) → (loss as a sum over this micro-batch, values to report)."""


def megatron_config(groups: Groups, *, layers: int, width: int, heads: int, dtype: torch.dtype) -> TransformerConfig:
    """The TransformerConfig that megatron-core's layers and schedules read; nothing else in Lockstep depends on it."""
    layout = groups.layout
    interleaved = layout.virtual > 1
    return TransformerConfig(
        num_layers=-(-layers // layout.chunks) * layout.chunks,
        hidden_size=width,
        num_attention_heads=heads,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if interleaved else None,
        context_parallel_size=layout.context,
        # The interleaved schedule over two stages is silently wrong with batched communication.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=False,
        perform_initialization=False,
    )


class Chunk(nn.Module):
    """A virtual stage as megatron-core's schedules expect one: a wrapper of this rank's module."""

    def __init__(self, module: nn.Module, config: TransformerConfig, index: int) -> None:
        super().__init__()
        self.module, self.config, self.index = module, config, index
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = index if config.virtual_pipeline_model_parallel_size else None
        self.received: Tensor | None = None

    def set_input_tensor(self, received: Tensor | list[Tensor]) -> None:
        """Receive the activations of the previous stage; the schedule calls this."""
        self.received = received[0] if isinstance(received, list) else received


class Stage:
    """This rank's module, which holds the layers of all its virtual stages."""

    def __init__(self, module: nn.Module, config: TransformerConfig) -> None:
        self.module, self.config = module, config
        self.chunks = [Chunk(module, config, i) for i in range(config.virtual_pipeline_model_parallel_size or 1)]


def run_forward_backward(
    stage: Stage, batches: Sequence[Any], forward: Forward, loss: Loss, *, tokens: int
) -> list[dict[str, Tensor]]:
    """Run forward and backward over all micro-batches; gradients accumulate in the parameters.

    Args:
        tokens: length T of every micro-batch; stages send each other [T / context / tensor if sequence, 1, width].

    Returns:
        The values that `loss` reported for each micro-batch; empty on all but the last stage.
    """
    # The schedule divides by the number of micro-batches and multiplies by the context degree; a sum must stay a sum.
    scale = len(batches) / stage.config.context_parallel_size

    def finish(batch: Any, result: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value, report = loss(result, batch)
        return value * scale, report

    return _schedule(stage, batches, forward, finish, tokens, forward_only=False)


@torch.no_grad()
def run_forward(stage: Stage, batches: Sequence[Any], forward: Forward, *, tokens: int) -> list[Tensor]:
    """Results of the last stage for each micro-batch, without gradients; empty on all but the last stage."""

    def finish(batch: Any, result: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return result.new_zeros(()), {"result": result}

    return [r["result"] for r in _schedule(stage, batches, forward, finish, tokens, forward_only=True)]


def _schedule(
    stage: Stage, batches: Sequence[Any], forward: Forward, finish: Any, tokens: int, forward_only: bool
) -> list[dict[str, Tensor]]:
    def forward_step(iterator: Any, chunk: Chunk) -> tuple[Tensor, Any]:
        batch = next(iterator)
        return forward(chunk.module, batch, chunk.received, chunk.index), partial(finish, batch)

    iterators = [iter(batches) for _ in stage.chunks]
    one = len(iterators) == 1
    with megatron_device():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators[0] if one else iterators,
            model=stage.chunks[0] if one else stage.chunks,
            num_microbatches=len(batches),
            seq_length=tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )
