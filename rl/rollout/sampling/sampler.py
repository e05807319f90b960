"""Samples one token from each row of logits: temperature, top-k, top-p, min-p, penalties and bias, row by row.

Two distributions matter. The policy is softmax(logits / temperature) over the whole vocabulary, which is what the
trainer computes; at temperature 0 it is the policy at temperature 1. The sampling distribution is what a token was
drawn from, after penalties, bias and truncation. The random number of a sample's token depends on (seed, sample,
position) only, so the same sample comes out in any batch and on any worker.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lockstep.model.ops.cpu import kernels
from lockstep.rl.rollout.config import SamplingParams

LANE = 256
"""Tokens whose weights are added up before the cumulative sum: a draw finds the lane, then the token in it."""

CANDIDATES = 1024
"""Likeliest tokens among which the end of a nucleus is looked for first; a full sort takes many times as long."""


@dataclass(frozen=True)
class Row:
    """What decides, together with its logits, which token a row draws."""

    sampling: SamplingParams
    uniform: float
    """In [0, 1); see `uniforms`."""
    prompt: Sequence[int] = ()
    completion: Sequence[int] = ()
    forbidden: Sequence[int] = ()
    """Tokens that may not be drawn, because they would end the completion too early."""
    allowed: np.ndarray | None = None
    """Whether each token may be drawn, bool [V], where the completion is written in a grammar."""

    @property
    def policy_temperature(self) -> float:
        """Temperature of the policy: 1 where decoding is greedy."""
        return self.sampling.temperature or 1.0

    @property
    def is_plain(self) -> bool:
        """Whether the sampling distribution equals the policy."""
        asked = self.sampling
        truncates = asked.top_k or asked.top_p < 1 or asked.min_p
        return bool(asked.temperature) and not truncates and not self.alters

    @property
    def alters(self) -> bool:
        """Whether penalties, bias, forbidden tokens or a grammar change the logits before the temperature does."""
        asked = self.sampling
        penalties = asked.frequency_penalty or asked.presence_penalty or asked.repetition_penalty != 1
        return bool(penalties or asked.logit_bias or self.forbidden) or self.allowed is not None


_NO_NUMBERS = "the model's logits are not numbers"


@dataclass(frozen=True)
class Draw:
    """The drawn tokens [B] and their log-probabilities [B] in nats."""

    tokens: Tensor
    sampling_logp: Tensor
    """Under the sampling distribution; NaN where that is the policy."""
    supports: tuple[tuple[int, ...], ...]
    """Of rows that ask for it and were truncated: the tokens of positive probability."""


def uniforms(seeds: Sequence[int], samples: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One number in [0, 1) for each (seed, sample, position): splitmix64 (Steele et al. 2014) of the three in turn."""
    state = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], np.uint64)
    for part in (samples, positions):
        state = _mixed(state ^ _mixed(np.asarray(part, np.uint64)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def draw_isolated(logits_BV: Tensor, rows: Sequence[Row]) -> tuple[Draw, dict[int, Exception]]:
    """As `draw`, but a row that fails costs no other row a bit: also returns the errors, by the numbers of their rows.

    What is drawn for rows that failed means nothing.
    """
    try:
        return draw(logits_BV, rows), {}
    except Exception:
        failed = {i: error for i, row in enumerate(rows) if (error := _error(logits_BV[i : i + 1], row)) is not None}
        if not failed:
            raise
    stand_in = Row(SamplingParams(), 0.0)
    logits_BV = logits_BV.clone()
    logits_BV[list(failed)] = 0
    return draw(logits_BV, [stand_in if i in failed else row for i, row in enumerate(rows)]), failed


def _error(logits_1V: Tensor, row: Row) -> Exception | None:
    """What drawing this row alone raises."""
    try:
        draw(logits_1V, [row])
    except Exception as error:
        return error
    return None


def draw(logits_BV: Tensor, rows: Sequence[Row]) -> Draw:
    """Draw one token a row by inverse transform sampling, at the row's uniform number.

    Raises:
        FloatingPointError: when logits are not numbers, or options forbid all tokens of a row.
    """
    device = logits_BV.device
    tokens = torch.empty(len(rows), dtype=torch.long, device=device)
    sampling_logp = torch.full((len(rows),), float("nan"), device=device)
    supports: list[tuple[int, ...]] = [()] * len(rows)
    plain = [i for i, row in enumerate(rows) if row.is_plain]
    if plain:
        tokens[plain] = _plain(logits_BV, plain, [rows[i] for i in plain])
    rest = [i for i, row in enumerate(rows) if not row.is_plain]
    if rest:
        chosen = [rows[i] for i in rest]
        scaled = _over_temperature(_altered(_picked(logits_BV, rest), chosen), chosen)
        if not _are_numbers(scaled):
            given = _are_numbers(_picked(logits_BV, rest))
            raise FloatingPointError("the options leave no token to draw" if given else _NO_NUMBERS)
        scaled = _truncated(scaled, chosen)
        tokens[rest], share = _inverted(_weights(scaled), _uniform(chosen, device))
        greedy = torch.tensor([not row.sampling.temperature for row in chosen], device=device)
        sampling_logp[rest] = share.masked_fill(greedy, 0.0)
        tokens[rest] = torch.where(greedy, scaled.argmax(-1), tokens[rest])
        for i, row, logits in zip(rest, chosen, scaled, strict=True):
            if row.sampling.support:
                supports[i] = tuple(torch.nonzero(logits > float("-inf"))[:, 0].tolist())
    return Draw(tokens, sampling_logp, tuple(supports))


def _are_numbers(logits_BV: Tensor) -> bool:
    """Whether no row's largest logit is NaN or infinite."""
    return bool(logits_BV.amax(-1).isfinite().all())


def likeliest(logits_V: Tensor, log_sum: Tensor, row: Row) -> tuple[tuple[int, float], ...]:
    """The `logprobs` likeliest tokens of a row, likeliest first, with their log-probabilities under the policy."""
    best = (logits_V.float() / row.policy_temperature).topk(min(row.sampling.logprobs, len(logits_V)))
    return tuple(zip(best.indices.tolist(), (best.values - log_sum).tolist(), strict=True))


def _plain(logits_BV: Tensor, places: list[int], rows: Sequence[Row]) -> Tensor:
    """Draws from the policy itself."""
    if kernels.usable(logits_BV.dtype, logits_BV.device):
        return kernels.draw(logits_BV, places, [r.policy_temperature for r in rows], [r.uniform for r in rows])
    picked = _picked(logits_BV, places)
    if not _are_numbers(picked):
        raise FloatingPointError(_NO_NUMBERS)
    weights = _weights(_over_temperature(picked, rows))
    return _inverted(weights, _uniform(rows, logits_BV.device))[0]


def over_support(logits_KV: Tensor, supports: Sequence[Sequence[int]], targets_K: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [K] of target tokens, each normalised over the tokens that it was drawn among.

    With `Rollout.supports` on both sides of an importance ratio, the ratio is exact in spite of a truncation: the
    policy that is compared could draw the same tokens as the one that drew (an empty support stands for all).
    """
    scaled = logits_KV.float() / temperature
    hidden = torch.zeros(scaled.shape, dtype=torch.bool, device=scaled.device)
    for row, support in zip(hidden, supports, strict=True):
        if support:
            row.fill_(True)
            row[list(support)] = False
    scaled = scaled.masked_fill(hidden, float("-inf"))
    return scaled.gather(1, targets_K[:, None])[:, 0] - scaled.logsumexp(-1)


def _picked(logits_BV: Tensor, rows: list[int]) -> Tensor:
    """A copy of some rows in fp32."""
    part = logits_BV if len(rows) == len(logits_BV) else logits_BV[rows]
    return part.to(torch.float32, copy=part is logits_BV)


def _uniform(rows: Sequence[Row], device: torch.device) -> Tensor:
    return torch.tensor([row.uniform for row in rows], dtype=torch.float64, device=device)


def _over_temperature(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    temperatures = [row.policy_temperature for row in rows]
    if any(t != 1 for t in temperatures):
        logits /= torch.tensor(temperatures, device=logits.device)[:, None]
    return logits


def _altered(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Penalties on tokens seen (Keskar et al. 2019, section 4.1) and written, bias, forbidden tokens, and a grammar."""
    for line, row in zip(logits, rows, strict=True):
        if not row.alters:
            continue
        asked = row.sampling
        if asked.repetition_penalty != 1:
            seen = torch.tensor(sorted({*row.prompt, *row.completion}), dtype=torch.long, device=line.device)
            had = line[seen]
            line[seen] = torch.where(had > 0, had / asked.repetition_penalty, had * asked.repetition_penalty)
        if row.completion and (asked.frequency_penalty or asked.presence_penalty):
            written = Counter(row.completion)
            taken = [asked.presence_penalty + asked.frequency_penalty * count for count in written.values()]
            line[list(written)] -= torch.tensor(taken, device=line.device)
        if asked.logit_bias:
            line[list(asked.logit_bias)] += torch.tensor(list(asked.logit_bias.values()), device=line.device)
        line[list(row.forbidden)] = float("-inf")
        if row.allowed is not None:
            line.masked_fill_(torch.from_numpy(~row.allowed).to(line.device), float("-inf"))
    return logits


def _truncated(scaled: Tensor, rows: Sequence[Row]) -> Tensor:
    """−∞ for what top-k, of that top-p, of that min-p cut off; of equals at the edge all stay.

    Each rule keeps the tokens from some logit upwards, so all three together are one bound: it depends on the values of
    the row alone, not on an order of equal ones, nor on other rows.
    """
    cut = [i for i, r in enumerate(rows) if r.sampling.temperature and _truncates(r.sampling)]
    if not cut:
        return scaled
    part = scaled[cut]
    bounds = _bounds(part, [rows[i].sampling for i in cut])
    scaled[cut] = part.masked_fill_(part < bounds[:, None], float("-inf"))
    return scaled


def _truncates(asked: SamplingParams) -> bool:
    return bool(asked.top_k or asked.top_p < 1 or asked.min_p)


def _bounds(scaled: Tensor, asked: Sequence[SamplingParams]) -> Tensor:
    """The smallest logit [B] that each row keeps."""
    size = scaled.shape[1]
    by_rank = any(a.top_k or a.top_p < 1 for a in asked)
    wanted = min(size, max(CANDIDATES, *(a.top_k for a in asked))) if by_rank else 1
    ordered = scaled.topk(wanted, dim=-1).values
    totals = ordered[:, 0] + _cumulative(_lanes(_weights(scaled)))[:, -1].log()
    found = []
    for line, best, total, a in zip(scaled, ordered, totals, asked, strict=True):
        bound = best[0] + math.log(a.min_p) if a.min_p else best.new_tensor(float("-inf"))
        if 0 < a.top_k < size:
            best = best[: int((best >= best[a.top_k - 1]).sum())]
            bound, total = torch.maximum(bound, best[-1]), best.double().logsumexp(-1)
        if a.top_p < 1:
            bound = torch.maximum(bound, _nucleus(line, best, total, a.top_p))
        found.append(bound)
    return torch.stack(found)


def _nucleus(line: Tensor, best: Tensor, total: Tensor, top_p: float) -> Tensor:
    """The smallest logit of the likeliest tokens whose probabilities add up to top_p (Holtzman et al. 2020, eq. 2).

    Args:
        best: the largest logits of the row, in order; where they do not suffice, all are put in order.
    """
    short = int(((best - total).exp().cumsum(-1) < top_p).sum())
    if short < len(best):
        return best[short]
    return best[-1] if len(best) == len(line) else _nucleus(line, line.sort(descending=True).values, total, top_p)


def _weights(scaled: Tensor) -> Tensor:
    """Probabilities up to a factor; 1 for the likeliest token."""
    return (scaled - scaled.amax(-1, keepdim=True)).exp_()


def _lanes(weights: Tensor) -> Tensor:
    """[B, lanes, LANE], filled up with 0."""
    padding = -weights.shape[1] % LANE
    padded = torch.nn.functional.pad(weights, (0, padding)) if padding else weights
    return padded.view(len(weights), -1, LANE)


def _cumulative(lanes: Tensor) -> Tensor:
    """Weights up to the end of each lane [B, lanes]: one order of additions, however many rows there are."""
    return lanes.sum(-1, dtype=torch.float64).cumsum(-1)


def _inverted(weights: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative weight exceeds the uniform share of the total, and its log-probability.

    It is never one of weight 0.
    """
    lanes = _lanes(weights)
    cumulative = _cumulative(lanes)
    wanted = (uniform_B * cumulative[:, -1])[:, None]
    lane = _first_above(cumulative, wanted)
    before = torch.where(lane > 0, cumulative.gather(1, (lane - 1).clamp(min=0)), torch.zeros_like(wanted))
    own = lanes[torch.arange(len(lanes), device=lanes.device), lane[:, 0]]
    place = _first_above(own.cumsum(-1, dtype=torch.float64), wanted - before)
    # Rounding may put the wanted share just behind the lane's end: its last token of positive weight is meant then.
    last = LANE - 1 - (own > 0).flip(-1).int().argmax(-1, keepdim=True)
    tokens = (lane * LANE + torch.minimum(place, last))[:, 0]
    shares = weights.gather(1, tokens[:, None])[:, 0].double() / cumulative[:, -1]
    return tokens, shares.log().float()


def _first_above(cumulative: Tensor, wanted: Tensor) -> Tensor:
    """The first place whose cumulative weight exceeds what is wanted [B, 1]."""
    return torch.searchsorted(cumulative, wanted, right=True).clamp(max=cumulative.shape[1] - 1)
