"""One completion while it is being written."""

from dataclasses import dataclass, field

from lockstep.rl.types import Prompt


@dataclass
class Sequence:
    """A running sample of a prompt; the only thing in a rollout that changes."""

    prompt: Prompt
    sample: int
    """Number of the sample, which together with the seed decides what is drawn."""
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are in the cache: all but the one drawn last."""
        return len(self.prompt.tokens) + len(self.tokens) - 1
