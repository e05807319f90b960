"""Strings that end a completion, found while it is written: each token is decoded with a few before it only."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]


def before_stop(text: str, strings: Sequence[str]) -> str:
    """The text up to the first of some strings; all of it where it has none."""
    return text[: min((place for place in map(text.find, strings) if place >= 0), default=len(text))]


class Reader:
    """Decodes a completion as it grows, each part once."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._context = 0
        self.read = 0
        """Tokens that have been read."""

    def unread(self, tokens: Sequence[int]) -> str:
        """Text behind the tokens that have been read.

        It is decoded behind the tokens that were read last, since some tokenizers drop a leading space.
        """
        known = self._decode(list(tokens[self._context : self.read]))
        return self._decode(list(tokens[self._context :]))[len(known) :]

    def advance(self, tokens: Sequence[int]) -> None:
        """All tokens have been read."""
        self._context, self.read = self.read, len(tokens)


class StopStrings:
    """Looks for any of some strings in the text of a completion that grows by a token at a time."""

    def __init__(self, strings: Sequence[str], decode: Decode) -> None:
        self._strings, self._reader = tuple(strings), Reader(decode)
        self._longest = max(map(len, strings))
        self._tail = ""

    def found(self, tokens: Sequence[int]) -> bool:
        """Whether the completion contains one of the strings; to be asked after each of its tokens.

        Where bytes do not form a character yet, the next ones are decoded together with them.
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
