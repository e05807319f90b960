"""Rollout–trainer mismatch: differences of log-probabilities, KL and differing bits."""

import torch
from torch import Tensor

from lockstep.model.objectives.objective import LossInputs, Report, token_mean


def mismatch_metrics(logp_K: Tensor, inputs: LossInputs) -> Report:
    """Metrics of how far log-probabilities are from those that rollouts reported for the same tokens.

    Returns:
        mismatch_mean and mismatch_max of |Δ log p|, mismatch_kl (nats a token, of the rollout's policy to this one, by
        the k3 estimator), and mismatch_bits: in which the fp32 numbers differ. All are over the tokens that are trained
        on, and means are `token_mean`s.
    """
    counted = inputs.weight != 0
    delta = logp_K - inputs.old_logp
    gap = delta.abs()[counted]
    return {
        "mismatch_mean": token_mean(delta.abs(), inputs),
        "mismatch_max": largest(gap),
        "mismatch_kl": token_mean(delta.exp() - 1 - delta, inputs),
        "mismatch_bits": differing_bits(logp_K[counted], inputs.old_logp[counted]),
    }


def largest(values: Tensor) -> Tensor:
    """The maximum of a tensor, or 0 where it is empty."""
    return values.max() if values.numel() else values.new_zeros(())


def differing_bits(a: Tensor, b: Tensor) -> Tensor:
    """The number of bits in which two fp32 tensors differ."""
    different = a.view(torch.int32) ^ b.view(torch.int32)
    return sum(((different >> place) & 1).sum() for place in range(32))  # type: ignore[return-value]
