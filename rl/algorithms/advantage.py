"""How much better than expected a rollout was, or each of its tokens: the arithmetic of every method's signal.

Of numbers only; `lockstep.rl.algorithms.samples` knows which method asks for which, and whose rollouts they are of.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lockstep.data.batch import Floats

Doubles = NDArray[np.float64]


def centred(rewards: Sequence[float], *, scale_by_deviation: bool) -> list[float]:
    """Rewards less their mean, divided by their standard deviation if wanted.

    With the division this is GRPO (Shao et al. 2024, §4.1.2), without it Dr. GRPO (Liu et al. 2025).
    """
    values = np.asarray(rewards, np.float64)
    values = values - values.mean() if len(values) else values
    deviation = values.std() if len(values) else 0.0
    return (values / (deviation + 1e-6) if scale_by_deviation and deviation > 0 else values).tolist()


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Each reward less the mean of the others: RLOO (Kool et al. 2019; Ahmadian et al. 2024, eq. 8), and 0 for one."""
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
    """Σ discount^k · reward of each token and those that follow, [C]."""
    found = np.asarray(rewards_C, np.float64).copy()
    for place in range(len(found) - 2, -1, -1):
        found[place] += discount * found[place + 1]
    return found


def generalised(rewards_C: Doubles, values_C: Doubles, *, discount: float, trace: float) -> tuple[Doubles, Doubles]:
    """Advantages and returns of each token, [C] each, where the last token ends all: GAE (Schulman et al. 2016).

    δ_t = r_t + γ V_{t+1} − V_t,  A_t = Σ (γλ)^k δ_{t+k},  R_t = A_t + V_t.

    Args:
        discount: γ.
        trace: λ.
    """
    following = np.append(values_C[1:], 0.0)
    advantages = returns(rewards_C + discount * following - values_C, discount * trace)
    return advantages, advantages + values_C


def whitened(parts: Sequence[Doubles], *, shift: bool = True) -> list[Doubles]:
    """Numbers of all parts divided by their deviation over all, less their mean if `shift`."""
    if not parts:
        return []
    whole = np.concatenate(parts)
    mean = whole.mean()
    scale = 1 / np.sqrt(whole.var() + 1e-8)
    return [(part - mean) * scale + (0.0 if shift else mean) for part in parts]


def overlong(length: int, limit: int, cache: float) -> float:
    """What a completion of so many tokens loses: 0 up to limit − cache, then evenly down to −1 at the limit.

    DAPO's soft overlong punishment (Yu et al. 2025, eq. 13); a length of exactly the limit, which may have cut the
    completion, gets −1.
    """
    return -min(1.0, max(0.0, (length - (limit - cache)) / cache))


def distance(logp_C: Floats | Doubles, reference_logp_C: Floats | Doubles, estimator: str) -> Doubles:
    """KL of each drawn token to the reference in nats, [C]; see `lockstep.model.objectives.kl`."""
    gap = np.asarray(reference_logp_C, np.float64) - np.asarray(logp_C, np.float64)
    return {"k1": -gap, "k2": gap**2 / 2, "k3": np.expm1(gap) - gap}[estimator]
