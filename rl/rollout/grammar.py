"""Grammars for constrained decoding (guided decoding, structured output): which tokens may come next in a completion.

llguidance parses what has been written with an Earley parser over bytes and gives a mask of the vocabulary for the next
token. Which tokens end a completion is not its business: for it, the text's end is a token behind the vocabulary, and
the engine's own end tokens are allowed where the grammar may end, and nowhere else.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

if TYPE_CHECKING:  # engines run where it is not installed
    from llguidance import LLMatcher

_END = "7f3a-the-text-ends"
"""Name of the token behind the vocabulary."""


class BadGrammar(ValueError):
    """A grammar, or a tokenizer, that decoding cannot be constrained by."""


class GrammarState:
    """How far one completion has come in its grammar."""

    def __init__(self, matcher: "LLMatcher", tokens: int) -> None:
        """
        Args:
            tokens: number of those that the tokenizer has.
        """
        self._matcher, self._tokens = matcher, tokens

    def allowed(self, ends: Collection[int], vocabulary: int) -> np.ndarray:
        """Which tokens may come next, bool [V].

        Args:
            ends: tokens that end the completion, allowed where the grammar may end only.

        Raises:
            BadGrammar: when the parser has reached a limit.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        known = np.unpackbits(bits, count=self._tokens, bitorder="little")[:vocabulary]
        found = np.zeros(vocabulary, bool)
        found[: len(known)] = known
        found[list(ends)] = self._matcher.is_accepting()
        return found

    def take(self, token: int) -> bool:
        """Go on by a token that was allowed and ends nothing; returns whether nothing but an end may follow.

        Raises:
            BadGrammar: when the token was not allowed, or the parser has reached a limit.
        """
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise BadGrammar(f"the completion cannot go on in its grammar: {_first_line(self._matcher.get_error())}")


@dataclass(frozen=True, eq=False)
class Grammar:
    """A compiled grammar, which any number of completions may be written in."""

    _matcher: "LLMatcher"
    _tokens: int

    def begin(self) -> GrammarState:
        """The state of a completion that has no token yet."""
        return GrammarState(self._matcher.deep_copy(), self._tokens)


class GrammarCompiler:
    """Compiles grammars over the tokens of one tokenizer."""

    def __init__(self, tokenizer_json: str) -> None:
        """
        Args:
            tokenizer_json: the content of tokenizer.json, with all special tokens.

        Raises:
            BadGrammar: for a tokenizer whose tokens do not say which bytes they are.
        """
        from llguidance import LLTokenizer

        made = FastTokenizer.from_str(tokenizer_json)
        made.add_special_tokens([_END])
        self._tokens = made.get_vocab()[_END]
        try:
            self._tokenizer = LLTokenizer(made.to_str(), eos_token=self._tokens)
        except ValueError as error:
            raise BadGrammar(f"output cannot be constrained with this model's tokenizer: {error}") from error

    def __call__(self, lark: str) -> Grammar:
        """Compile a grammar in llguidance's Lark format, in which `%json {…}` is a JSON schema.

        https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md describes the format.

        Raises:
            BadGrammar: says what is wrong with it, or not supported in a schema of it.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, lark, log_level=0)
        if matcher.is_error():
            raise BadGrammar(_first_line(matcher.get_error()).rpartition(_IN_SCHEMA)[2])
        return Grammar(matcher, self._tokens)


_IN_SCHEMA = "failed to compile JSON schema: "


def _first_line(error: str) -> str:
    return error.partition("\n")[0]
