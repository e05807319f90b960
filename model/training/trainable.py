"""Which parameters are trained, and which are frozen: one declaration for pretraining and every other method.

Frozen parameters keep every bit; they have no gradient and no optimizer state.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from lockstep.distributed.checkpoint.tensors import Piece
from lockstep.model.config import LoraConfig, ModelConfig
from lockstep.model.weights.names import VALUE, is_adapter, logical_tensors


class NothingLearns(ValueError):
    """A declaration that trains nothing, or a part of a parameter that can only be trained as a whole."""


class TrainableConfig(BaseModel):
    """Which tensors are trained. Adapters and a value head always are: they are new."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensors: Literal["all", "biases", "adapters"] | tuple[str, ...] | None = Field(
        None,
        description="tensors that learn: all, biases, adapters alone, or patterns of their names such as "
        '"model.layers.*.mlp.*"; when it is not there, adapters alone where there are some, else all',
    )
    lora: LoraConfig | None = Field(None, description="low-rank adapters of linear layers")

    def learns(self, name: str) -> bool:
        """Whether a logical tensor is trained."""
        chosen = self.tensors or ("adapters" if self.lora else "all")
        if chosen == "all" or is_adapter(name) or name == VALUE:
            return True
        if isinstance(chosen, tuple):
            return any(fnmatchcase(name, pattern) for pattern in chosen)
        return chosen == "biases" and name.endswith(".bias")

    def check(self, model: ModelConfig) -> None:
        """Raise if the declaration names no tensor of a model.

        Raises:
            NothingLearns: says what chooses nothing, and what there would be.
        """
        names = logical_tensors(model)
        for pattern in self.tensors if isinstance(self.tensors, tuple) else ():
            if not any(fnmatchcase(name, pattern) for name in names):
                examples = ", ".join(sorted(names, key=lambda name: name.count("."))[:3])
                raise NothingLearns(
                    f"trainer.trainable.tensors={pattern!r} is the name of no tensor: names are as {examples}"
                )
        if not any(map(self.learns, names)):
            raise NothingLearns(
                f"trainer.trainable.tensors={self.tensors!r} chooses none of the model's tensors: it has no "
                f"{self.tensors if isinstance(self.tensors, str) else 'such tensors'}; choose others"
            )


def freeze(model: ModelConfig, held: Mapping[nn.Parameter, Sequence[Piece]], config: TrainableConfig) -> None:
    """Set requires_grad of this rank's parameters as the declaration says.

    Args:
        held: the pieces of logical tensors in each parameter of this rank.

    Raises:
        NothingLearns: when a parameter would learn in part, or this rank would learn nothing.
    """
    config.check(model)
    for parameter, pieces in held.items():
        learns = {config.learns(piece.name): piece.name for piece in pieces} or {True: ""}
        if len(learns) > 1:
            raise NothingLearns(
                f"{learns[True]} and {learns[False]} lie in one parameter, and trainer.trainable.tensors chooses one "
                "of them: choose both or none"
            )
        parameter.requires_grad_(True in learns)
    if not any(parameter.requires_grad for parameter in held):
        example = next(pieces[0].name for pieces in held.values() if pieces)
        raise NothingLearns(
            f"the rank that holds {example} would learn nothing: choose tensors of all pipeline stages, or fewer stages"
        )
