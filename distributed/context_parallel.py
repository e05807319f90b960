"""Context parallelism: attention of rows whose tokens are split over ranks, by Ulysses all-to-all or by a ring.

Either ranks exchange tokens for heads, so that each attends to the whole row with a part of the heads
(DeepSpeed-Ulysses, Jacobs et al. 2023), or keys and values travel round a ring and partial results are merged by
their log-sum-exp (ring attention, Liu et al. 2023). The ring needs no more heads than one.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.distributed.device import sent
from lockstep.distributed.world.collectives import all_to_all

Visible = Callable[[Tensor, Tensor], Tensor]
"""(indices of queries [Q], indices of keys [K]) in the row → whether each query sees each key, [Q, K]."""


def zigzag_indices(length: int, degree: int, rank: int) -> Tensor:
    """Indices of the tokens that a context rank holds, [length / degree]: load-balanced, one part from each end.

    The row is cut into 2 · degree parts; early tokens see few others, late ones many, and each rank takes one part
    of either kind.
    """
    part = length // (2 * degree)
    assert part * 2 * degree == length
    late = 2 * degree - 1 - rank
    return torch.cat((torch.arange(rank * part, (rank + 1) * part), torch.arange(late * part, (late + 1) * part)))


class UlyssesExchange:
    """All-to-all of DeepSpeed-Ulysses: a rank's tokens with all heads ⇄ the whole row with a part of the heads."""

    def __init__(self, group: dist.ProcessGroup, length: int, device: torch.device) -> None:
        self._group, self._degree = group, group.size()
        places = torch.cat([zigzag_indices(length, self._degree, rank) for rank in range(self._degree)])
        self._places = sent(places, device)
        self._order = sent(places.argsort(), device)

    def to_heads(self, x_THE: Tensor) -> Tensor:
        """Exchange tokens for heads: [T / degree, H, E] → [T, H / degree, E], in the order of the row."""
        tokens, heads, width = x_THE.shape
        parts = x_THE.view(tokens, self._degree, heads // self._degree, width).transpose(0, 1).contiguous()
        return self._exchanged(parts).flatten(0, 1).index_select(0, self._order)

    def to_tokens(self, x_THE: Tensor) -> Tensor:
        """Exchange heads for tokens: [T, H / degree, E] → [T / degree, H, E]."""
        length, heads, width = x_THE.shape
        parts = x_THE.index_select(0, self._places).view(self._degree, length // self._degree, heads, width)
        return self._exchanged(parts).transpose(0, 1).flatten(1, 2)

    def _exchanged(self, parts: Tensor) -> Tensor:
        """Part i goes to rank i, and part i of the result came from rank i."""
        one_each = [1] * self._degree
        return all_to_all(parts, self._group, one_each, one_each)


def ring_attention(
    q_THE: Tensor,
    k_TGE: Tensor,
    v_TGE: Tensor,
    *,
    visible: Visible,
    length: int,
    group: dist.ProcessGroup,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Ring attention of this rank's tokens to the whole row, [T / degree, H, E]; products and sums in fp32.

    Args:
        length: tokens T of the row.
        softcap: scores s become softcap · tanh(s / softcap); 0 for none.
    """
    return _Ring.apply(q_THE, k_TGE, v_TGE, visible, length, group, scale, softcap)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THE: Tensor,
        k_TGE: Tensor,
        v_TGE: Tensor,
        visible: Visible,
        length: int,
        group: dist.ProcessGroup,
        scale: float,
        softcap: float,
    ) -> Tensor:
        ring = _Turns(group, length, q_THE.device)
        q = _by_kv_head(q_THE, k_TGE.shape[1])
        out, log_sum = torch.zeros_like(q), q.new_full(q.shape[:-1], float("-inf"))
        for places, block in ring.blocks(torch.stack((k_TGE, v_TGE))):
            k, v = block.float().transpose(1, 2).unbind(0)
            scores = _scores(q, k, visible(ring.own, places), scale, softcap)
            new_sum = torch.logaddexp(log_sum, scores.logsumexp(-1))
            reference = new_sum.masked_fill(new_sum.isneginf(), 0.0)
            weights = (scores - reference[..., None]).exp()
            out = out * (log_sum - reference).exp()[..., None] + torch.einsum("gqls,gse->gqle", weights, v)
            log_sum = new_sum
        ctx.save_for_backward(q_THE, k_TGE, v_TGE, out, log_sum)
        ctx.settings = visible, length, group, scale, softcap
        return _by_token(out).to(q_THE.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_THE, k_TGE, v_TGE, out, log_sum = ctx.saved_tensors
        visible, length, group, scale, softcap = ctx.settings
        ring = _Turns(group, length, q_THE.device)
        q = _by_kv_head(q_THE, k_TGE.shape[1])
        d_out = _by_kv_head(gradients[0], k_TGE.shape[1])
        delta = (d_out * out).sum(-1, keepdim=True)
        reference = log_sum.masked_fill(log_sum.isneginf(), 0.0)[..., None]
        d_q = torch.zeros_like(q)
        d_block = torch.zeros(2, *k_TGE.shape, device=q.device)  # travels with its block and is whole when home again
        for places, block in ring.blocks(torch.stack((k_TGE, v_TGE))):
            k, v = block.float().transpose(1, 2).unbind(0)
            scores = _scores(q, k, visible(ring.own, places), scale, softcap)
            weights = (scores - reference).exp()
            d_scores = weights * (torch.einsum("gqle,gse->gqls", d_out, v) - delta)
            if softcap:
                d_scores = d_scores * (1 - (scores.nan_to_num(neginf=0.0) / softcap).square())
            d_scores = d_scores * scale
            d_q += torch.einsum("gqls,gse->gqle", d_scores, k)
            d_k = torch.einsum("gqls,gqle->gse", d_scores, q)
            d_v = torch.einsum("gqls,gqle->gse", weights, d_out)
            d_block = ring.pass_on(d_block + torch.stack((d_k, d_v)).transpose(1, 2))()
        d_k, d_v = d_block.to(k_TGE.dtype).unbind(0)
        return _by_token(d_q).to(q_THE.dtype), d_k, d_v, None, None, None, None, None


def _scores(q: Tensor, k: Tensor, seen: Tensor, scale: float, softcap: float) -> Tensor:
    scores = torch.einsum("gqle,gse->gqls", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, float("-inf"))


def _by_kv_head(x_THE: Tensor, kv_heads: int) -> Tensor:
    """[T, H, E] → [G, H / G, T, E] in fp32: the query heads of each key-value head together."""
    tokens, heads, width = x_THE.shape
    return x_THE.float().view(tokens, kv_heads, heads // kv_heads, width).permute(1, 2, 0, 3)


def _by_token(x: Tensor) -> Tensor:
    """The inverse of `_by_kv_head`, up to the dtype."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


class _Turns:
    """The turns of a ring: in each, a rank works on the block of the rank one further back."""

    def __init__(self, group: dist.ProcessGroup, length: int, device: torch.device) -> None:
        self._group, self._degree, self._rank = group, group.size(), dist.get_rank(group)
        self._places = [sent(zigzag_indices(length, self._degree, rank), device) for rank in range(self._degree)]
        self.own = self._places[self._rank]

    def blocks(self, block: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Places and block of every rank, our own first; the next one travels while one is worked on."""
        for turn in range(self._degree):
            coming = self.pass_on(block) if turn + 1 < self._degree else None
            yield self._places[(self._rank - turn) % self._degree], block
            if coming:
                block = coming()

    def pass_on(self, block: Tensor) -> Callable[[], Tensor]:
        """Send a block to the next rank; the result waits for the one that comes from the rank before."""
        block, coming = block.contiguous(), torch.empty_like(block, memory_format=torch.contiguous_format)
        following, previous = ((self._rank + step) % self._degree for step in (1, -1))
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, block, dist.get_global_rank(self._group, following), self._group),
                dist.P2POp(dist.irecv, coming, dist.get_global_rank(self._group, previous), self._group),
            ]
        )

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return coming

        return wait
