"""Strings that end a completion, found while it is written: each token is decoded with a few before it only."""

from collections.abc import Callable, Sequence


class StopStrings:
    """Looks for any of some strings in the text of a completion that grows by a token at a time."""

    def __init__(self, strings: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self._strings, self._decode = tuple(strings), decode
        self._longest = max(map(len, strings))
        self._tail = ""
        self._context = self._read = 0

    def found(self, tokens: Sequence[int]) -> bool:
        """Whether the completion contains one of the strings; to be asked after each of its tokens.

        A token is decoded behind the tokens that were decoded last, since some tokenizers drop a leading space; where
        bytes do not form a character yet, the next ones are decoded together with them.
        """
        known = self._decode(list(tokens[self._context : self._read]))
        new = self._decode(list(tokens[self._context :]))[len(known) :]
        text = self._tail + new
        if not new.endswith("\ufffd"):
            self._context, self._read = self._read, len(tokens)
            self._tail = text[max(0, len(text) - self._longest + 1) :] if self._longest > 1 else ""
        return any(string in text for string in self._strings)
