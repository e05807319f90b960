"""The reference model π_ref of the KL term, on the policy's ranks: frozen, updated every n steps, or a moving average.

An average is kept in fp32: in bf16 what one step adds to it would be rounded away.
"""

from collections.abc import Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from lockstep.distributed.checkpoint.arrays import Chunk
from lockstep.distributed.checkpoint.reshard import FlatShard, whole_chunks
from lockstep.distributed.checkpoint.tensors import Box, Source, WeightsOnly, read_tensor, state_name
from lockstep.distributed.optimizer.parameter_marks import is_expert
from lockstep.distributed.pipeline import Stage
from lockstep.model.loading import transformer_of
from lockstep.model.state_dict import pieces, pieces_by_parameter
from lockstep.model.transformer import Transformer
from lockstep.rl.algorithms.config import ReferenceConfig

KIND = "reference"
"""Name, in the policy's checkpoints, of the state that a moving reference is stored as; averages are in fp32."""


class Saved(WeightsOnly):
    """A `Source` of the reference model's weights in a checkpoint of the policy."""

    def __init__(self, checkpoint: Source) -> None:
        self._checkpoint = checkpoint

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """Reads a part of the reference's tensor of this name; see `Source.read`."""
        return self._checkpoint.read(state_name(KIND, name), box)


class ReferenceModel:
    """A copy of the policy in the same layout, which may follow it as it learns."""

    def __init__(self, stage: Stage, config: ReferenceConfig, saved: Source | None = None) -> None:
        """
        Args:
            stage: this rank's part of a model with the policy's weights, or with those of `saved`.
            saved: the reference in a checkpoint, where a moving average is resumed.
        """
        self.stage, self._config = stage, config
        self._transformer = transformer_of(stage)
        self._parameters = dict(self._transformer.named_parameters())
        kept = self._parameters if config.kind == "average" else {}
        self._average: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in kept.items()}
        if saved and self._average:
            of = {parameter: self._average[name] for name, parameter in self._parameters.items()}
            for parameter, piece in pieces(self._transformer):
                read_tensor(saved, piece.name, piece.box, piece.view(of[parameter]))

    @torch.no_grad()
    def follow(self, policy: Transformer, step: int) -> None:
        """Updates the reference after a step of the policy, numbered from 1, whose weights ZeRO-3 has gathered."""
        if self._average:
            for name, parameter in policy.named_parameters():
                self._average[name].lerp_(parameter.float(), 1 - self._config.decay)
                self._parameters[name].copy_(self._average[name])
        elif self.moves and step % self._config.every == 0:
            for name, parameter in policy.named_parameters():
                self._parameters[name].copy_(parameter)

    def chunks(self) -> list[Chunk]:
        """The part of the reference that this rank writes into a checkpoint of the policy; a collective call."""
        return whole_chunks(self._kept(), pieces_by_parameter(self._transformer))

    def _kept(self) -> Iterator[FlatShard]:
        groups = self._transformer.groups
        for name, parameter in self._parameters.items():
            values = self._average.get(name, parameter.detach()).view(-1)
            replicas = groups.expert_replicas if is_expert(parameter) else groups.replicas
            yield FlatShard(parameter, parameter.shape, (0, values.numel()), replicas, {KIND: values})

    @property
    def moves(self) -> bool:
        """Whether the reference follows the policy."""
        return self._config.moves
