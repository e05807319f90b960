"""The training loop: the supervised, preference and RL phases of a run, step by step, over its actors.

A step of RL collects judged groups of rollouts, learns from them and syncs the weights to the rollout workers.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from lockstep.data.batch import Sample, sample
from lockstep.data.conversations.token_table import TokenTable
from lockstep.data.packing import documents
from lockstep.data.tasks.mixture import ProblemSet, shuffled
from lockstep.data.tokenizer import Tokenizer
from lockstep.model.objectives.token_loss import nll
from lockstep.rl.algorithms.aggregation import weighted
from lockstep.rl.algorithms.config import PreferenceConfig, RLConfig
from lockstep.rl.algorithms.estimates import columns, of_completions
from lockstep.rl.algorithms.preferences import (
    Comparison,
    apart,
    by_verdict,
    completions_of,
    read_comparisons,
    samples_to_compare,
    with_reference,
)
from lockstep.rl.algorithms.rewards import Rewards, means
from lockstep.rl.algorithms.samples import teaches
from lockstep.rl.algorithms.supervised import SupervisedConfig, split_conversations
from lockstep.rl.collector.batch_scheduler import Batch, BatchScheduler
from lockstep.rl.collector.collector import Collector
from lockstep.rl.environments.chat_form import prompt_before_observation
from lockstep.rl.environments.factory import told
from lockstep.rl.learner import Learned, Learner, Models
from lockstep.rl.prompts import PromptSource
from lockstep.rl.remote import gather
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.types import Advantaged, Judged, Prompt, Rewarded, own_logp
from lockstep.rl.verdict import Outcome
from lockstep.rl.workers.stubs import ModelWorker
from lockstep.rl.workers.worker_groups import EnvironmentGroup, ModelGroup, RolloutGroup, VerifierGroup

NO_MODELS, VERDICTS = Models(), Rewards()
Examples: TypeAlias = tuple[Callable[[int], list[Sample]], list[Sample]]
"""The samples of the n-th example of a phase, and those that are not learned from."""


@dataclass(frozen=True)
class StepRecord:
    """Metrics of one step of a phase and, after a step of RL, its completions."""

    phase: str
    step: int
    metrics: dict[str, float]
    completions: tuple[Advantaged, ...] = ()
    """Of a step of RL, group by group."""
    position: int = 0
    """Number of the next group of prompts, after steps of RL."""
    kl_beta: float | None = None
    """Of the next step, where RL adapts it."""


class Controller:
    """Runs the phases of training on its actors, and decides nothing but the order of calls."""

    def __init__(
        self,
        policy: ModelGroup,
        rollouts: RolloutGroup,
        verifiers: VerifierGroup,
        *,
        tokenizer: Tokenizer,
        problems: Sequence[ProblemSet],
        seed: int,
        rewards: Rewards = VERDICTS,
        models: Models = NO_MODELS,
        environments: EnvironmentGroup | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy, self._collector = policy, Collector(policy, rollouts, verifiers, clock, environments)
        self._learner = Learner(policy, models, self._collector.gather, seed, rewards)
        self._reward_model = models.reward
        self._tokenizer, self._seed, self._clock = tokenizer, seed, clock
        rules = told(environments.config) if environments else ""
        render = prompt_before_observation if environments and environments.speaks_first else Tokenizer.render
        self._prompts = PromptSource(problems, tokenizer, seed, rules, render=render)

    @property
    def version(self) -> int:
        """The version of the weights that the rollout workers have."""
        return self._collector.version

    def resume(self, version: int) -> None:
        """Gives the rollout workers the policy's weights as this version."""
        self._collector.resume(version)

    def evaluate(self, max_new_tokens: int) -> list[Judged]:
        """Greedy completions of the held-out problems, with their verdicts; rollouts of batches go on meanwhile."""
        greedy = SamplingParams(temperature=0, max_new_tokens=max_new_tokens)
        return [judged for group in self.sample(greedy, samples=1) for judged in group]

    def sample(self, sampling: SamplingParams, samples: int) -> list[list[Judged]]:
        """So many completions of each held-out problem, with their verdicts; rollouts of batches go on meanwhile.

        What is drawn depends on the run's seed and the weights: the same random numbers are used each time.
        """
        return self._collector.answer(self._prompts.held_out, sampling, samples, self._seed)

    def drop(self) -> None:
        """Forgets rollouts that were asked for, as at the end of a phase."""
        self._collector.drop()

    def _answers(
        self, prompts: Mapping[int, Prompt], sampling: SamplingParams, samples: int, seed: int
    ) -> list[list[Judged]]:
        """Judged groups of completions, outside of the batches of RL."""
        self._collector.ask(prompts, sampling, samples, seed)
        found = [self._collector.take(number) for number in prompts]
        self._collector.drop()
        return found

    def supervised(
        self, config: SupervisedConfig, done: int = 0, conversations: TokenTable | None = None
    ) -> Iterator[StepRecord]:
        """Fine-tunes the policy (SFT), measures held-out conversations, then syncs its weights to rollout workers.

        Args:
            done: steps that have been taken before.
            conversations: to learn from; None for the answers to training problems.

        Raises:
            TooFewConversations: when there are none to learn from.
        """
        samples_of, held_out = self._examples(config, conversations)
        self._policy.enter_phase(config.optimizer)
        if not done:
            self._policy.begin_phase()
        for step in range(done + 1, config.steps + 1):
            started = self._clock()
            count = config.problems_per_step
            numbers = range((step - 1) * count, step * count)
            samples = weighted([each for number in numbers for each in samples_of(number)])
            rate = config.optimizer.rate(step, config.steps)
            result = gather(self._policy.update(step, samples, nll, rate))[0]
            seconds = self._clock() - started
            metrics = result.values | {"grad_norm": result.grad_norm, "step_seconds": seconds}
            metrics["train_tokens_per_second"] = _computed(samples) / seconds
            if held_out and config.measures_at(step):
                metrics["held_out_loss"] = gather(self._policy.measure(weighted(held_out), nll))[0]["loss"]
            yield StepRecord("sft", step, metrics)
        self._collector.renew()

    def _examples(self, config: SupervisedConfig, conversations: TokenTable | None) -> Examples:
        if conversations is None:
            return self._demonstration, []
        train, held_out = split_conversations(conversations, config.held_out, self._seed)

        def samples_of(number: int) -> list[Sample]:
            return conversations.samples(train[shuffled(number, len(train), self._seed, "sft")])

        return samples_of, [each for number in held_out for each in conversations.samples(number)]

    def _demonstration(self, number: int) -> list[Sample]:
        """The n-th prompt of the phase with the answer to its problem, as a sample."""
        prompt, taught = self._prompts.demonstration(number, "sft")
        return [sample(prompt.tokens, taught)]

    def prefer(
        self, config: PreferenceConfig, comparisons: Sequence[Comparison], done: int = 0
    ) -> Iterator[StepRecord]:
        """Trains the policy (DPO, IPO) or the reward model on comparisons, and measures held-out ones.

        Args:
            comparisons: see `compare`.
            done: steps that have been taken before.

        Raises:
            TooFewComparisons: when there are none to learn from.
        """
        learns = self._judge() if config.judged else self._policy
        train, held_out = apart(comparisons, config.held_out, self._seed)
        learns.enter_phase(config.optimizer)
        if not done:
            learns.begin_phase()
        for step in range(done + 1, config.steps + 1):
            started = self._clock()
            count = config.groups_per_step
            numbers = range((step - 1) * count, step * count)
            chosen = [train[shuffled(n, len(train), self._seed, "preference")] for n in numbers]
            samples = samples_to_compare(chosen, judged=config.judged)
            rate = config.optimizer.rate(step, config.steps)
            result = gather(learns.update(step, samples, config.objective, rate))[0]
            seconds = self._clock() - started
            metrics = result.values | {"grad_norm": result.grad_norm, "step_seconds": seconds}
            metrics["train_tokens_per_second"] = _computed(samples) / seconds
            if held_out and config.measures_at(step):
                kept = samples_to_compare(held_out, judged=config.judged)
                found = gather(learns.measure(kept, config.objective))[0]
                metrics |= {f"held_out_{name}": found[name] for name in ("loss", "accuracy", "margin")}
            yield StepRecord(config.phase, step, metrics)
        if not config.judged:
            self._collector.renew()

    def _judge(self) -> ModelGroup:
        assert self._reward_model, "a reward model is to learn, and there is none"
        return self._reward_model

    def compare(self, config: PreferenceConfig, say: Callable[[str], None] = lambda sentence: None) -> list[Comparison]:
        """Comparisons from a file or of the policy's completions, with its log-probabilities where it is to learn.

        Args:
            say: takes a sentence on rows of the file that were left out.
        """
        if config.source:
            found = read_comparisons(config, self._tokenizer, say)
        else:
            prompts = {n: self._prompts.train(n, "preference") for n in range(config.prompts)}
            seed = int(np.random.default_rng([self._seed, *b"preference"]).integers(1 << 62))
            found = by_verdict(self._answers(prompts, config.sampling, config.completions, seed), config.pairs)
        if config.judged or not found:
            return found
        self._policy.enter_phase(config.optimizer)
        texts = completions_of(found)
        logp = columns(gather(self._policy.score(of_completions(texts))), [len(tokens) for _, tokens in texts])
        return with_reference(found, logp)

    def reinforce(self, config: RLConfig, done: int = 0, position: int = 0) -> Iterator[StepRecord]:
        """Runs steps of reinforcement learning; each ends with the rollout workers on the new weights.

        Args:
            done: steps that have been taken before.
            position: see `StepRecord`, after them.
        """
        self._learner.enter(config)
        if not done:
            self._learner.begin(config)
        stream = self._stream(config, position)
        for step in range(done + 1, config.steps + 1):
            clock = _Stopwatch(self._clock)
            batch = stream.batch()
            clock.lap("rollout")
            if config.flow.release:
                self._collector.release()
            learned = self._learner.learn(step, batch.groups, batch.teaching, config)
            clock.lap("train")
            if learned.metrics:
                self._collector.renew(finish=config.flow.in_waves)
            elif config.flow.release:
                self._collector.resume(self.version)
            elif not config.flow.staleness:
                self._collector.drop()
            if config.flow.release:
                self._policy.call(ModelWorker.release)
            clock.lap("sync")
            metrics = learned.metrics | _summary(batch, learned, config, clock.seconds) | self._collector.metrics()
            completions = tuple(s for group in learned.groups for s in group)
            target, position = config.kl_target, stream.position
            if "kl" in learned.metrics:
                config = config.adapted(learned.metrics["kl"])
            yield StepRecord("rl", step, metrics, completions, position, config.kl_beta if target else None)
        self._collector.drop()

    def _stream(self, config: RLConfig, first: int) -> BatchScheduler:
        """The scheduler of batches of training prompts, one batch a step."""
        return BatchScheduler(
            self._collector,
            self._prompts.in_steps("rl", config.prompts_per_step, config.steps),
            config.flow,
            groups=config.prompts_per_step,
            samples=config.group_size,
            sampling=config.sampling,
            seed=int(np.random.default_rng([self._seed, *b"rl"]).integers(1 << 62)),
            reward=partial(self._learner.rewarded, config=config),
            teaches=partial(teaches, config=config),
            first=first,
        )


