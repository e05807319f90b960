"""Where methods converge, on policies whose completions are all listed: most to π* ∝ π_ref · exp(R/β), some elsewhere.

Batches hold every completion, weighted by its probability, so that each step has the exact expectation of the gradient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.data.batch import Sample, sample
from lockstep.data.packing import documents, plan
from lockstep.model.objectives.kl import KL
from lockstep.model.objectives.objective import LossInputs, Objective, loss_inputs
from lockstep.model.objectives.pair_loss import PairLoss
from lockstep.model.objectives.token_loss import TokenLoss
from lockstep.model.objectives.value_loss import ValueLoss
from lockstep.rl.algorithms.advantage import best, distance, gae

BETA = 0.5
NEAR = 0.02
"""Total variation."""

CHOICES = 3
GENERATOR = np.random.default_rng(4)
REWARDS = GENERATOR.uniform(0, 1, CHOICES**2)


@dataclass(frozen=True)
class Problem:
    """A table of logits [contexts, choices], and of each of 9 completions the (context, choice) of each token."""

    reference: Tensor
    paths: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def length(self) -> int:
        return len(self.paths[0])

    def logp(self, table: Tensor) -> Tensor:
        """Of the tokens of all completions, [9, C]."""
        contexts, choices = torch.tensor(self.paths).unbind(-1)
        return table.log_softmax(1)[contexts, choices]

    def policy(self, table: Tensor) -> Tensor:
        """Probabilities of the completions, [9]."""
        return self.logp(table.detach()).sum(1).exp()

    def columns(self) -> LossInputs:
        """Of a row of all completions."""
        samples = [sample([0], range(i * 10 + 1, i * 10 + 1 + self.length)) for i in range(len(self.paths))]
        return loss_inputs(plan(documents(samples), budget=1000)[0].assembled(), torch.device("cpu"))

    def tilted(self, beta: float) -> Tensor:
        """π_ref · exp(R/β) / Z."""
        weight = self.policy(self.reference) * torch.tensor(
            np.exp((REWARDS - REWARDS.max()) / beta), dtype=torch.float32
        )
        return weight / weight.sum()


def drawn(*shape: int) -> Tensor:
    return torch.tensor(GENERATOR.standard_normal(shape), dtype=torch.float32)


ONE = Problem(0.7 * drawn(1, 9), tuple(((0, i),) for i in range(9)))
"""Completions of one token."""
TWO = Problem(0.7 * drawn(4, 3), tuple(((0, a), (1 + a, b)) for a in range(3) for b in range(3)))
"""Completions of two tokens: the second's probabilities depend on the first."""


def apart(a: Tensor, b: Tensor) -> float:
    """Total variation."""
    return (a - b).abs().sum().item() / 2


def descended(start: Tensor, loss_of: Callable[[Tensor], Tensor], steps: int = 150) -> Tensor:
    """What Adam makes of a table, with a rate that falls to 0."""
    table = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(table).backward()
        optimizer.step()
        schedule.step()
    return table.detach()


def grpo(problem: Problem, rule: TokenLoss) -> Tensor:
    """The policy that GRPO ends with."""
    columns, reference = problem.columns(), problem.logp(problem.reference)
    rewards = torch.tensor(REWARDS, dtype=torch.float32)

    def loss(table: Tensor) -> Tensor:
        logp, policy = problem.logp(table), problem.policy(table)
        cost = rule.kl.in_reward * torch.tensor(distance(logp.detach().numpy(), reference.numpy(), "k1")).sum(1)
        earned = rewards - cost.float()
        advantage = earned - (policy * earned).sum()
        return rule(logp.flatten(), filled(columns, problem, policy, logp, reference, advantage[:, None]))[0]

    return problem.policy(descended(problem.reference, loss))


def filled(
    columns: LossInputs, problem: Problem, policy: Tensor, logp: Tensor, reference: Tensor, advantage: Tensor
) -> LossInputs:
    def flat(values: Tensor) -> Tensor:
        return values.detach().expand(-1, problem.length).flatten()

    old = flat(logp)
    given = {"weight": flat(policy[:, None]), "advantage": flat(advantage), "old_logp": old, "proximal_logp": old}
    return replace(columns, **given, reference_logp=flat(reference))


def ppo(problem: Problem) -> Tensor:
    """The policy that PPO ends with: KL in the reward, a critic's table of values, gae advantages."""
    columns, reference = problem.columns(), problem.logp(problem.reference)
    contexts = torch.tensor(problem.paths)[..., 0]
    values = torch.zeros(len(problem.reference), requires_grad=True)
    critic = torch.optim.Adam([values], 0.05)

    def loss(table: Tensor) -> Tensor:
        logp, policy = problem.logp(table), problem.policy(table)
        rewards = -BETA * distance(logp.detach().numpy(), reference.numpy(), "k1")
        rewards[:, -1] += REWARDS
        old = values.detach()[contexts]
        found = [gae(r, v, discount=1.0, trace=0.95) for r, v in zip(rewards, old.numpy(), strict=True)]
        advantage, goal = (torch.tensor(np.array(part), dtype=torch.float32) for part in zip(*found, strict=True))
        now = filled(columns, problem, policy, logp, reference, advantage)
        told = replace(now, value=old.flatten(), returns=goal.flatten())
        for _ in range(3):
            critic.zero_grad()
            ValueLoss(0.2)(values[contexts].flatten(), told)[0].backward()
            critic.step()
        return TokenLoss()(logp.flatten(), now)[0]

    return problem.policy(descended(problem.reference, loss, 250))


