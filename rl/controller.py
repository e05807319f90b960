"""Verifier-based reinforcement learning as the algorithm reads: write, judge, compare, learn, hand over."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from lockstep.data.batch import Sample, documents, sample
from lockstep.data.problems import Problem, Split, TaskConfig
from lockstep.data.tokenizer import Tokenizer
from lockstep.model.loss import nll
from lockstep.rl.actors import Policy, Rollouts, Verifiers
from lockstep.rl.advantage import teaches, with_advantages
from lockstep.rl.recipes import RLConfig, SupervisedConfig
from lockstep.rl.rollout.sampling import SamplingConfig
from lockstep.rl.types import Prompt, Rollout, Scored
from lockstep.rl.verifiers.verdict import Outcome


@dataclass(frozen=True)
class StepRecord:
    """What one step of a phase reports."""

    phase: str
    step: int
    metrics: dict[str, float]
    scored: tuple[Scored, ...] = ()


class Controller:
    """Runs phases of training on its actors; owns nothing but the order of things."""

    def __init__(
        self,
        policy: Policy,
        rollouts: Rollouts,
        verifiers: Verifiers,
        *,
        tokenizer: Tokenizer,
        task: TaskConfig,
        split: Split,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy, self._rollouts, self._verifiers = policy, rollouts, verifiers
        self._tokenizer, self._task, self._seed, self._clock = tokenizer, task, seed, clock
        self._train, self._held_out = self._prompts(split.train), self._prompts(split.held_out)

    def evaluate(self, max_new_tokens: int) -> list[Scored]:
        """Greedy completions of the held-out problems, with their verdicts."""
        return self._scored(self._held_out, SamplingConfig(temperature=0, max_new_tokens=max_new_tokens), 1, 0)

    def supervised(self, config: SupervisedConfig) -> Iterator[StepRecord]:
        """Learn the answers to training problems, then give the weights to the rollout workers."""
        self._policy.begin_phase(keep_reference=False)
        for step in range(1, config.steps + 1):
            started = self._clock()
            prompts = self._draw(self._train, config.problems_per_step, step, "sft")
            samples = _weighted([self._demonstration(p) for p in prompts])
            result = self._policy.update(step, samples, nll, config.optimizer.rate(step, config.steps))
            seconds = self._clock() - started
            speed = {"train_tokens_per_second": _computed(samples) / seconds, "step_seconds": seconds}
            yield StepRecord("sft", step, result.values | {"grad_norm": result.grad_norm} | speed)
        self._rollouts.receive(self._policy)

    def reinforce(self, config: RLConfig) -> Iterator[StepRecord]:
        """Verifier-based policy gradients; every step ends with the rollout workers on the new weights."""
        self._policy.begin_phase(keep_reference=True)
        for step in range(1, config.steps + 1):
            clock = _Stopwatch(self._clock)
            prompts = self._draw(self._train, config.prompts_per_step, step, "rl")
            seed = int(np.random.default_rng([self._seed, step]).integers(1 << 62))
            rollouts = self._rollouts.generate(prompts, config.sampling, config.group_size, seed)
            clock.lap("rollout")
            scored = self._with_verdicts(rollouts)
            clock.lap("verify")
            groups = [list(g) for _, g in groupby(scored, key=lambda s: s.rollout.prompt.index)]
            groups = [with_advantages(g, scale_by_deviation=config.advantage == "grpo") for g in groups]
            scored = [s for g in groups for s in g]
            kept = [s for g in groups if teaches(g) for s in g if s.advantage is not None]
            samples = _weighted([_sample(s) for s in kept])
            learned = self._learn(step, samples, config)
            clock.lap("train")
            if learned:
                self._rollouts.receive(self._policy)
            clock.lap("sync")
            metrics = (
                learned
                | _summary(scored, clock.seconds)
                | {
                    "skipped_groups": float(len(groups) - len({s.rollout.prompt.index for s in kept})),
                    "train_tokens_per_second": _computed(samples) / clock.seconds["train"],
                    "weight_version": self._rollouts.version,
                }
            )
            yield StepRecord("rl", step, metrics, tuple(scored))

    def _learn(self, step: int, samples: Sequence[Sample], config: RLConfig) -> dict[str, float]:
        if not samples:
            return {}
        result = self._policy.update(step, samples, config.objective, config.optimizer.rate(step, config.steps))
        return result.values | {"grad_norm": result.grad_norm}

    def _scored(self, prompts: Sequence[Prompt], sampling: SamplingConfig, samples: int, seed: int) -> list[Scored]:
        return self._with_verdicts(self._rollouts.generate(prompts, sampling, samples, seed))

    def _with_verdicts(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        verdicts = self._verifiers.grade([(r.text, r.prompt.answer) for r in rollouts])
        return [Scored(r, v) for r, v in zip(rollouts, verdicts, strict=True)]

    def _prompts(self, problems: Sequence[Problem]) -> list[Prompt]:
        return [make_prompt(p, self._task, self._tokenizer) for p in problems]

    def _demonstration(self, prompt: Prompt) -> Sample:
        text = self._task.completion.format(answer=prompt.answer)
        eos = [] if self._tokenizer.eos is None else [self._tokenizer.eos]
        return sample(prompt.tokens, self._tokenizer.encode(text) + eos)

    def _draw(self, prompts: Sequence[Prompt], count: int, step: int, phase: str) -> list[Prompt]:
        """The prompts of a step: an epoch after the other, each in its own order; a function of (seed, phase, step)."""
        first = (step - 1) * count
        chosen = []
        for place in range(first, first + count):
            epoch, index = divmod(place, len(prompts))
            order = np.random.default_rng([self._seed, *phase.encode(), epoch]).permutation(len(prompts))
            chosen.append(prompts[order[index]])
        return list({p.index: p for p in chosen}.values())


def make_prompt(problem: Problem, task: TaskConfig, tokenizer: Tokenizer) -> Prompt:
    """A problem as the model reads it."""
    text = task.prompt.format(question=problem.question)
    if task.chat:
        text = tokenizer.chat([{"role": "user", "content": text}])
    return Prompt(problem.index, text, tuple(tokenizer.encode(text)), problem.answer)


def _sample(scored: Scored) -> Sample:
    rollout = scored.rollout
    assert scored.advantage is not None
    return sample(
        rollout.prompt.tokens, rollout.tokens, advantage=scored.advantage, old_logp=np.asarray(rollout.logp, np.float32)
    )


def _weighted(samples: list[Sample]) -> list[Sample]:
    """The samples with weights that make sums over the global batch means over its tokens."""
    total = sum(float(s.weight.sum()) for s in samples)
    return [replace(s, weight=s.weight / np.float32(total)) for s in samples]


def _computed(samples: Sequence[Sample]) -> int:
    """Tokens that a step computes: a prompt counts once, however many samples continue it."""
    return sum(len(document) for document in documents(samples))


class _Stopwatch:
    """Seconds of each lap by name."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._last = clock, clock()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = self._clock()
        self.seconds[name], self._last = now - self._last, now


def _summary(scored: Sequence[Scored], seconds: dict[str, float]) -> dict[str, float]:
    """What a step's rollouts say; the entropy is estimated by −log p of the tokens that were drawn."""
    rewards = [r for s in scored if (r := s.verdict.reward) is not None]
    lengths = [len(s.rollout.tokens) for s in scored]
    logp = [p for s in scored for p in s.rollout.logp]
    return {
        "reward": float(np.mean(rewards)) if rewards else float("nan"),
        "entropy": -float(np.mean(logp)),
        "completion_tokens": float(np.mean(lengths)),
        "ungradable": float(sum(s.verdict.outcome is Outcome.ungradable for s in scored)),
        "rollout_tokens_per_second": sum(lengths) / seconds["rollout"],
        "step_seconds": sum(seconds.values()),
        **{f"{name}_seconds": value for name, value in seconds.items()},
    }
