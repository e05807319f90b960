"""Fused log-probabilities and entropy of target tokens: vocabulary-parallel, chunked over tokens.

bf16 logits are kept for the backward; fp32 logits exist for one block of tokens at a time, or one chunk in fp32 models.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.distributed.libraries import tensor_parallel
from lockstep.model.attention.spec import soft_capped
from lockstep.model.config import Numerics
from lockstep.model.ops.cpu import kernels
from lockstep.model.ops.exact.matmul import LARGER
from lockstep.model.ops.exact.reductions import gathered, in_order, log_sum_exp
from lockstep.model.ops.linear import PackedWeight, has_transposes, passing_transpose, project
from lockstep.model.ops.upcast import multiply, needs_upcast

CHUNKS: dict[Numerics, int] = {"fast": 256, "exact": LARGER[0]}
"""Tokens whose logits come out of one product, or out of one pass over tiles."""
BLOCK = 16
"""Tokens whose fp32 logits exist at one time: few, so that they stay in the processor's cache."""
PART = 2048
"""Of a vocabulary: columns of a chunk that are transposed at a time, so that they stay in the processor's cache."""
_IMPOSSIBLE = -1e30
"""Stands for log 0 where it is multiplied by a probability of 0."""


def local_logits(
    hidden_KD: Tensor,
    weight_VD: Tensor | PackedWeight,
    first: int,
    vocabulary: int,
    cap: float | None = None,
    numerics: Numerics = "fast",
) -> Tensor:
    """This rank's logits [K, V/tensor] in the compute dtype; padding of the vocabulary gets −∞.

    Args:
        cap: logits s become cap · tanh(s / cap) (Gemma 2).
    """
    logits = project(hidden_KD, weight_VD, numerics)
    if cap is not None:
        logits = soft_capped(logits, cap) if numerics == "fast" else soft_capped(logits.float(), cap).to(logits.dtype)
    if first + logits.shape[1] > vocabulary:
        logits[:, max(0, vocabulary - first) :] = float("-inf")
    return logits


class _TokenLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: Tensor,
        weight_VD: Tensor,
        targets_K: Tensor,
        vocabulary: int,
        temperature: float,
        cap: float | None,
        group: dist.ProcessGroup,
        numerics: Numerics,
        entropy: bool,
    ) -> tuple[Tensor, ...]:
        first, size = group.rank() * weight_VD.shape[0], CHUNKS[numerics]
        kept, logp, sums, entropies = [], [], [], []
        for hidden, targets in zip(hidden_KD.split(size), targets_K.split(size), strict=True):
            chunk = local_logits(hidden, weight_VD, first, vocabulary, cap, numerics)
            log_sum, at_target = reduced(chunk, targets - first, temperature, group, numerics)
            sums.append(log_sum)
            logp.append(at_target - log_sum)
            if entropy:
                entropies.append(_entropy(chunk, log_sum, temperature, group, numerics))
            if chunk.dtype != torch.float32:
                kept.append(chunk)
        log_sum_K = torch.cat(sums)
        found = (torch.cat(logp), log_sum_K, *([torch.cat(entropies)] if entropy else []))
        ctx.save_for_backward(hidden_KD, weight_VD, targets_K, *found[1:], *kept)
        ctx.settings = first, vocabulary, temperature, cap, size
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        results = len(gradients) - 1
        hidden_KD, weight_VD, targets_K = ctx.saved_tensors[:3]
        log_sum_K, *entropy_K = ctx.saved_tensors[3 : 3 + results]
        kept = ctx.saved_tensors[3 + results :]
        first, vocabulary, temperature, cap, size = ctx.settings
        d_hidden, d_weight = torch.zeros_like(hidden_KD), None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight_VD, dtype=torch.float32 if needs_upcast(weight_VD) else None)
        columns = (hidden_KD, d_hidden, log_sum_K, targets_K - first, *gradients, *entropy_K)
        for i, (hidden, d_chunk, *of_tokens) in enumerate(zip(*(c.split(size) for c in columns), strict=True)):
            chunk = kept[i] if kept else local_logits(hidden, weight_VD, first, vocabulary, cap)
            d_logits = _d_chunk(chunk, *of_tokens, temperature=temperature, cap=cap)
            d_chunk.copy_(multiply(torch.mm, d_logits, weight_VD))
            if d_weight is not None:
                _add_products(d_weight, d_logits, hidden)
        d_weight = None if d_weight is None else d_weight.to(weight_VD.dtype)
        return d_hidden, d_weight, None, None, None, None, None, None, None


