"""The protocol of environments: `reset`, `step` and `close` of one episode, on text and never on tokens.

An environment reads what the model wrote in a turn and answers with messages, or ends the episode. One that also has
`first_observation` speaks first, as those of Gymnasium and TextArena do. Tokens are not its business: those that the
model wrote are kept, and the answer alone is encoded (see `chat_form`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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


@runtime_checkable
class FirstSpeaker(Environment, Protocol):
    """An environment that speaks before the model does."""

    async def first_observation(self, seed: int) -> Reply:
        """What the model reads behind its prompt, before its first turn; called once, after `reset`.

        Without messages the episode ends at once. The messages are in the user's name.

        Args:
            seed: of this sample, the same wherever and whenever it is played: samples of one prompt have different
                ones. What the samples of a prompt are to share depends on the prompt alone.
        """


Opening = Callable[[], Environment]
"""A factory of episodes: called once for each."""


@dataclass(frozen=True)
class EnvironmentResponse:
    """How a rollout goes on after a turn, or begins: with tokens of an answer, or not at all."""

    tokens: tuple[int, ...] = ()
    """Of the answer, or of the first observation, behind which the model goes on; none where the episode has ended."""
    verdict: Verdict | None = None
    """Where the episode has ended and its environment gave one."""
    final: str = ""
    """Where the episode has ended: the last turn, for a verifier to judge; empty before the first."""
    finish_reason: str = ""
    """Where a limit ended the episode: `turns`, or `length` of the completion."""
    is_lost: bool = False
    """Whether the episode was in a process that died, so that it has to begin again."""
