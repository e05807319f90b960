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
    """Of each token under the policy: with the temperature, over the whole vocabulary."""
    text: str
    finish_reason: str
    """`stop` where the model or a stop string ended it, `length` where the limit did, `abort` where a caller did."""
    weight_versions: tuple[int, ...]
    """Of each token: the weights that drew it."""
    sampling_logp: tuple[float, ...] = ()
    """Of each token under the distribution that it was drawn from, truncation included; training uses `logp`."""
    supports: tuple[tuple[int, ...], ...] = ()
    """Of each token the tokens among which it was drawn, where sampling asks for `support`; empty for all."""

    @property
    def weight_version(self) -> int:
        """The oldest weights that drew any of it."""
        return min(self.weight_versions, default=0)


@dataclass(frozen=True)
class Scored:
    """A rollout with its verdict. The advantage is None until its group is complete, and for the ungradable."""

    rollout: Rollout
    verdict: Verdict
    advantage: float | None = field(default=None)
