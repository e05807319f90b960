"""Updates of the policy, and of a critic, from groups of rollouts: rewards, estimates, advantages, gradient steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lockstep.data.batch import Floats, Ints, Sample
from lockstep.model.training.config import OptimizerConfig
from lockstep.rl.algorithms.aggregation import updates_of
from lockstep.rl.algorithms.config import RLConfig
from lockstep.rl.algorithms.estimates import columns, of_answers, of_tokens, with_experts, without_experts
from lockstep.rl.algorithms.rewards import Rewards, rewarded
from lockstep.rl.algorithms.samples import asked_for, samples_of, with_advantages
from lockstep.rl.remote import Call, Gather
from lockstep.rl.types import Advantaged, Estimated, Estimates, Judged, Rewarded
from lockstep.rl.workers.stubs import ModelWorker
from lockstep.rl.workers.worker_groups import ModelGroup


@dataclass(frozen=True)
class Models:
    """The models beside the policy, which learn or score; None where the method does not use one."""

    critic: ModelGroup | None = None
    critic_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    reward: ModelGroup | None = None
    """Scores answers, in the place of verdicts."""
    reference: ModelGroup | None = None
    """In processes of its own; without it the policy's ranks hold the reference."""
    teacher: ModelGroup | None = None
    """Scores tokens, in the place of the reference."""

    @property
    def by_role(self) -> dict[str, ModelGroup]:
        """The models that there are."""
        found = {"critic": self.critic, "reward": self.reward, "reference": self.reference, "teacher": self.teacher}
        return {role: model for role, model in found.items() if model}


@dataclass(frozen=True)
class Learned:
    """The groups and samples of a step, and the metrics of its updates."""

    groups: tuple[tuple[Advantaged, ...], ...]
    samples: list[Sample]
    metrics: dict[str, float]
    """Empty where nothing was learned."""


class Learner:
    """Trains the policy, and the critic where there is one, with the estimates of the models beside it."""

    def __init__(
        self,
        policy: ModelGroup,
        models: Models,
        gather: Gather,
        seed: int,
        rewards: Rewards,
    ) -> None:
        """
        Args:
            gather: waits for calls, while rollouts may go on.
            seed: of the order of samples in epochs of several updates.
            rewards: the terms of a rollout's reward, by task.
        """
        self._policy, self._models, self._gather, self._seed = policy, models, gather, seed
        self._rewards = rewards

    def enter(self, config: RLConfig) -> None:
        """Sets what a phase trains with, whether it begins or is resumed."""
        self._policy.enter_phase(config.optimizer, config.sampling.temperature or 1.0)

    def begin(self, config: RLConfig) -> None:
        """Begins a phase: resets the optimizers' moments; the reference is the policy as it is now."""
        has_own = config.reference.kind != "none" and not self._models.reference
        self._policy.begin_phase(config.reference if has_own else None)
        if self._models.critic:
            self._models.critic.begin_phase()

    def learn(
        self, step: int, groups: Sequence[Sequence[Rewarded]], teaching: Sequence[bool], config: RLConfig
    ) -> Learned:
        """Runs all updates of a step; none where nothing has a gradient.

        Args:
            teaching: whether each group has anything to learn from; what dynamic sampling replaced is estimated for
                the records alone.
        """
        compared = tuple(with_advantages(group, config) for group in self._estimated(groups, config))
        parts = samples_of(*asked_for(compared, teaching, config.prompts_per_step), config)
        order = int(np.random.default_rng([self._seed, step]).integers(1 << 62))
        reports = [self._update(step, samples, config) for samples in updates_of(parts, config, order)]
        if reports:
            self._gather([worker.call(ModelWorker.follow, step) for worker in self._policy.workers])
        return Learned(compared, [s for part in parts for s in part.samples], _joined(reports))

    def _update(self, step: int, samples: list[Sample], config: RLConfig) -> dict[str, float]:
        """One gradient step of the policy, and one of the critic beside it."""
        rate = config.optimizer.rate(step, config.steps)
        calls = self._policy.update(step, samples, config.objective, rate)
        ranks = len(calls)
        if self._models.critic:
            rate = self._models.critic_optimizer.rate(step, config.steps)
            calls += self._models.critic.update(step, without_experts(samples), config.critic_loss, rate)
        results = self._gather(calls)
        report = results[0].values | {"grad_norm": results[0].grad_norm}
        if self._models.critic:
            said = results[ranks]
            values = {name: value for name, value in said.values.items() if name != "memory_gb"}
            report |= values | {"critic_grad_norm": said.grad_norm}
        return report

    def rewarded(self, groups: Sequence[Sequence[Judged]], config: RLConfig) -> list[tuple[Rewarded, ...]]:
        """The groups with their rewards; where there is a reward model, by the scores that it gives them."""
        tasks = [group[0].rollout.prompt.task for group in groups]
        scored = zip(self._scored(groups), tasks, strict=True)
        return [rewarded(group, self._rewards.of(task), config.punishment) for group, task in scored]

    def _scored(self, groups: Sequence[Sequence[Judged]]) -> Sequence[Sequence[Judged]]:
        """The groups with the reward model's scores, where there is one."""
        if not self._models.reward:
            return groups
        rollouts = [s.rollout for group in groups for s in group]
        found = columns(self._gather(self._models.reward.score(of_answers(rollouts))), [1] * len(rollouts))
        scores = iter(found)
        return [[Judged(j.rollout, j.verdict, score=float(next(scores)[0])) for j in group] for group in groups]

    def _estimated(self, groups: Sequence[Sequence[Rewarded]], config: RLConfig) -> tuple[tuple[Estimated, ...], ...]:
        """The groups with the estimates that the method needs; the models compute at the same time."""
        rollouts = [s.rollout for group in groups for s in group]
        samples = of_tokens(rollouts)
        calls: list[Call[tuple[Ints, Floats]]] = []
        asked: dict[str, slice] = {}
        for name, model in self._asked(config):
            begun, beside = len(calls), name == "reference_logp" and model is self._policy
            asking = with_experts(samples, rollouts) if name == "proximal_logp" else samples
            calls += model.score(asking, "reference" if beside else "model")
            asked[name] = slice(begun, len(calls))
        results = self._gather(calls)
        lengths = [len(r.tokens) for r in rollouts]
        found: dict[str, list[Floats]] = {name: columns(results[part], lengths) for name, part in asked.items()}
        estimates = iter([Estimates(**{name: found[name][i] for name in found}) for i in range(len(rollouts))])
        return tuple(
            tuple(Estimated(r.rollout, r.verdict, r.reward, next(estimates), score=r.score) for r in group)
            for group in groups
        )

    def _asked(self, config: RLConfig) -> list[tuple[str, ModelGroup]]:
        """The estimates that a method needs, and the model that computes each."""
        models: dict[str, tuple[str, ModelGroup | None]] = {
            "proximal": ("proximal_logp", self._policy),
            "reference": ("reference_logp", self._models.teacher or self._models.reference or self._policy),
            "value": ("value", self._models.critic),
        }
        found = []
        needed: set[str] = {*config.scores, *(["reference"] if self._models.reference else [])}
        for score in sorted(needed):
            name, model = models[score]
            assert model is not None, f"{config.method} has no model for {score}"
            found.append((name, model))
        return found


def _joined(reports: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of several updates as one: means, and of peaks the highest."""
    if len(reports) == 1:
        return reports[0]
    peaks = {n: max if n.endswith("_max") or n == "memory_gb" else np.mean for n in (reports[0] if reports else {})}
    return {name: float(join([report[name] for report in reports])) for name, join in peaks.items()}
