"""What flows through reinforcement learning, built once and never changed."""

from dataclasses import dataclass, field

from lockstep.data.batch import Floats
from lockstep.data.tasks.code_tests import CodeTests
from lockstep.rl.verdict import Verdict


@dataclass(frozen=True)
class Prompt:
    """A problem as the model reads it, and what its verifier needs."""

    index: int
    text: str
    tokens: tuple[int, ...]
    answer: str
    tests: CodeTests | None = None
    """Of a program; its verdict is that of the tests and not of the answer."""
    demonstration: str = ""
    """What supervised tuning teaches to say."""


@dataclass(frozen=True)
class Rollout:
    """One completion: its tokens, their log-probabilities under the policy that drew them, and which policy it was."""

    prompt: Prompt
    sample: int
    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    """Of each token under the policy: with the temperature, over the whole vocabulary."""
    text: str
    """What is judged: without the stop string that ended it, whose tokens are among those above."""
    finish_reason: str
    """`stop` where the model or a stop string ended it, `length` where the limit did, `abort` where a caller did,
    `turns` where its environment would have gone on after the last turn that it may have."""
    weight_versions: tuple[int, ...]
    """Of each token: the weights that drew it."""
    sampling_logp: tuple[float, ...] = ()
    """Of each token under the distribution that it was drawn from, truncation included; training uses `logp`."""
    written: tuple[bool, ...] = ()
    """Of each token: whether the model wrote it, and not its environment; empty where it wrote all."""
    supports: tuple[tuple[int, ...], ...] = ()
    """Of each token the tokens among which it was drawn, where sampling asks for `support`; empty for all."""

    final: str | None = None
    """Of an episode: the model's last turn, which is judged; None where all of the text is."""

    @property
    def judged(self) -> str:
        """The text that a verifier judges."""
        return self.text if self.final is None else self.final

    @property
    def weight_version(self) -> int:
        """The oldest weights that drew any of it."""
        return min(self.weight_versions, default=0)


@dataclass(frozen=True)
class Estimates:
    """What models say of each token of a rollout before an update, [C] each; None where nobody asked."""

    proximal_logp: Floats | None = None
    """Under the trainer's policy."""
    reference_logp: Floats | None = None
    """Under the reference, or a teacher."""
    value: Floats | None = None
    """The critic's, of what is still to come when the token is drawn."""


@dataclass(frozen=True)
class Reward:
    """What a rollout earns: a sum, None for what could not be judged, and its terms by name, weights included."""

    total: float | None
    terms: dict[str, float]


@dataclass(frozen=True)
class Scored:
    """A rollout with its verdict. The advantage is None until its group is complete, and for the ungradable."""

    rollout: Rollout
    verdict: Verdict
    advantage: float | None = None
    estimates: Estimates = field(default_factory=Estimates)
    score: float | None = None
    """What a reward model says of the answer, where there is one; it takes the place of the verdict."""
    earned: Reward | None = None
    """By the terms of the recipe, where those have been applied; see `lockstep.rl.verifiers.rewards`."""

    @property
    def judged(self) -> float | None:
        """The score; without one the verdict's reward."""
        return self.verdict.reward if self.score is None else self.score

    @property
    def reward(self) -> float | None:
        """What was earned; without terms what was judged."""
        return self.judged if self.earned is None else self.earned.total