def _computed(samples: Sequence[Sample]) -> int:
    """Tokens of a step's samples: a prompt counts once, however many continue it and rows repeat it."""
    return sum(len(document) for document in documents(samples))


def _is_ungradable(rewarded: Rewarded) -> bool:
    """Whether the verdict could not be given, or the reward is no number."""
    return rewarded.verdict.outcome is Outcome.ungradable or rewarded.reward.total is None


class _Stopwatch:
    """Seconds of each lap by name."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._last = clock, clock()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = self._clock()
        self.seconds[name], self._last = now - self._last, now


def _summary(batch: Batch, learned: Learned, config: RLConfig, seconds: dict[str, float]) -> dict[str, float]:
    """Metrics of a step's rollouts; the entropy is estimated by −log p of the sampled tokens."""
    completions = [s for group in learned.groups for s in group]
    rewards = [r for s in completions if (r := s.reward.total) is not None]
    lengths = [len(s.rollout.tokens) for s in completions]
    logp = [own_logp(s.rollout) for s in completions]
    drawn = sum(map(len, logp))
    return {
        "reward": float(np.mean(rewards)) if rewards else float("nan"),
        **means([s.reward for s in completions]),
        **_by_task(completions),
        "entropy": -sum(float(each.sum(dtype=np.float64)) for each in logp) / drawn if drawn else float("nan"),
        "completion_tokens": float(np.mean(lengths)),
        **({"kl_beta": config.kl_beta} if config.kl_target else {}),
        "ungradable": float(sum(_is_ungradable(s) for s in completions)),
        "skipped_groups": float(batch.teaching.count(False)),
        "replaced_groups": float(batch.replaced),
        "staleness_mean": float(np.mean(batch.staleness)),
        "staleness_max": float(max(batch.staleness)),
        "train_tokens_per_second": _computed(learned.samples) / seconds["train"],
        "step_seconds": sum(seconds.values()),
        **{f"{name}_seconds": value for name, value in seconds.items()},
    }


def _by_task(completions: Sequence[Advantaged]) -> dict[str, float]:
    """Mean reward and its terms, and number of completions, of each task, where there are several."""
    found: dict[str, list[Advantaged]] = defaultdict(list)
    for each in completions:
        found[each.rollout.prompt.task].append(each)
    metrics = {}
    for task, some in found.items():
        if task:
            rewards = [reward for each in some if (reward := each.reward.total) is not None]
            metrics[f"task/{task}/reward"] = float(np.mean(rewards)) if rewards else float("nan")
            terms = means([each.reward for each in some])
            metrics |= {f"task/{task}/{name}": value for name, value in terms.items()}
            metrics[f"task/{task}/completions"] = float(len(some))
    return metrics
