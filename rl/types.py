"""Prompts, rollouts and the stages of a rollout on its way to a training sample, as frozen dataclasses.

Judged → Rewarded → Estimated → Advantaged: each stage is a class that inherits from the one before and adds one field,
which is always there. A function says by the types of its arguments which stage it needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from lockstep.data.batch import Column, Experts, Floats
from lockstep.data.tasks.code_tests import CodeTests
from lockstep.rl.verdict import Verdict

COLUMNS: dict[str, type[np.generic]] = {
    "tokens": np.int32,
    "logp": np.float32,
    "weight_versions": np.int32,
    "sampling_logp": np.float32,
    "written": np.bool_,
}
"""Columns of a completion, and what their numbers are."""
NO_TOKENS, NO_NUMBERS, NO_FLAGS = Column[int]((), np.int32), Column[float]((), np.float32), Column[bool]((), np.bool_)


@dataclass(frozen=True)
class AnswerKey:
    """What a completion is judged by: the tests of a program, or else a reference answer."""

    answer: str
    tests: CodeTests | None = None
    grader: str = "answer"
    """Compares a completion with the answer; see `lockstep.rl.verifiers.judge.grader_of`."""


@dataclass(frozen=True)
class Submission:
    """What a verifier gets of a rollout: what it judges, and what functions of the user's may ask for besides."""

    text: str
    """The completion, or of an episode the last turn."""
    key: AnswerKey
    prompt: str = ""
    """As the model reads it."""
    tokens: int = 0
    """Of the completion."""
    finish_reason: str = ""
    """See `Completion`."""
    task: str = ""
    """See `Prompt`."""
    verdict: Verdict | None = None
    """What its environment says, where that judges."""


@dataclass(frozen=True)
class Prompt:
    """A problem as the model reads it, and what its verifier needs."""

    index: int
    text: str
    tokens: tuple[int, ...]
    answer: str
    tests: CodeTests | None = None
    """Of a program; its verdict is that of the tests and not of the answer."""
    grader: str = "answer"
    """Compares a completion with the answer, where there are no tests; see `TaskConfig`."""
    task: str = ""
    """The name of its task, where there are several."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion of it, beside those of the sampling."""
    stop_tokens: tuple[int, ...] = ()
    """Tokens that do."""

    @property
    def answer_key(self) -> AnswerKey:
        """What a verifier has to know of it."""
        return AnswerKey(self.answer, self.tests, self.grader)


@dataclass(frozen=True)
class Completion:
    """A completion: tokens, their log-probabilities under the policy that sampled them, and its weight versions.

    Engines return it: without its prompt, whose tests may be large. Its columns may be given as any sequences.
    """

    sample: int
    tokens: Column[int]
    logp: Column[float]
    """Of each token under the policy, with the temperature, over the whole vocabulary."""
    text: str
    """What is judged: without the stop string that ended it, whose tokens are among those above."""
    finish_reason: str
    """`stop` where the model or a stop string ended it, or its environment before it had begun, `length` where the
    limit did, `abort` where a caller did, `turns` where its environment would have gone on after the last turn that it
    may have, `error` where the engine could not compute it."""
    weight_versions: Column[int]
    """Of each token: the version of the weights that sampled it."""
    sampling_logp: Column[float] = NO_NUMBERS
    """Of each token under the distribution that it was drawn from, truncation included; training uses `logp`."""
    written: Column[bool] = NO_FLAGS
    """Of each token: whether the model wrote it, and not its environment; empty where it wrote all."""
    supports: tuple[tuple[int, ...], ...] = ()
    """Of each token the tokens among which it was drawn, where sampling asks for `support`; empty for all."""
    experts: Experts | None = field(default=None, compare=False)
    """That the tokens of prompt and completion went to in each layer, those of environments too; the last token has no
    record, since no pass computes it, nor has what is behind it. None where an engine records nothing."""

    final: str | None = None
    """Of an episode: the model's last turn, which is judged; None where all of the text is."""
    error: str = ""
    """Why the engine could not compute it; its tokens end there, and may be none."""

    def __post_init__(self) -> None:
        for name, dtype in COLUMNS.items():
            given = getattr(self, name)
            if not (isinstance(given, Column) and given.array.dtype == dtype):
                object.__setattr__(self, name, Column(given, dtype))
        if self.sampling_logp.has_bits_of(self.logp):  # one array, which is pickled once
            object.__setattr__(self, "sampling_logp", self.logp)

    @property
    def judged(self) -> str:
        """The text that a verifier judges."""
        return self.text if self.final is None else self.final

    @property
    def weight_version(self) -> int:
        """The oldest version of the weights that sampled any of its tokens."""
        return int(self.weight_versions.array.min()) if self.weight_versions else 0

    def with_prompt(self, prompt: Prompt) -> "Rollout":
        """The completion as a rollout of this prompt."""
        return Rollout(**vars(self), prompt=prompt)


