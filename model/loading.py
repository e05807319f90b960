"""Builds a rank's stage of a transformer and loads its weights; the dtypes that models can be computed in."""

import torch

from lockstep.distributed.checkpoint.tensors import Source
from lockstep.distributed.device import local_device
from lockstep.distributed.pipeline import Stage, megatron_config
from lockstep.distributed.world.groups import Groups
from lockstep.model.config import Head, ModelConfig, Numerics
from lockstep.model.state_dict import load
from lockstep.model.transformer import Transformer
from lockstep.model.weights.overlay import with_head

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""The dtypes of parameters and activations, by the names that recipes use."""


def build(
    model: ModelConfig,
    groups: Groups,
    dtype: torch.dtype,
    source: Source,
    numerics: Numerics = "fast",
    *,
    head: Head | None = None,
) -> Stage:
    """Build this rank's stage of a transformer, with weights loaded from a source.

    Args:
        head: replaces the head that the model has; see `lockstep.model.layers.value_head`.
    """
    model, source = with_head(model, source, head or model.head)
    config = megatron_config(groups, layers=model.layers, width=model.width, heads=model.heads, dtype=dtype)
    transformer = Transformer(model, groups, config, numerics).to(local_device(groups.rank))
    load(transformer, source)
    return Stage(transformer, config)


def transformer_of(stage: Stage) -> Transformer:
    """The transformer inside a stage."""
    assert isinstance(stage.module, Transformer)
    return stage.module
