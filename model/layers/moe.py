"""Mixture of experts with expert parallelism: a top-k router, an all-to-all of tokens, gated feed-forward experts.

No token is ever dropped and no buffer has a capacity, so a token's output depends on nothing but the token. Experts are
split over the expert axis and, within, over the tensor axis; every tensor rank sends the same tokens to the experts of
its own tensor rank. Losses that keep the load even are means over each document, never over a micro-batch, so that
packing changes no gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lockstep.distributed.libraries import TransformerConfig, tensor_parallel
from lockstep.distributed.optimizer.parameter_marks import as_expert
from lockstep.distributed.world.collectives import all_to_all
from lockstep.distributed.world.groups import Groups
from lockstep.model.config import MoEConfig, Numerics
from lockstep.model.layers.linear import ColumnLinear, RowLinear, mark, reduced, sequence_group, summed_over
from lockstep.model.ops.exact import reductions
from lockstep.model.ops.fused import swiglu
from lockstep.model.ops.linear import project

Activation = Callable[[Tensor], Tensor]
Choice = Callable[[Tensor], Tensor]
"""A `Route` (see `routing`) of one layer."""


@dataclass(frozen=True)
class Sequences:
    """The document of each token of a row, and the weight of each document in the router's losses."""

    document_T: Tensor
    """[T] index into `weight_D` for each token of this context rank, those of all its tensor ranks."""
    weight_D: Tensor
    """[D] in fp32, for all documents of the row, padding included: that weighs 0."""


