"""Micro-batches through megatron-core's schedules: one stage or many, forward and backward, or forward only."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lockstep.distributed.device import megatron_device
from lockstep.distributed.groups import Groups

Forward = Callable[[nn.Module, Any, Tensor | None], Tensor]
"""(stage module, micro-batch, activations received from the stage before, or None) → activations, or the result."""

Loss = Callable[[Tensor, Any], tuple[Tensor, dict[str, Tensor]]]
"""(result of the last stage, micro-batch) → (loss as a sum over this micro-batch, values to report)."""


def megatron_config(groups: Groups, *, layers: int, width: int, heads: int, dtype: torch.dtype) -> TransformerConfig:
    """What megatron-core's layers and schedules read; nothing else in Lockstep depends on it."""
    return TransformerConfig(
        num_layers=max(layers, groups.layout.pipeline),
        hidden_size=width,
        num_attention_heads=heads,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=groups.layout.tensor,
        pipeline_model_parallel_size=groups.layout.pipeline,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=False,
        perform_initialization=False,
    )


class Stage(nn.Module):
    """What the schedules ask of a pipeline stage, around any module."""

    def __init__(self, module: nn.Module, config: TransformerConfig) -> None:
        super().__init__()
        self.module, self.config = module, config
        self.model_type = ModelType.encoder_or_decoder
        self.received: Tensor | None = None

    def set_input_tensor(self, received: Tensor | list[Tensor]) -> None:
        """Called by the schedule with the activations of the stage before."""
        self.received = received[0] if isinstance(received, list) else received


def run_forward_backward(
    stage: Stage, batches: Sequence[Any], forward: Forward, loss: Loss, *, tokens: int
) -> list[dict[str, Tensor]]:
    """Forward and backward over all micro-batches; gradients add up in the parameters.

    Args:
        tokens: length T of every micro-batch, the shape [T, 1, width] that stages send to each other.

    Returns:
        What `loss` reported for each micro-batch; empty on all but the last stage.
    """
    scale = float(len(batches))  # the schedule divides by the number of micro-batches; a sum must stay a sum

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
    def forward_step(iterator: Any, stage: Stage) -> tuple[Tensor, Any]:
        batch = next(iterator)
        return forward(stage.module, batch, stage.received), partial(finish, batch)

    with megatron_device():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=stage,
            num_microbatches=len(batches),
            seq_length=tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )
