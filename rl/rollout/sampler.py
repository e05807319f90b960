"""The next token of each row of logits, and its log-probability under the policy.

The random number of a sample's token depends on (seed, sample, position) only, so the same sample comes out in any
batch and on any worker.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lockstep.rl.rollout.sampling import SamplingConfig


@dataclass(frozen=True)
class Draw:
    """The drawn tokens [B] and their log-probabilities [B] under the policy, in nats."""

    tokens: Tensor
    logp: Tensor


def uniforms(seed: int, samples: Sequence[int], positions: Sequence[int]) -> Tensor:
    """One number in [0, 1) for each (sample, position): splitmix64 (Steele et al. 2014) of the three in turn."""
    state = np.full(len(samples), seed & 0xFFFFFFFFFFFFFFFF, np.uint64)
    for part in (samples, positions):
        state = _mixed(state ^ _mixed(np.asarray(part, np.uint64)))
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mixed(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def draw(logits_BV: Tensor, uniform_B: Tensor, config: SamplingConfig) -> Draw:
    """One token a row, by inverting the cumulative distribution at a uniform number.

    With temperature 0 the policy is reported at temperature 1.
    """
    scaled = logits_BV.float()
    if config.temperature not in (0, 1):
        scaled = scaled / config.temperature
    tokens = scaled.argmax(-1) if config.temperature == 0 else _inverted(_truncated(scaled, config), uniform_B)
    logp = scaled.gather(1, tokens[:, None])[:, 0] - scaled.logsumexp(-1)
    return Draw(tokens, logp)


def _truncated(scaled: Tensor, config: SamplingConfig) -> Tensor:
    if 0 < config.top_k < scaled.shape[1]:
        kth = scaled.topk(config.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < kth, float("-inf"))
    if config.top_p < 1:
        ordered, order = scaled.softmax(-1).sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= config.top_p
        scaled = scaled.masked_fill(outside.gather(1, order.argsort(-1)), float("-inf"))
    return scaled


def _inverted(scaled: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds the uniform share of the total; never one of weight 0."""
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp()
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    wanted = (uniform_B.to(cumulative.device) * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp(max=scaled.shape[1] - 1)
