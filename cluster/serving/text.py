"""Text of a completion as it is drawn: what has been given is never taken back.

A character comes when its last byte does, and text that may be the beginning of a stop string waits until it is known
not to be. The stop string itself is no part of the text.
"""

from collections.abc import Sequence

from lockstep.rl.rollout.detokenizer import Decode, Reader

PATIENCE = 12
"""Tokens that may wait for the rest of a character; one has four bytes at most."""


class TextStream:
    """Decodes one completion, a token at a time; each is decoded with a few before it only."""

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._reader, self._stop = Reader(decode), tuple(stop)
        self._tokens: list[int] = []
        self._held = ""
        self.length = 0
        """Characters that are known, whether they have been given or not."""

    def add(self, token: int, finish_reason: str | None = None) -> str:
        """Text that is certain with one more token; with the last, which has a finish reason, all that is left."""
        self._tokens.append(token)
        new = self._characters(last=finish_reason is not None)
        self.length += len(new)
        text = self._held + new
        ends = [place for place in map(text.find, self._stop) if place >= 0] if finish_reason == "stop" else []
        certain = min(ends, default=len(text)) if finish_reason else len(text) - self._doubtful(text)
        self._held = text[certain:]
        return text[:certain]

    def _characters(self, *, last: bool) -> str:
        """Whole ones that have come with the last tokens."""
        new = self._reader.unread(self._tokens)
        if new.endswith("\ufffd") and not last and len(self._tokens) - self._reader.read < PATIENCE:
            return ""
        self._reader.advance(self._tokens)
        return new

    def _doubtful(self, text: str) -> int:
        """Characters at the end with which a stop string may have begun."""
        return max((_overlap(text, string) for string in self._stop), default=0)


def _overlap(text: str, string: str) -> int:
    """The longest end of a text that is a beginning of a string, but not all of it."""
    lengths = range(min(len(text), len(string) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(string[:n])), 0)