def _add_products(d_weight_VD: Tensor, d_logits_KV: Tensor, hidden_KD: Tensor) -> None:
    """d_weight += d_logitsᵀ · hidden, in the dtype of d_weight."""
    if not has_transposes(d_weight_VD):
        dtype = d_weight_VD.dtype
        d_weight_VD.addmm_(d_logits_KV.to(dtype).t(), hidden_KD.to(dtype))
        return
    for part_VD, part_KV in zip(d_weight_VD.split(PART), d_logits_KV.split(PART, dim=1), strict=True):
        part_VD.addmm_(passing_transpose(part_KV), hidden_KD)


def _d_chunk(
    chunk: Tensor,
    log_sum: Tensor,
    local_targets: Tensor,
    gradient: Tensor,
    of_sum: Tensor,
    *of_entropy: Tensor,
    temperature: float,
    cap: float | None,
) -> Tensor:
    """The gradient of a chunk of logits; see `_d_logits`."""
    if cap is None and not of_entropy and kernels.usable(chunk.dtype, chunk.device):
        return kernels.logits_gradient(chunk, local_targets, log_sum, gradient, of_sum - gradient, temperature)
    d_logits = torch.empty_like(chunk)
    columns = (d_logits, chunk, log_sum, local_targets, gradient, of_sum, *of_entropy)
    for d_block, *given in zip(*(c.split(BLOCK) for c in columns), strict=True):
        d_block.copy_(_d_logits(*given, temperature=temperature, cap=cap))
    return d_logits


def _scaled(chunk: Tensor, temperature: float) -> Tensor:
    """The logits in fp32 over the temperature: always a copy, because the backward needs them as they are."""
    copy = chunk.to(torch.float32, copy=True)
    return copy if temperature == 1 else copy.div_(temperature)