class MoE(nn.Module):
    """The router and the experts of one block, in the place of its feed-forward layer."""

    def __init__(
        self,
        moe: MoEConfig,
        width: int,
        groups: Groups,
        config: TransformerConfig,
        numerics: Numerics = "fast",
    ) -> None:
        super().__init__()
        self.moe, self.groups, self._numerics = moe, groups, numerics
        self._activation = partial(swiglu, numerics=numerics)
        local, inner = moe.experts // groups.layout.expert, moe.intermediate // groups.layout.tensor

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=config.params_dtype))

        self.router = empty(moe.experts, width)
        self.gate_up = empty(local, 2 * inner, width)
        self.down = empty(local, width, inner)
        mark(self.gate_up, 1)
        mark(self.down, 2)
        if groups.layout.expert > 1:
            as_expert(self.gate_up)
            as_expert(self.down)
        self.shared = SharedExpert(moe, width, groups, config, numerics) if moe.shared_intermediate else None

    def forward(self, x_T1D: Tensor, sequences: Sequences | None = None, route: Choice | None = None) -> Tensor:
        """Activations of the shape of x.

        Args:
            sequences: for the losses on the router, which only reach the gradient; None for none.
            route: decides which experts tokens go to; None for those that the router chooses.
        """
        x_TD = self._gathered(x_T1D)[:, 0]
        logits_TE = self._routed(x_TD)
        is_fast = self._numerics == "fast"
        probability_TE = logits_TE.softmax(-1) if is_fast else reductions.softmax(logits_TE)
        probability_TK, chosen_TK = probability_TE.topk(self.moe.experts_per_token, dim=-1)
        if route is not None:
            chosen_TK = route(chosen_TK)
            probability_TK = probability_TE.gather(-1, chosen_TK)
        if self.moe.normalize:
            total = probability_TK.sum(-1, keepdim=True) if is_fast else reductions.row_sum(probability_TK)[:, None]
            probability_TK = probability_TK / total
        out = self._reduced(self._mixed(x_TD, probability_TK, chosen_TK)[:, None])
        if sequences is not None and self.moe.has_loss and torch.is_grad_enabled():
            loss = router_loss(self.moe, logits_TE, chosen_TK, sequences, self.groups.context)
            out = _WithLoss.apply(out, loss, float(dist.get_world_size(self.groups.replicas)))
        return out if self.shared is None else out + self.shared(x_T1D)

    @torch.no_grad()
    def choices(self, x_T1D: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token [T, K], best first, and the margin [T] in probability of the last over the next.

        Where every expert is chosen, none is next and the difference is infinite.
        """
        k = self.moe.experts_per_token
        probability_TE = self._routed(self._gathered(x_T1D)[:, 0]).softmax(-1)
        best, chosen = probability_TE.topk(min(k + 1, self.moe.experts), dim=-1)
        margin_T = best[:, k - 1] - best[:, k] if k < self.moe.experts else torch.full_like(best[:, 0], torch.inf)
        return chosen[:, :k], margin_T

    def _routed(self, x_TD: Tensor) -> Tensor:
        """In fp32, where transformers multiplies in the model's dtype: rounding must not decide who gets a token."""
        return project(x_TD.float(), self.router.float(), self._numerics)

    def _gathered(self, x_T1D: Tensor) -> Tensor:
        """All tokens of the tensor ranks; what reaches the backward is the same on each of them."""
        if not self.groups.layout.sequence:
            return x_T1D
        return tensor_parallel.gather_from_sequence_parallel_region(
            x_T1D, tensor_parallel_output_grad=False, group=self.groups.tensor
        )

    def _reduced(self, part_T1D: Tensor) -> Tensor:
        return reduced(part_T1D, self.groups.tensor, self.groups.layout.sequence, self._numerics)

    def _mixed(self, x_TD: Tensor, probability_TK: Tensor, chosen_TK: Tensor) -> Tensor:
        """This tensor rank's part of Σ_k probability · expert(x), added up in fp32 in the order of k."""
        tokens, k = chosen_TK.shape
        # Each tensor rank knows a part of every expert's output: gradients of what they share are sums over ranks.
        x_TD = tensor_parallel.copy_to_tensor_model_parallel_region(x_TD, self.groups.tensor)
        probability_TK = tensor_parallel.copy_to_tensor_model_parallel_region(probability_TK, self.groups.tensor)
        expert_N = chosen_TK.flatten()
        order = expert_N.argsort(stable=True)
        sent = _Rearranged.apply(x_TD, order, _inverse(order), k)
        answered = self._visited(sent, expert_N.bincount(minlength=self.moe.experts))
        output_TKD = _Rearranged.apply(answered, _inverse(order), order, 1).view(tokens, k, -1)
        weighted_TKD = output_TKD.float() * probability_TK[..., None]
        mixed = weighted_TKD.sum(1) if self._numerics == "fast" else reductions.in_order(weighted_TKD.unbind(1))
        return mixed.to(x_TD.dtype)

    def _visited(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        """What the experts make of rows that are sorted by expert, wherever those experts are."""
        ranks = self.groups.layout.expert
        if ranks == 1:
            return self._computed(rows_ND, counts_E.tolist())
        group, received_E = self.groups.expert, torch.empty_like(counts_E)
        dist.all_to_all_single(received_E, counts_E, group=group)
        # The host reads all counts at once: it waits for the device each time.
        sent_RL, received_RL = torch.stack((counts_E, received_E)).view(2, ranks, -1).tolist()
        sent, received = ([sum(by_expert) for by_expert in counts] for counts in (sent_RL, received_RL))
        # Rows arrive by rank and, within, by expert; those of one expert are to stand together.
        local = len(self.gate_up)
        order = torch.arange(local, device=counts_E.device).repeat(ranks)
        order = order.repeat_interleave(received_E, output_size=sum(received)).argsort(stable=True)
        arrived = _Rearranged.apply(all_to_all(rows_ND, group, sent, received), order, _inverse(order), 1)
        outputs = self._computed(arrived, [sum(by_rank) for by_rank in zip(*received_RL, strict=True)])
        return all_to_all(_Rearranged.apply(outputs, _inverse(order), order, 1), group, received, sent)

    def _computed(self, rows_ND: Tensor, counts: list[int]) -> Tensor:
        """Each local expert's output for its `counts` rows; one without rows still gets a gradient, of zeros."""
        parts = zip(rows_ND.split(counts), self.gate_up.unbind(), self.down.unbind(), strict=True)
        return torch.cat([self._expert(*part) for part in parts])

    def _expert(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return project(self._activation(project(x, gate_up, self._numerics)), down, self._numerics)


class SharedExpert(nn.Module):
    """The shared expert: a gated feed-forward layer for all tokens; with a gate, scaled by a sigmoid of the token."""

    def __init__(
        self, moe: MoEConfig, width: int, groups: Groups, config: TransformerConfig, numerics: Numerics
    ) -> None:
        super().__init__()
        self._numerics = numerics
        self._sigmoid: Activation = torch.sigmoid if numerics == "fast" else reductions.sigmoid
        self.gate_up = ColumnLinear(width, 2 * moe.shared_intermediate, config, numerics=numerics)
        self.down = RowLinear(moe.shared_intermediate, width, config, numerics=numerics)
        self.gate = nn.Parameter(torch.empty(1, width, dtype=config.params_dtype)) if moe.shared_gate else None
        self._parts = sequence_group(groups)

    def forward(self, x_T1D: Tensor) -> Tensor:
        """[T, 1, width] → [T, 1, width]; tokens are split over tensor ranks with sequence parallelism."""
        out = self.down(swiglu(self.gate_up(x_T1D), self._numerics))
        if self.gate is None:
            return out
        return self._sigmoid(project(x_T1D, summed_over(self.gate, self._parts), self._numerics)) * out


def router_loss(
    moe: MoEConfig, logits_TE: Tensor, chosen_TK: Tensor, sequences: Sequences, context: ProcessGroup
) -> Tensor:
    """The router's load-balancing and z losses, this context rank's part.

    They are Σ_d w_d · (balance · E · Σ_e f_e·P_e + z · mean of (log Σ_e exp logit_e)²).

    Over the tokens of document d, f_e is the share of choices that fall on expert e and P_e the mean probability of e
    (Fedus et al. 2021, eq. 4 to 6, of each document by itself); the second mean is the z loss of Zoph et al. 2022,
    eq. 5. Only choices are counted over context ranks: the loss is linear in what depends on one token alone.
    """
    experts, k = logits_TE.shape[1], chosen_TK.shape[1]
    document_T, weight_D = sequences.document_T, sequences.weight_D
    cells = document_T[:, None] * experts + chosen_TK
    counts_DE = cells.flatten().bincount(minlength=len(weight_D) * experts).view(-1, experts)
    if context.size() > 1:
        dist.all_reduce(counts_DE, group=context)
    choices_D = counts_DE.sum(1).clamp(min=1)
    share_DE = counts_DE / choices_D[:, None]
    balance_T = experts * (share_DE[document_T] * logits_TE.softmax(-1)).sum(-1)
    loss_T = moe.balance_coefficient * balance_T + moe.z_coefficient * logits_TE.logsumexp(-1).square()
    return ((weight_D * k / choices_D)[document_T] * loss_T).sum()


class _WithLoss(torch.autograd.Function):
    """Activations as they are; their backward starts that of a loss, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(torch.full_like(loss, scale))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return gradients[0], scale, None


def _inverse(order: Tensor) -> Tensor:
    """The permutation that undoes another."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return back


class _Rearranged(torch.autograd.Function):
    """Every row k times, permuted: out[i] = x[order[i] // k]. Gradients are added in the order of the copies."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, back_N: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back_N)
        ctx.k = k
        return x_TD.index_select(0, order_N // k if k > 1 else order_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (back_N,) = ctx.saved_tensors
        d_ND = gradients[0].index_select(0, back_N)
        if ctx.k > 1:
            d_ND = d_ND.view(-1, ctx.k, d_ND.shape[1]).float().sum(1).to(d_ND.dtype)
        return d_ND, None, None, None