@dataclass(frozen=True)
class Rollout(Completion):
    """A completion and its prompt."""

    prompt: Prompt = field(kw_only=True)

    def submission(self, verdict: Verdict | None = None) -> Submission:
        """What a verifier gets of it.

        Args:
            verdict: its environment's, where that judges.
        """
        prompt, length = self.prompt, len(self.tokens)
        key = prompt.answer_key
        return Submission(self.judged, key, prompt.text, length, self.finish_reason, prompt.task, verdict)

    @property
    def completion(self) -> Completion:
        """The rollout without its prompt."""
        return Completion(**{name: value for name, value in vars(self).items() if name != "prompt"})


Written = TypeVar("Written", bound=Completion)
"""A completion with or without its prompt."""


@dataclass(frozen=True)
class Estimates:
    """Log-probabilities and values of a rollout's tokens before an update, [C] each; None where not needed."""

    proximal_logp: Floats | None = None
    """Under the trainer's policy."""
    reference_logp: Floats | None = None
    """Under the reference, or a teacher."""
    value: Floats | None = None
    """The critic's, of what is still to come when the token is drawn."""


@dataclass(frozen=True)
class Reward:
    """The reward of a rollout: its total, None for an ungradable one, and its weighted terms by name."""

    total: float | None
    terms: dict[str, float]
    punishment: float = 0.0
    """What the method takes off for length, 0 or less; no part of the total."""

    @property
    def net(self) -> float | None:
        """What the method compares: the total and the punishment."""
        return None if self.total is None else self.total + self.punishment


@dataclass(frozen=True)
class Judged:
    """A rollout with its verdict and, where there is a reward model, its score."""

    rollout: Rollout
    verdict: Verdict
    score: float | None = field(default=None, kw_only=True)
    """What a reward model says of the answer; None where there is no reward model."""

    @property
    def grade(self) -> float | None:
        """The reward model's score; without one the verdict's reward, which is None for an ungradable completion."""
        return self.verdict.reward if self.score is None else self.score


@dataclass(frozen=True)
class Rewarded(Judged):
    """A judged rollout with its reward by the terms of the recipe; see `lockstep.rl.algorithms.rewards`."""

    reward: Reward


@dataclass(frozen=True)
class Estimated(Rewarded):
    """A rewarded rollout with the log-probabilities and values that a method asks models for."""

    estimates: Estimates


@dataclass(frozen=True)
class Advantaged(Estimated):
    """An estimated rollout with its advantage, which samples are made of; see `lockstep.rl.algorithms.samples`."""

    advantage: float | None
    """None for a rollout that is not learned from: an ungradable one, or with best-of-N one that is not the best."""


def last_turn(rollout: Completion) -> Column[int]:
    """Tokens of the model's last turn: those behind the last token of its environment."""
    foreign = np.flatnonzero(~rollout.written.array)
    return rollout.tokens[foreign[-1] + 1 :] if len(foreign) else rollout.tokens


def turns(rollout: Completion) -> int:
    """Number of turns in which the model wrote something."""
    written = rollout.written.array
    begins = np.count_nonzero(written[1:] & ~written[:-1]) + np.count_nonzero(written[:1])
    return int(begins) if len(written) else int(bool(rollout.tokens))


def own_logp(rollout: Completion) -> Floats:
    """Log-probabilities of the tokens that the model wrote."""
    return rollout.logp.array[rollout.written.array] if rollout.written else rollout.logp.array


def answered(rollout: Written, tokens: Sequence[int]) -> Written:
    """Appends the environment's tokens to a rollout, with log-probabilities of 0; the text stays as it is.

    They have the weight version of the token before them, or, where the environment speaks first, of that behind them,
    which `continued` gives them.
    """
    count, own = len(tokens), len(rollout.tokens)
    last = rollout.weight_versions[-1] if rollout.weight_versions else 0
    return replace(
        rollout,
        tokens=rollout.tokens + tokens,
        logp=rollout.logp + (0.0,) * count,
        weight_versions=rollout.weight_versions + (last,) * count,
        sampling_logp=rollout.sampling_logp + (0.0,) * count,
        written=(rollout.written or Column((True,) * own, np.bool_)) + (False,) * count,
        supports=rollout.supports and rollout.supports + ((),) * count,
    )


def continued(before: Completion, after: Written, decode: Callable[[list[int]], str]) -> Written:
    """Joins a rollout and the model's next turn into one rollout."""
    tokens = before.tokens + after.tokens
    supports = _supports(before) + _supports(after) if before.supports or after.supports else ()
    first = after.weight_versions[0] if after.weight_versions else 0
    versions = before.weight_versions if turns(before) else Column((first,) * len(before.tokens), np.int32)
    return replace(
        after,
        tokens=tokens,
        logp=before.logp + after.logp,
        text=decode(list(tokens)),
        weight_versions=versions + after.weight_versions,
        sampling_logp=before.sampling_logp + after.sampling_logp,
        written=before.written + (True,) * len(after.tokens),
        supports=supports,
        experts=_experts(before, after),
    )


def _experts(before: Completion, after: Completion) -> Experts | None:
    """The records of both, which begin with the same token: the first of each token counts."""
    if before.experts is None or after.experts is None:
        return after.experts if before.experts is None else before.experts
    return np.concatenate([before.experts, after.experts[len(before.experts) :]])


def _supports(rollout: Completion) -> tuple[tuple[int, ...], ...]:
    return rollout.supports or ((),) * len(rollout.tokens)
