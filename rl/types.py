"""What flows through reinforcement learning, built once and never changed."""

from dataclasses import dataclass, field

from lockstep.rl.verifiers.verdict import Verdict


@dataclass(frozen=True)
class Prompt:
    """A problem as the model reads it, and what its verifier needs."""

    index: int
    text: str
    tokens: tuple[int, ...]
    answer: str


@dataclass(frozen=True)
class Rollout:
    """One completion: its tokens, their log-probabilities under the policy that drew them, and which policy it was."""

    prompt: Prompt
    sample: int
    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    text: str
    finish_reason: str
    """`stop` where the model ended it, `length` where the limit did."""
    weight_version: int


@dataclass(frozen=True)
class Scored:
    """A rollout with its verdict. The advantage is None until its group is complete, and for the ungradable."""

    rollout: Rollout
    verdict: Verdict
    advantage: float | None = field(default=None)
