"""Builds the optimizer of a transformer's trained parameters: AdamW, or Muon for matrices with AdamW for the rest."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lockstep.distributed.checkpoint.tensors import Piece
from lockstep.distributed.optimizer.muon import Muon
from lockstep.distributed.optimizer.parameter_marks import experts_apart
from lockstep.distributed.world.groups import Groups
from lockstep.model.state_dict import pieces
from lockstep.model.training.config import OptimizerConfig
from lockstep.model.transformer import Transformer
from lockstep.model.weights.names import is_projection


def optimizer_of(transformer: Transformer, groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of a stage's trained parameters, with the parameter groups that ZeRO needs."""
    trained = [p for p in transformer.parameters() if p.requires_grad]
    matrices: dict[nn.Parameter, list[Piece]] = {}
    for parameter, piece in pieces(transformer):
        if parameter.requires_grad and is_projection(piece.name):
            matrices.setdefault(parameter, []).append(piece)
    if config.kind == "adamw" or not matrices:
        return adamw(trained, config)
    layers: dict[str, list[nn.Parameter]] = {}
    for parameter, (piece, *_) in matrices.items():
        layers.setdefault(piece.name.split(".")[2], []).append(parameter)
    rule = {"lr": config.learning_rate, "momentum": config.momentum, "weight_decay": config.weight_decay}
    by_layer = experts_apart([{"params": parameters, **rule} for parameters in layers.values()])
    return Muon(by_layer, matrices, adamw([p for p in trained if p not in matrices], config), groups)


def adamw(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW, without weight decay for vectors (norms and biases)."""
    decayed = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay}
    plain = {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0, "decays": False}
    return torch.optim.AdamW(
        experts_apart((decayed, plain)),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def configure(parameter_groups: Iterable[dict[str, Any]], config: OptimizerConfig) -> None:
    """Sets the hyperparameters of an optimizer of the same kind, for a new phase; its moments stay."""
    for group in parameter_groups:
        group["weight_decay"] = config.weight_decay if group.get("decays", True) else 0.0
        if "momentum" in group:
            group["momentum"] = config.momentum
        else:
            group["betas"], group["eps"] = (config.beta1, config.beta2), config.epsilon
