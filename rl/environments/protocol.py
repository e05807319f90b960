"""What an environment is: three calls of an episode, in one's own words and never in tokens.

An environment reads what the model says in a turn and answers with messages, or ends the episode. Tokens are not its
business: what the model wrote stays as it is, and its answer alone is encoded (see `chat_tools`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lockstep.rl.types import Prompt
from lockstep.rl.verdict import Verdict


@dataclass(frozen=True)
class Message:
    """A part of a conversation, as chat templates know it."""

    role: str
    content: str


@dataclass(frozen=True)
class Turn:
    """What the model said since it was last answered."""

    text: str
    number: int
    """1 for the first turn of the episode."""
    last: bool = False
    """Whether nothing can follow, because turns or tokens are used up."""
    whole: bool = True
    """Whether the model, or a stop string, ended it, and not the limit on tokens."""


@dataclass(frozen=True)
class Reply:
    """What an environment answers: messages, after which the model goes on, or none, which ends the episode."""

    messages: tuple[Message, ...] = ()
    verdict: Verdict | None = None
    """On the episode, with its end; None leaves it to the verifier, which judges the last turn."""


class Environment(Protocol):
    """One episode. Its calls come one after the other; those of many episodes take turns on one event loop."""

    async def reset(self, prompt: Prompt) -> None:
        """Begin with a problem that the model is reading."""

    async def step(self, turn: Turn) -> Reply:
        """Answer a turn. After the last one messages are not heard. Whatever is raised makes the rollout ungradable."""

    async def close(self) -> None:
        """Give back what the episode holds: comes once, however the episode ended."""


Opening = Callable[[], Environment]
"""Makes the environment of an episode."""


@dataclass(frozen=True)
class EnvironmentResponse:
    """What becomes of a rollout after a turn."""

    tokens: tuple[int, ...] = ()
    """To go on behind; none where the episode has ended."""
    verdict: Verdict | None = None
    """With the end, where the environment has one."""
    final: str = ""
    """With the end: the last turn, for a verifier to judge."""
    finish_reason: str = ""
    """With the end, where a limit brought it and not the model: `turns`, or `length` of the completion."""
