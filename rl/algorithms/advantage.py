"""Advantage estimators: group baselines, leave-one-out, best-of-N, returns, GAE, whitening, and the KL of tokens.

Functions of numbers alone; `lockstep.rl.algorithms.samples` applies them to rollouts, as the method says.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lockstep.data.batch import Floats

Doubles = NDArray[np.float64]


def centred(rewards: Sequence[float], *, scale_by_deviation: bool) -> list[float]:
    """Rewards less their mean, and with `scale_by_deviation` divided by their population standard deviation + 1e-6.

    With the division this is GRPO (Shao et al. 2024, §4.1.2), without it Dr. GRPO (Liu et al. 2025).
    """
    values = np.asarray(rewards, np.float64)
    values = values - values.mean() if len(values) else values
    deviation = values.std() if len(values) else 0.0
    return (values / (deviation + 1e-6) if scale_by_deviation and deviation > 0 else values).tolist()


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Each reward less the mean of the others; 0 for a single one: RLOO (Kool et al. 2019; Ahmadian et al. 2024, eq.
    8)."""
    values = np.asarray(rewards, np.float64)
    others = len(values) - 1
    return ((values - values.mean()) * (len(values) / others) if others > 0 else values * 0).tolist()


def best(rewards: Sequence[float], above: float) -> list[float | None]:
    """1 for the first of the highest reward, if it is above a bound, and None for the others: best of N (RAFT, Dong et
    al. 2023, algorithm 1)."""
    values: list[float | None] = [None] * len(rewards)
    if rewards and max(rewards) > above:
        values[int(np.argmax(rewards))] = 1.0
    return values


def returns(rewards_C: Sequence[float] | Doubles, discount: float = 1.0) -> Doubles:
    """Discounted returns of each token, [C]: Σ_k discount^k · reward_{t+k}."""
    found = np.asarray(rewards_C, np.float64).copy()
    for place in range(len(found) - 2, -1, -1):
        found[place] += discount * found[place + 1]
    return found


def gae(rewards_C: Doubles, values_C: Doubles, *, discount: float, trace: float) -> tuple[Doubles, Doubles]:
    """Generalised advantage estimates (GAE, Schulman et al. 2016) and returns of each token, [C] each.

    The episode ends with the last token:

    δ_t = r_t + γ V_{t+1} − V_t,  A_t = Σ (γλ)^k δ_{t+k},  R_t = A_t + V_t.

    Args:
        discount: γ.
        trace: λ.
    """
    following = np.append(values_C[1:], 0.0)
    advantages = returns(rewards_C + discount * following - values_C, discount * trace)
    return advantages, advantages + values_C


def whitened(parts: Sequence[Doubles], *, shift: bool = True) -> list[Doubles]:
    """The parts normalised by mean and standard deviation over all of them; without `shift` the mean stays."""
    if not parts:
        return []
    whole = np.concatenate(parts)
    mean = whole.mean()
    scale = 1 / np.sqrt(whole.var() + 1e-8)
    return [(part - mean) * scale + (0.0 if shift else mean) for part in parts]


def overlong(length: int, limit: int, cache: float) -> float:
    """DAPO's soft overlong punishment: 0 up to limit − cache tokens, then linearly down to −1 at the limit.

    Yu et al. 2025, eq. 13. A length of exactly the limit, which may have cut the completion, gets −1.
    """
    return -min(1.0, max(0.0, (length - (limit - cache)) / cache))


def distance(logp_C: Floats | Doubles, reference_logp_C: Floats | Doubles, estimator: str) -> Doubles:
    """Estimates the KL to the reference at each sampled token, in nats, [C]; see `lockstep.model.objectives.kl`."""
    gap = np.asarray(reference_logp_C, np.float64) - np.asarray(logp_C, np.float64)
    return {"k1": -gap, "k2": gap**2 / 2, "k3": np.expm1(gap) - gap}[estimator]
