"""Incremental detokenization of growing completions: stop strings, and text that can be streamed.

Each token is decoded with a few before it only, so that its cost does not grow with the completion.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]


def before_stop(text: str, strings: Sequence[str]) -> str:
    """The text before the first occurrence of any of some strings; all of it where there is none."""
    return text[: min((place for place in map(text.find, strings) if place >= 0), default=len(text))]


class Reader:
    """Decodes a growing completion incrementally."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._context = 0
        self.read = 0
        """Number of tokens that have been read."""

    def unread(self, tokens: Sequence[int]) -> str:
        """Text of the tokens that have not been read.

        They are decoded together with the tokens that were read last, since some tokenizers drop a leading space.
        """
        known = self._decode(list(tokens[self._context : self.read]))
        return self._decode(list(tokens[self._context :]))[len(known) :]

    def advance(self, tokens: Sequence[int]) -> None:
        """Mark all tokens as read."""
        self._context, self.read = self.read, len(tokens)


class StopStrings:
    """Detects stop strings in a completion that grows by one token at a time."""

    def __init__(self, strings: Sequence[str], decode: Decode) -> None:
        self._strings, self._reader = tuple(strings), Reader(decode)
        self._longest = max(map(len, strings))
        self._tail = ""

    def found(self, tokens: Sequence[int]) -> bool:
        """Whether the completion contains a stop string; to be called after each of its tokens.

        Bytes that do not form a character yet are decoded again together with those of the next tokens.
        """
        new = self._reader.unread(tokens)
        text = self._tail + new
        if not new.endswith("\ufffd"):
            self._reader.advance(tokens)
            self._tail = text[max(0, len(text) - self._longest + 1) :] if self._longest > 1 else ""
        return any(string in text for string in self._strings)


PATIENCE = 12
"""Tokens that may wait for the rest of a character; one has four bytes at most."""


class TextStream:
    """Text of one completion for streaming: a piece is returned as soon as no later token can change or cut it off."""

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._reader, self._stop = Reader(decode), tuple(stop)
        self._tokens: list[int] = []
        self._held = ""
        self.length = 0
        """Number of characters decoded so far, whether they have been returned or not."""

    def add(self, token: int, finish_reason: str | None = None) -> str:
        """Add a token; returns the text that is now certain, or all that is left with the last token."""
        self._tokens.append(token)
        new = self._characters(last=finish_reason is not None)
        self.length += len(new)
        text = self._held + new
        ends = [place for place in map(text.find, self._stop) if place >= 0] if finish_reason == "stop" else []
        certain = min(ends, default=len(text)) if finish_reason else len(text) - self._doubtful(text)
        self._held = text[certain:]
        return text[:certain]

    def _characters(self, *, last: bool) -> str:
        """Complete characters that the last tokens have added."""
        new = self._reader.unread(self._tokens)
        if new.endswith("\ufffd") and not last and len(self._tokens) - self._reader.read < PATIENCE:
            return ""
        self._reader.advance(self._tokens)
        return new

    def _doubtful(self, text: str) -> int:
        """Number of characters at the end that may be the beginning of a stop string."""
        return max((_overlap(text, string) for string in self._stop), default=0)


def _overlap(text: str, string: str) -> int:
    """Length of the longest suffix of a text that is a proper prefix of a string."""
    lengths = range(min(len(text), len(string) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(string[:n])), 0)
