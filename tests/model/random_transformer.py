"""A small transformer with random weights, for tests that draw from it."""

import torch

from lockstep.distributed.world.groups import Groups
from lockstep.model.config import ModelConfig, Numerics
from lockstep.model.loading import build, transformer_of
from lockstep.model.transformer import Transformer
from lockstep.model.weights.initialization import RandomWeights


def random_transformer(groups: Groups, *, vocabulary: int, context: int, numerics: Numerics = "fast") -> Transformer:
    """Two layers in fp32, which end completions with token 2."""
    model = ModelConfig(
        layers=2,
        width=48,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=64,
        vocabulary=vocabulary,
        context=context,
        eos_tokens=(2,),
    )
    weights = RandomWeights(model, 0, deviation=0.3)
    return transformer_of(build(model, groups, torch.float32, weights, numerics)).eval()
