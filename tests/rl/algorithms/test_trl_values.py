"""Losses and gradient norms that TRL 1.16.0 computes, on a table of log-probabilities that a formula gives.

The numbers are those of its `GRPOTrainer._compute_loss` on the same tables in float64, with a mean over tokens for
DAPO, CISPO and the truncated correction, over sequences for GRPO and GSPO, and over a constant length for Dr. GRPO.
"""

import numpy as np
import pytest
import torch

from lockstep.data.batch import Floats, Sample, sample
from lockstep.model.objectives.importance_ratio import Clip, Correction
from lockstep.model.objectives.kl import KL
from lockstep.model.objectives.token_loss import TokenLoss
from lockstep.rl.algorithms.aggregation import weighted
from lockstep.rl.algorithms.methods import Aggregation
from tests.rl.drawn import total

PLACES = np.arange(20.0).reshape(4, 5)
LENGTHS = (5, 3, 4, 2)
ADVANTAGES = (1.2, -0.7, 0.4, -0.9)
OLD = -1.5 + 0.9 * np.sin(PLACES)
LOGP = OLD + 0.4 * np.sin(3 * PLACES + 1)
REFERENCE = OLD + 0.3 * np.cos(2 * PLACES)
BEHAVIOUR = OLD + 0.2 * np.cos(5 * PLACES)

CASES: dict[str, tuple[TokenLoss, Aggregation, float, float]] = {
    "grpo": (TokenLoss(kl=KL(0.04)), "sequences", 0.0179914627, 0.2161121306),
    "dr_grpo": (TokenLoss(), "constant", -0.1842744717, 0.1326577609),
    "dapo": (TokenLoss(clip=Clip(0.2, 0.28)), "tokens", -0.2802690851, 0.1927717154),
    "cispo": (TokenLoss("cispo", clip=Clip(1.0, 0.3)), "tokens", 0.3799934198, 0.2525507022),
    "gspo": (TokenLoss(level="sequence", clip=Clip(0.05, 0.05)), "sequences", -0.0230121582, 0.1929350622),
    "truncated": (TokenLoss(correction=Correction(high=1.1)), "tokens", -0.2705845645, 0.1786846926),
}


def samples_of(behaviour: Floats, aggregation: Aggregation) -> list[Sample]:
    samples = []
    for i, (length, advantage) in enumerate(zip(LENGTHS, ADVANTAGES, strict=True)):
        columns = {
            "old_logp": behaviour[i, :length],
            "proximal_logp": OLD[i, :length],
            "reference_logp": REFERENCE[i, :length],
        }
        completion = (5 * i + np.arange(length)).tolist()
        samples.append(sample([99], completion, advantage=advantage, **columns))
    return weighted(samples, aggregation, 5)


@pytest.mark.parametrize("name", CASES)
def test_a_loss_equals_that_of_trl(name: str) -> None:
    rule, aggregation, loss, norm = CASES[name]
    logp = torch.tensor(LOGP.ravel(), dtype=torch.float32, requires_grad=True)
    found, _ = total(samples_of(BEHAVIOUR if rule.correction else OLD, aggregation), logp, rule)
    (gradient,) = torch.autograd.grad(found, logp)
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert gradient.norm().item() == pytest.approx(norm, abs=1e-6)