def reduced(
    chunk: Tensor,
    local_targets: Tensor,
    temperature: float,
    group: dist.ProcessGroup,
    numerics: Numerics = "fast",
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and the target's logit over the whole vocabulary, [K] each in fp32 and over the temperature.

    Args:
        chunk: this rank's logits [K, V/tensor]; see `local_logits`.
        local_targets: [K], counted from this rank's first row of the vocabulary; outside of it on all ranks but one.
    """
    inside = (local_targets >= 0) & (local_targets < chunk.shape[1])
    picked = chunk.gather(1, local_targets.clamp(0, chunk.shape[1] - 1)[:, None])[:, 0].float() / temperature
    at_target = torch.where(inside, picked, torch.zeros_like(picked))
    if kernels.usable(chunk.dtype, chunk.device):
        log_sum = kernels.log_sums(chunk, temperature)
    else:
        over_row = partial(torch.logsumexp, dim=1) if numerics == "fast" else log_sum_exp
        log_sum = torch.cat([over_row(_scaled(block, temperature)) for block in chunk.split(BLOCK)])
    if group.size() > 1 and numerics == "exact":
        log_sums = gathered(log_sum, group)
        largest = torch.stack(log_sums).amax(0)
        log_sum = in_order([(each - largest).exp() for each in log_sums]).log() + largest
        at_target = in_order(gathered(at_target, group))
    elif group.size() > 1:
        largest = log_sum.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        summed = torch.stack([(log_sum - largest).exp(), at_target])
        dist.all_reduce(summed, group=group)
        log_sum, at_target = summed[0].log() + largest, summed[1]
    return log_sum, at_target


def _entropy(
    chunk: Tensor, log_sum: Tensor, temperature: float, group: dist.ProcessGroup, numerics: Numerics
) -> Tensor:
    """−Σ p log p over the whole vocabulary in nats, [K]."""
    parts = zip(chunk.split(BLOCK), log_sum.split(BLOCK), strict=True)
    local = torch.cat([_surprise(_scaled(block, temperature).sub_(sums[:, None])) for block, sums in parts])
    if group.size() > 1 and numerics == "exact":
        return in_order(gathered(local, group))
    if group.size() > 1:
        dist.all_reduce(local, group=group)
    return local


def _surprise(logp_KV: Tensor) -> Tensor:
    """−Σ p log p of the rows; what has probability 0 adds nothing."""
    return -(logp_KV.exp() * logp_KV.clamp_min(_IMPOSSIBLE)).sum(1)


def _d_logits(
    chunk: Tensor,
    log_sum: Tensor,
    local_targets: Tensor,
    gradient: Tensor,
    of_sum: Tensor,
    of_entropy: Tensor | None = None,
    entropy: Tensor | None = None,
    *,
    temperature: float,
    cap: float | None,
) -> Tensor:
    """((1[target] − softmax) · gradient + softmax · gradient of the log-sum-exp) / temperature · slope of the cap.

    With the entropy H also −softmax · (log softmax + H) · its gradient / temperature.
    """
    scale = (gradient / temperature)[:, None]
    spread = scale - (of_sum / temperature)[:, None]
    d_logits = _scaled(chunk, temperature).sub_(log_sum[:, None])
    if of_entropy is None or entropy is None:
        d_logits.exp_().mul_(-spread)
    else:
        above = d_logits.clamp_min(_IMPOSSIBLE).add_(entropy[:, None]).mul_((of_entropy / temperature)[:, None])
        d_logits.exp_().mul_(above.add_(spread).neg_())
    inside = (local_targets >= 0) & (local_targets < chunk.shape[1])
    # 0 is added for a target of another rank: to choose rows by `inside` would make the host wait for a device.
    places = local_targets.clamp(0, chunk.shape[1] - 1)[:, None]
    d_logits.scatter_add_(1, places, torch.where(inside[:, None], scale, 0.0))
    if cap is not None:  # tanh' = 1 − tanh²; a row of padding is −∞ and has no slope
        d_logits *= 1 - (chunk.float() / cap).clamp(-1, 1).square()
    return d_logits


def token_scores(
    hidden_KD: Tensor,
    weight_VD: Tensor,
    targets_K: Tensor,
    *,
    vocabulary: int,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
    cap: float | None = None,
    numerics: Numerics = "fast",
    entropy: bool = False,
) -> tuple[Tensor, ...]:
    """Log-probabilities of targets, log softmax(hidden · weightᵀ / temperature)[target], and the log-sum-exp.

    Each is [K] in fp32. Both are the same on every tensor rank and have gradients.

    Args:
        weight_VD: this rank's rows of the output projection, padding included.
        targets_K: token ids below `vocabulary`.
        cap: see `local_logits`.
        entropy: return a third, the entropy of softmax(…) in nats.
    """
    hidden_KD = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_KD, group)
    of = hidden_KD, weight_VD, targets_K
    found: tuple[Tensor, ...] = _TokenLogProb.apply(*of, vocabulary, temperature, cap, group, numerics, entropy)
    return found


def token_logprobs(
    hidden_KD: Tensor,
    weight_VD: Tensor,
    targets_K: Tensor,
    *,
    vocabulary: int,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
    cap: float | None = None,
    numerics: Numerics = "fast",
) -> Tensor:
    """The log-probabilities of targets alone: the first result of `token_scores`."""
    return token_scores(
        hidden_KD,
        weight_VD,
        targets_K,
        vocabulary=vocabulary,
        group=group,
        temperature=temperature,
        cap=cap,
        numerics=numerics,
    )[0]
