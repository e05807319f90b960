"""Prompt-lookup (n-gram) speculation: proposes the tokens that followed the last ones when they occurred before.

A pass then computes the proposed tokens together with the one that is due, and what is drawn behind each says whether
the next one is right (Leviathan et al. 2023, with a draft that comes from the text itself; Saxena 2023). Nothing is
rejected by chance: the random number of a token is a function of its place, so that each place draws what it would have
drawn alone, and a proposal counts only where it is that very token.
"""

from collections.abc import Sequence

NGRAM = 3
"""Tokens that have to occur again. Two find more in answers to word problems, with twice as many tokens on trial, and
lose their place more often where a text is copied; four find less (docs/log.md, 2026-11-30)."""

LONGEST_PAUSE = 32
"""Lookups that are left out at most after proposals of which nothing was right."""


class PromptLookup:
    """Proposes continuations of one text, which grows.

    Each proposal of which nothing was right doubles the lookups that are left out, and a token that was right ends
    that: a text that repeats its words, but not what follows them, costs next to nothing.
    """

    def __init__(self) -> None:
        self._text: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        self._pause = self._left_out = 0

    @property
    def read(self) -> int:
        """Tokens of the text that have been read."""
        return len(self._text)

    def propose(self, new: Sequence[int], most: int) -> tuple[int, ...]:
        """Read the tokens that the text has gained, and propose up to `most` that may follow them.

        They are those behind the last earlier occurrence of the text's last `NGRAM` tokens; where these reach the
        text's end, the text is taken to repeat itself from there.
        """
        for token in new:
            if len(self._text) >= NGRAM:
                self._behind[self._last()] = len(self._text)
            self._text.append(token)
        start = self._behind.get(self._last())
        if start is None:
            return ()
        if self._left_out < self._pause:
            self._left_out += 1
            return ()
        period = len(self._text) - start
        return tuple(self._text[start + i % period] for i in range(most))

    def verified(self, accepted: int) -> None:
        """Say how many tokens of the last proposal were right."""
        self._pause = 0 if accepted else min(2 * self._pause + 1, LONGEST_PAUSE)
        self._left_out = 0

    def _last(self) -> tuple[int, ...]:
        return tuple(self._text[-NGRAM:])
