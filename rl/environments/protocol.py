"""The protocol of environments: `reset`, `step` and `close` of one episode, on text and never on tokens.

An environment reads what the model wrote in a turn and answers with messages, or ends the episode. Tokens are not its
business: those that the model wrote are kept, and the answer alone is encoded (see `tool_calls`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lockstep.rl.types import Prompt
from lockstep.rl.verdict import Verdict


@dataclass(frozen=True)
class Message:
    """One message of a conversation, as chat templates take it."""

    role: str
    content: str


@dataclass(frozen=True)
class Turn:
    """What the model wrote since it was last answered."""

    text: str
    number: int
    """1 for the first turn of the episode."""
    last: bool = False
    """Whether nothing can follow, because turns or tokens are used up."""
    whole: bool = True
    """Whether the model, or a stop string, ended it, and not the limit on tokens."""


@dataclass(frozen=True)
class Reply:
    """An environment's answer: messages, after which the model goes on, or none, which ends the episode."""

    messages: tuple[Message, ...] = ()
    verdict: Verdict | None = None
    """Of the episode, where it ends; None leaves it to the verifier, which judges the last turn."""


class Environment(Protocol):
    """One episode. Its methods are called one after the other; many episodes share one event loop."""

    async def reset(self, prompt: Prompt) -> None:
        """Start the episode of a prompt, which the model is reading."""

    async def step(self, turn: Turn) -> Reply:
        """Answer a turn. Messages after the last turn are dropped; an exception makes the rollout ungradable."""

    async def close(self) -> None:
        """Release what the episode holds: called once, however the episode ended."""


Opening = Callable[[], Environment]
"""A factory of episodes: called once for each."""


@dataclass(frozen=True)
class EnvironmentResponse:
    """How a rollout goes on after a turn: with tokens of an answer, or not at all."""

    tokens: tuple[int, ...] = ()
    """Of the answer, behind which the model goes on; none where the episode has ended."""
    verdict: Verdict | None = None
    """Where the episode has ended and its environment gave one."""
    final: str = ""
    """Where the episode has ended: the last turn, for a verifier to judge."""
    finish_reason: str = ""
    """Where a limit ended the episode: `turns`, or `length` of the completion."""
    is_lost: bool = False
    """Whether the episode was in a process that died, so that it has to begin again."""
