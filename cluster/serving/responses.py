"""Response bodies of the OpenAI endpoints, whole or as chunks of a stream."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lockstep.cluster.serving.structured.call_stream import CallStream, WrittenCall
from lockstep.rl.rollout.detokenizer import Decode, TextStream
from lockstep.rl.rollout.protocol import PromptOutput, Score, TokenOutput

Json = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A token of a choice with its text offset, in characters from the beginning of the choice's text."""

    token: TokenOutput | Score
    offset: int


def prompt_offsets(tokens: Sequence[int], text: str, named: Decode) -> list[int]:
    """Text offset of each token of a prompt; what is not in its text, as a BOS that was added, takes no room.

    Args:
        named: decodes special tokens to their names.
    """
    stream, found = TextStream(named), []
    for token in tokens:
        found.append(stream.length)
        stream.add(token)
    added = max(0, len(named(list(tokens))) - len(text))
    return [min(max(0, offset - added), len(text)) for offset in found]


@dataclass(frozen=True)
class Piece:
    """A part of a choice's text that is certain, with the tokens that have come since the piece before."""

    index: int
    text: str
    places: tuple[Place, ...]
    is_first: bool
    finish_reason: str | None
    calls: tuple[WrittenCall, ...] = ()
    """Tool calls that have become whole."""


def merged(pieces: Sequence[Piece]) -> Piece:
    """Join all pieces of a choice into one."""
    return Piece(
        pieces[0].index,
        "".join(piece.text for piece in pieces),
        tuple(place for piece in pieces for place in piece.places),
        True,
        pieces[-1].finish_reason,
        tuple(call for piece in pieces for call in piece.calls),
    )


class Choice:
    """One choice of a response, which grows with its tokens."""

    def __init__(
        self, index: int, text: TextStream, named: Decode, before: str = "", calls: CallStream | None = None
    ) -> None:
        """
        Args:
            named: decodes special tokens to their names.
            before: text that the choice begins with, for `echo`.
            calls: tells tool calls from text, where the choice may have some.
        """
        self._calls = calls
        self._index, self._text, self._named, self._before = index, text, named, before
        self._shift = len(before)
        self._places: list[Place] = []
        self._is_first = True

    def add(self, output: TokenOutput | PromptOutput) -> Piece | None:
        """Add a token, or what a prompt reports; returns the piece that is certain now, or None."""
        new = ""
        if isinstance(output, PromptOutput):
            offsets = prompt_offsets([score.token for score in output.scores], self._before, self._named)
            self._places += map(Place, output.scores, offsets)
        else:
            self._places.append(Place(output, self._shift + self._text.length))
            new = self._text.add(output.token, output.finish_reason)
        return self._piece(self._before + new, output.finish_reason)

    def _piece(self, text: str, finish_reason: str | None) -> Piece | None:
        calls: tuple[WrittenCall, ...] = ()
        if self._calls:
            text, calls, finish_reason = self._calls.add(text, finish_reason)
        if not text and not calls and not finish_reason:
            return None
        piece = Piece(self._index, text, tuple(self._places), self._is_first, finish_reason, calls)
        self._before, self._places, self._is_first = "", [], False
        return piece


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens of all prompts and completions of a request."""

    prompt: int
    completion: int

    @property
    def json(self) -> Json:
        """The object `usage` of a response."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


def _now() -> int:
    return int(time.time())


@dataclass(frozen=True)
class Reply(ABC):
    """Builds the response objects of one endpoint."""

    model: str
    decode: Decode
    logprobs: bool
    top: bool = False
    """Whether completions list the likeliest tokens."""
    created: int = field(default_factory=_now)
    unique: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    @abstractmethod
    def id(self) -> str:
        """The id of the response; keys of the engine's requests begin with it."""

    def whole(self, choices: Sequence[Piece], usage: Usage) -> Json:
        """The response with all choices, for a request that does not stream."""
        shown = [self._choice(piece, streamed=False) for piece in choices]
        return self._head(streamed=False) | {"choices": shown, "usage": usage.json}

    def chunk(self, piece: Piece | None, usage: Usage | None, *, with_usage: bool) -> Json:
        """One chunk of a stream: a piece of a choice, or the usage at the end.

        Streams that end with their usage have the field `usage` in every chunk.
        """
        shown = [self._choice(piece, streamed=True)] if piece else []
        said = {"usage": usage.json if usage else None} if with_usage else {}
        return self._head(streamed=True) | {"choices": shown} | said

    def _head(self, *, streamed: bool) -> Json:
        return {"id": self.id, "object": self._kind(streamed), "created": self.created, "model": self.model}

    @abstractmethod
    def _kind(self, streamed: bool) -> str:
        """The value of the field `object`."""

    @abstractmethod
    def _choice(self, piece: Piece, *, streamed: bool) -> Json: ...


class CompletionReply(Reply):
    """Responses of `/v1/completions`."""

    @property
    def id(self) -> str:
        """The id of the response, with OpenAI's prefix."""
        return f"cmpl-{self.unique}"

    def _kind(self, streamed: bool) -> str:
        return "text_completion"

    def _choice(self, piece: Piece, *, streamed: bool) -> Json:
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece) if self.logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, piece: Piece) -> Json:
        tokens = [place.token for place in piece.places]
        return {
            "tokens": [self.decode([t.token]) for t in tokens],
            "token_logprobs": [t.logp for t in tokens],
            "top_logprobs": [self._top(t) for t in tokens] if self.top else None,
            "text_offset": [place.offset for place in piece.places],
        }

    def _top(self, token: TokenOutput | Score) -> dict[str, float] | None:
        """Log-probabilities of the likeliest tokens and this one, by text; of equal texts the likeliest."""
        if token.logp is None:
            return None
        found: dict[str, float] = {}
        for number, logp in (*token.top, (token.token, token.logp)):
            found.setdefault(self.decode([number]), logp)
        return found


class ChatReply(Reply):
    """Responses of `/v1/chat/completions`."""

    @property
    def id(self) -> str:
        """The id of the response, with OpenAI's prefix."""
        return f"chatcmpl-{self.unique}"

    def _kind(self, streamed: bool) -> str:
        return "chat.completion.chunk" if streamed else "chat.completion"

    def _choice(self, piece: Piece, *, streamed: bool) -> Json:
        message: Json = {"content": piece.text}
        if piece.calls:
            message["content"] = piece.text or None
            message["tool_calls"] = [({"index": c.index} if streamed else {}) | c.json for c in piece.calls]
        if piece.is_first:
            message = {"role": "assistant", **message}
        content = [self._logprob(place.token) for place in piece.places]
        return {
            "index": piece.index,
            "delta" if streamed else "message": message,
            "logprobs": {"content": content, "refusal": None} if self.logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def _logprob(self, token: TokenOutput | Score) -> Json:
        return self._named(token.token, token.logp) | {"top_logprobs": [self._named(*pair) for pair in token.top]}

    def _named(self, number: int, logp: float | None) -> Json:
        """A token's text and log-probability, and its bytes where these are whole characters."""
        text = self.decode([number])
        return {"token": text, "logprob": logp, "bytes": None if "\ufffd" in text else list(text.encode())}
