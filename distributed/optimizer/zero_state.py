"""Weights and optimizer state as ZeRO partitions them: exported for a checkpoint, restored from one of any layout."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.distributed.checkpoint.reshard import WEIGHTS, FlatShard, fill
from lockstep.distributed.checkpoint.tensors import STATES, Piece, Source, concurrently, state_name
from lockstep.distributed.optimizer.parameter_marks import is_expert
from lockstep.distributed.optimizer.partition import Share, share_of, shares_of_each, stored
from lockstep.distributed.optimizer.weight_penalty import FISHER, OLD, WeightPenalty
from lockstep.distributed.world.groups import Groups

_STATE = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum": "momentum_buffer"}
"""Kinds of state, and what optimizers call them."""


class MissingState(ValueError):
    """A checkpoint that lacks optimizer state for a trained tensor, so that training cannot be resumed from it."""


class ZeroState:
    """This rank's part of the weights and of the optimizer state, in terms of the module's parameters."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        groups: Groups,
        shares: Mapping[Tensor, Sequence[Share]],
        penalty: WeightPenalty,
    ) -> None:
        """
        Args:
            optimizer: the one that DeepSpeed wraps.
            shares: see `Sharded`.
            penalty: whose old weights and Fisher information are state, too.
        """
        self._module, self._optimizer, self._groups, self._shares = module, optimizer, groups, shares
        self._penalty = penalty
        self._has_masters = next(module.parameters()).dtype == torch.bfloat16

    @property
    def updates(self) -> int:
        """The number of optimizer steps so far that changed weights."""
        return max((int(state.get("step", 0)) for state in self._optimizer.state.values()), default=0)

    def reset(self) -> None:
        """Drop the optimizer's moments and what the penalty keeps, for a new phase of training."""
        self._optimizer.state.clear()
        self._penalty.forget()

    def flat_shards(self) -> Iterator[FlatShard]:
        """This rank's elements of every parameter, with the optimizer state of those that are trained."""
        trained = {share.parameter: (tensor, share) for tensor, shares in self._shares.items() for share in shares}
        for parameter in self._module.parameters():
            tensor, share = trained.get(parameter) or (None, self._untrained(parameter))
            values = {WEIGHTS: stored(share)}
            if tensor is not None:
                if self._has_masters:
                    values["master"] = share.within(tensor.detach())
                state = self._optimizer.state.get(tensor, {})
                values |= {kind: share.within(state[key]) for kind, key in _STATE.items() if key in state}
                values |= {kind: share.within(kept[tensor]) for kind, kept in self._penalty.kept.items()}
            replicas = self._groups.expert_replicas if is_expert(parameter) else self._groups.replicas
            yield FlatShard(parameter, share.shape, share.cuts, replicas, values)

    def _untrained(self, parameter: nn.Parameter) -> Share:
        """The share of a parameter that the optimizer is not given."""
        if self._groups.layout.zero_stage == 3:
            return shares_of_each([parameter], self._groups.replicas)[0]
        return share_of(parameter, (0, parameter.numel()), 0, 0)

    @torch.no_grad()
    def restore(self, source: Source, pieces: Mapping[nn.Parameter, Sequence[Piece]]) -> None:
        """Load the optimizer state of a checkpoint that any layout saved. Weights are loaded before, by the model.

        Args:
            pieces: the logical tensors in each parameter.

        Raises:
            MissingState: when the source has none for something that is trained.
        """
        known = frozenset(source.states)
        reads = [
            read
            for tensor, shares in self._shares.items()
            for read in self._reads(tensor, shares, source, known, pieces)
        ]
        concurrently(lambda read: fill(*read), reads)

    def _reads(
        self,
        tensor: Tensor,
        shares: Sequence[Share],
        source: Source,
        known: frozenset[str],
        pieces: Mapping[nn.Parameter, Sequence[Piece]],
    ) -> Iterator[tuple[Any, ...]]:
        """Arguments of `fill` for all state of one tensor that the optimizer is given; makes room for that state."""
        names = [piece.name for share in shares for piece in pieces[share.parameter]]
        kinds = [kind for kind in STATES if names and all(state_name(kind, name) in known for name in names)]
        if names and source.updates and not _STATE.keys() & kinds:
            raise MissingState(f"there is no optimizer state for {names[0]}, or not of this optimizer")
        state = self._optimizer.state[tensor] if kinds else {}
        for kind in kinds:
            into = tensor.detach()
            if kind in (OLD, FISHER):
                into = self._penalty.kept.setdefault(kind, {})[tensor] = torch.zeros_like(into, dtype=torch.float32)
            elif kind in _STATE:
                into = state[_STATE[kind]] = torch.zeros_like(tensor)
            for share in shares:
                yield share.within(into), share.start, share.shape, pieces[share.parameter], source, kind
        if "exp_avg" in kinds:
            state["step"] = torch.tensor(float(source.updates))
