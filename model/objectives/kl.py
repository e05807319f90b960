"""KL divergence to a reference policy, estimated from log-probabilities of sampled tokens (k1, k2, k3); adaptive β.

With r = log π_ref − log π of a sampled token (Schulman, "Approximating KL divergence", 2020):

| | estimate | mean, tokens from π | gradient of its mean in the loss |
|---|---|---|---|
| k1 | −r | KL(π‖π_ref) | 0 |
| k2 | r²/2 | near it, for small r | ∇ KL(π‖π_ref) |
| k3 | exp(r) − 1 − r | KL(π‖π_ref) | ∇ KL(π_ref‖π) |

The last column is the mean of the gradient that autograd takes of the estimate, which is not the gradient of the mean:
the tokens' distribution moves too. Hence k1 is refused in the loss and right in the reward, k2 is right in the
loss, and k3 pulls towards the same optimum π_ref but weighs the distance the other way round.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class KL:
    """A KL penalty: β times the estimate, added to the loss or subtracted from the reward."""

    beta: float = 0.0
    estimator: Estimator = "k3"
    place: Literal["loss", "reward"] = "loss"

    def __post_init__(self) -> None:
        if self.beta and self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                "kl_estimator='k1' in the loss has a gradient whose mean is 0: use 'k2' or 'k3', or kl_place='reward'"
            )

    @property
    def in_loss(self) -> float:
        """β in the loss; 0 where the penalty is in the reward."""
        return self.beta if self.place == "loss" else 0.0

    @property
    def in_reward(self) -> float:
        """β in the reward; 0 where the penalty is in the loss."""
        return self.beta if self.place == "reward" else 0.0


def estimate(logp_K: Tensor, reference_logp_K: Tensor, estimator: Estimator) -> Tensor:
    """The KL estimate of each token in nats, [K], by k1, k2 or k3."""
    gap = reference_logp_K - logp_K
    match estimator:
        case "k1":
            return -gap
        case "k2":
            return gap.square() / 2
        case "k3":
            return gap.exp() - 1 - gap


def adapted(beta: float, measured: float, target: float, rate: float = 0.1) -> float:
    """Adaptive β: the coefficient after a step whose KL was `measured`; it changes by at most 2% at the default rate.

    Ziegler et al. 2019, §2.2: e = clip(KL / target − 1, ±0.2), β ← β (1 + rate · e).

    Args:
        measured, target: in the same unit, here nats a token.
    """
    error = min(max(measured / target - 1, -0.2), 0.2)
    return beta * (1 + rate * error)
