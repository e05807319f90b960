"""Preferences against their papers' equations, and the same whatever the rows."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.data.batch import Sample
from lockstep.data.packing import documents, plan
from lockstep.model.objectives.objective import loss_inputs
from lockstep.model.objectives.pair_loss import PairLoss
from lockstep.rl.algorithms.samples import preference_samples
from tests.rl.drawn import floats, total

BETA = 0.3

Described = list[tuple[list[float], list[range]]]
"""For each ranking its preferences, and the numbers of the tokens of its answers."""


def rankings(seed: int, most: int, *, judged: bool) -> tuple[list[Sample], Described, int]:
    """Samples, what they are of, and the number of tokens in all."""
    draw = np.random.default_rng(seed)
    samples, described, first = [], [], 0
    for group in range(5):
        count = int(draw.integers(2, most + 1))
        prompt = [900 + group // 2] * 3  # two comparisons of one prompt
        lengths = draw.integers(1, 7, count)
        spans = [range(first + sum(lengths[:i]), first + sum(lengths[: i + 1])) for i in range(count)]
        preferences = [float(p) for p in draw.permutation(count)]
        reference = [floats(draw, int(n) + judged, 0.0 if judged else 0.5) for n in lengths]
        made = preference_samples(
            prompt,
            [list(s) for s in spans],
            preferences,
            group=group,
            groups=5,
            judged=judged,
            reference_logp=reference,
        )
        samples += made
        described.append((preferences, spans))
        first += int(sum(lengths))
    return samples, described, first


def naive(scores: list[list[Tensor]], described: Described, of: Callable) -> Tensor:
    """Mean over rankings of the mean over their pairs of of(better − worse)."""
    found = torch.zeros((), dtype=torch.float64)
    for z, (preferences, _) in zip(scores, described, strict=True):
        pairs = [(i, j) for i, j in itertools.permutations(range(len(z)), 2) if preferences[i] > preferences[j]]
        found = found + sum(of(z[i] - z[j]) for i, j in pairs) / len(pairs) / len(described)
    return found


def log_ratios(logp: Tensor, samples: list[Sample], described: Described) -> list:
    by_first = {int(s.completion[0]): s for s in samples}
    return [
        [
            sum(logp[n].double() - float(r) for n, r in zip(span, by_first[span[0]].reference_logp, strict=True))
            for span in spans
        ]
        for _, spans in described
    ]


LOSSES: dict[str, tuple[PairLoss, Callable[[Tensor], Tensor]]] = {
    "dpo": (PairLoss("sigmoid", BETA), lambda x: -torch.log(1 / (1 + torch.exp(-BETA * x)))),
    "conservative": (
        PairLoss("sigmoid", BETA, smoothing=0.2),
        lambda x: -0.8 * torch.log(1 / (1 + torch.exp(-BETA * x))) - 0.2 * torch.log(1 / (1 + torch.exp(BETA * x))),
    ),
    "ipo": (PairLoss("ipo", BETA), lambda x: (x - 1 / (2 * BETA)) ** 2),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("most", [2, 4])
def test_pairs_of_log_ratios(name: str, most: int) -> None:
    rule, of = LOSSES[name]
    samples, described, count = rankings(most, most, judged=False)
    logp = torch.randn(count, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, report = total(samples, logp, rule)
    scores = log_ratios(logp, samples, described)
    expected = naive(scores, described, of)
    found, wanted = (torch.autograd.grad(value, logp)[0] for value in (loss, expected))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert report["accuracy"] == pytest.approx(naive(scores, described, lambda x: (x > 0).double()).item())
    assert report["margin"] == pytest.approx(naive(scores, described, lambda x: BETA * x).item(), rel=1e-5)
    for budget, ranks in ((1, 1), (20, 2), (1000, 3)):
        other, _ = total(samples, logp, rule, budget=budget, ranks=ranks)
        assert other.item() == pytest.approx(loss.item(), rel=1e-6)
        np.testing.assert_allclose(torch.autograd.grad(other, logp)[0], found, atol=1e-7)


@pytest.mark.parametrize("kind", ["sigmoid", "plackett_luce"])
def test_a_reward_model_reads_the_value_at_the_last_token(kind: str) -> None:
    """Bradley–Terry of all pairs (Ouyang et al. 2022, eq. 1), or the likelihood of whole rankings (Plackett–Luce)."""
    samples, described, _ = rankings(3, 4, judged=True)
    values = torch.randn(len(samples), generator=torch.Generator().manual_seed(0)).requires_grad_()
    order = {int(s.completion[-2]): i for i, s in enumerate(samples)}

    for budget in (1, 30, 1000):
        loss = torch.zeros(())
        for row in (planned.assembled() for planned in plan(documents(samples), budget=budget)):
            last = [int(row.tokens[p]) for p in row.predictors]  # the value is read where the answer ends
            loss = loss + PairLoss(kind)(values[[order[n] for n in last]], loss_inputs(row, torch.device("cpu")))[0]
        scores = [[values[order[span[-1]]].double() for span in spans] for _, spans in described]
        expected = (
            naive(scores, described, lambda x: torch.log1p(torch.exp(-x)))
            if kind == "sigmoid"
            else sum(plackett_luce(z, p) for z, (p, _) in zip(scores, described, strict=True)) / len(described)
        )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        found, wanted = (torch.autograd.grad(value, values)[0] for value in (loss, expected))
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def plackett_luce(scores: list[Tensor], preferences: list[float]) -> Tensor:
    """−log of the probability of drawing the answers from best to worst, each among those that are left."""
    best_first = [z for _, z in sorted(zip(preferences, scores, strict=True), key=lambda pair: -pair[0])]
    return -sum(torch.log(z.exp() / sum(r.exp() for r in best_first[i:])) for i, z in enumerate(best_first))  # type: ignore[return-value]


def test_a_ranking_of_two_is_a_pair() -> None:
    samples, _, count = rankings(2, 2, judged=False)
    logp = torch.randn(count, generator=torch.Generator().manual_seed(0))
    pair, ranking = (total(samples, logp, PairLoss(kind, BETA))[0].item() for kind in ("sigmoid", "plackett_luce"))
    assert math.isclose(pair, ranking, rel_tol=1e-6)