def preferred(problem: Problem, rule: Objective) -> Tensor:
    """The policy that learns from all pairs, as often as Bradley and Terry's judge of rewards R prefers each way."""
    samples: list[Sample] = []
    members: list[int] = []
    reference = problem.logp(problem.reference)
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    for number, (better, worse) in enumerate(pairs):
        weight = 1 / (1 + math.exp(REWARDS[worse] - REWARDS[better])) / 36
        for place, of in enumerate((worse, better)):
            columns = {"weight": weight, "reference_logp": reference[of].numpy()}
            samples.append(sample([0], range(1, 1 + problem.length), **columns, group=number, preference=place))
            members.append(of)
    columns = loss_inputs(plan(documents(samples), budget=1000)[0].assembled(), torch.device("cpu"))
    return problem.policy(
        descended(problem.reference, lambda table: rule(problem.logp(table)[members].flatten(), columns)[0])
    )


def selected(problem: Problem, n: int) -> tuple[Tensor, Tensor]:
    """What likelihood makes of the best of n completions of the reference; and how these are distributed."""
    columns, reference = problem.columns(), problem.logp(problem.reference)
    policy = problem.policy(problem.reference)
    share = torch.zeros(9)
    for group in np.ndindex(*[9] * n):
        chosen = group[best([float(REWARDS[i]) for i in group], -math.inf).index(1.0)]
        share[chosen] += policy[list(group)].prod()
    ones = torch.ones(9, 1)
    rule = TokenLoss("reinforce", has_reference=False)

    def loss(table: Tensor) -> Tensor:
        logp = problem.logp(table)
        return rule(logp.flatten(), filled(columns, problem, share, logp, reference, ones))[0]

    return problem.policy(descended(problem.reference, loss)), share


PROBLEMS: Sequence[Problem] = (ONE, TWO)


def test_the_optimum_is_somewhere_else_than_the_reference() -> None:
    for problem in PROBLEMS:
        assert apart(problem.tilted(BETA), problem.policy(problem.reference)) > 0.1


@pytest.mark.parametrize("problem", PROBLEMS, ids=["one token", "two tokens"])
def test_kl_in_the_reward_leads_grpo_to_the_optimum(problem: Problem) -> None:
    assert apart(grpo(problem, TokenLoss(kl=KL(BETA, "k1", "reward"))), problem.tilted(BETA)) < NEAR


@pytest.mark.parametrize("problem", PROBLEMS, ids=["one token", "two tokens"])
def test_ppo_converges_to_the_optimum(problem: Problem) -> None:
    assert apart(ppo(problem), problem.tilted(BETA)) < NEAR


@pytest.mark.parametrize("problem", PROBLEMS, ids=["one token", "two tokens"])
def test_dpo_converges_to_the_optimum(problem: Problem) -> None:
    assert apart(preferred(problem, PairLoss("sigmoid", BETA)), problem.tilted(BETA)) < NEAR


def test_k2_in_the_loss_leads_to_the_optimum_of_single_tokens_only() -> None:
    """Of longer completions it leaves out what a token does to the KL of those that follow."""
    rule = TokenLoss(kl=KL(BETA, "k2"))
    assert apart(grpo(ONE, rule), ONE.tilted(BETA)) < NEAR
    assert apart(grpo(TWO, rule), TWO.tilted(BETA)) > NEAR


def test_k3_in_the_loss_leads_to_the_optimum_of_the_other_kl() -> None:
    """argmax E[R] − β KL(π_ref‖π) is π(y) = β π_ref(y) / (β + E[R] − R(y))."""
    found = grpo(ONE, TokenLoss(kl=KL(BETA, "k3")))
    rewards = torch.tensor(REWARDS, dtype=torch.float32)
    mean = (found * rewards).sum()
    assert apart(found, BETA * ONE.policy(ONE.reference) / (BETA + mean - rewards)) < NEAR / 10
    assert apart(found, ONE.tilted(BETA)) > NEAR


@pytest.mark.parametrize("problem", PROBLEMS, ids=["one token", "two tokens"])
def test_rejection_sampling_learns_the_best_of_n(problem: Problem) -> None:
    """Which is no tilt of the reference: F(y)^n − F(before y)^n, with F the reference's distribution by reward."""
    found, share = selected(problem, 3)
    order = np.argsort(REWARDS)
    cumulative = np.cumsum(problem.policy(problem.reference).numpy()[order])
    expected = np.diff(np.concatenate([[0], cumulative**3]))
    np.testing.assert_allclose(share.numpy()[order], expected, atol=1e-5)
    assert apart(found, share) < NEAR
    assert min(apart(found, problem.tilted(beta)) for beta in np.geomspace(0.05, 5, 60)) > NEAR
