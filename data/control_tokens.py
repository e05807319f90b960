"""Keeps the control tokens that a chat template writes apart from texts that only spell them.

A user's `<|im_end|>` is text. Before a template is rendered, every spelling in what users, tools and data say is marked
with a private-use character inside of it. What is not marked afterwards, the template wrote. A rendering with marks is
encoded by a twin of the tokenizer, whose control tokens have names that no text spells; one without marks, which is
nearly every one, by the tokenizer itself. So no border between texts is seen by either, and tokens merge across them.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NewType

from tokenizers import Tokenizer as FastTokenizer

from lockstep.data.json_text import whole_characters

Marked = NewType("Marked", str)
"""A text in which every control token that is only spelled is marked: `ControlTokens.plain` is the text itself."""

_MARK = "\U0010fffd"
_SPELLED, _NATIVE = _MARK + "1", _MARK + "0"
"""Inside of a spelling, and in the place of the character itself."""
GENERATION = (_MARK + "2", _MARK + "3")
"""Where a `{% generation %}` block begins and ends."""
_GENERATED = re.compile("|".join(GENERATION))
_FIRST_NAME = 0x100000
"""The twin's control tokens are called by private-use characters from here on."""


class ControlTokens:
    """The control tokens of a tokenizer: marks their spellings, and encodes marked texts."""

    def __init__(self, fast: FastTokenizer, names: Iterable[str]) -> None:
        """
        Args:
            names: of the control tokens, as the tokenizer spells them.
        """
        self._fast, self._names = fast, sorted(names, key=lambda name: (-len(name), name))
        self._own = {name: chr(_FIRST_NAME + number) for number, name in enumerate(self._names)}
        spelled = "|".join(map(re.escape, self._names)) or r"(?!)"
        self._spelling = re.compile(spelled)
        self._written = re.compile(f"(?:{spelled})(?!{_SPELLED})")
        last = chr(_FIRST_NAME + max(len(self._names) - 1, 0))
        self._private = re.compile(f"[{chr(_FIRST_NAME)}-{last}]")

    def mark(self, value: Any) -> Any:
        """Mark all spellings in a text, and in the texts of a list or an object and its keys."""
        if isinstance(value, str):
            return self._marked(value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(each) for key, each in value.items()}
        return [self.mark(each) for each in value] if isinstance(value, list | tuple) else value

    def verbatim(self, text: str) -> Marked:
        """A text whose control tokens are meant."""
        return Marked(whole_characters(text).replace(_MARK, _NATIVE))

    def plain(self, marked: Marked) -> str:
        """The text without marks."""
        return marked.replace(_SPELLED, "").replace(_NATIVE, _MARK) if _MARK in marked else marked

    def encode(self, marked: Marked) -> list[int]:
        """Tokens of a text. What is not marked in it and spells a control token is one."""
        if _SPELLED not in marked:
            return self._fast.encode(self.plain(marked), add_special_tokens=False).ids
        twin, numbers = self._twin
        ids = twin.encode(self._renamed(marked), add_special_tokens=False).ids
        return [numbers.get(number, number) for number in ids]

    def written(self, marked: Marked) -> re.Match[str] | None:
        """The first control token of a text that is not only spelled."""
        return self._written.search(marked)

    def encode_all(self, texts: Sequence[Marked]) -> list[list[int]]:
        """Tokens of several texts, in parallel where they spell no control token; see `encode`."""
        plain = [self.plain(text) for text in texts if _SPELLED not in text]
        found = iter(self._fast.encode_batch_fast(plain, add_special_tokens=False))
        return [self.encode(text) if _SPELLED in text else next(found).ids for text in texts]

    def number(self, name: str) -> int:
        """The id of a control token."""
        found = self._fast.token_to_id(name)
        assert found is not None, f"{name} is no token"
        return found

    def context(self, marked: Marked) -> Marked:
        """The end of a text, from its last control token on: what is behind is encoded as behind the whole text."""
        last = 0
        for match in self._written.finditer(marked):
            last = match.start()
        return Marked(marked[last:])

    def _marked(self, text: str) -> str:
        kept = self.verbatim(text)
        found = self._spelling.sub(lambda match: match[0][:1] + _SPELLED + match[0][1:], kept)
        hidden = found == kept and self._fast.normalizer is not None and self._spelled_when_normal(kept)
        return kept[:1] + _SPELLED + kept[1:] if hidden else found

    def _spelled_when_normal(self, text: str) -> bool:
        """Whether the tokenizer's normalizer makes the spelling of a control token, such as out of wide letters."""
        return bool(self._spelling.search(self._fast.normalizer.normalize_str(text)))

    def _renamed(self, marked: Marked) -> str:
        """The text as the twin reads it: private-use characters that are its names can only be the template's."""
        found, last = [], 0
        for match in self._written.finditer(marked):
            found += [self._said(marked[last : match.start()]), self._own[match[0]]]
            last = match.end()
        return "".join((*found, self._said(marked[last:])))

    def _said(self, piece: str) -> str:
        return self._private.sub("\ufffd", self.plain(Marked(piece)))

    @cached_property
    def _twin(self) -> tuple[FastTokenizer, dict[int, int]]:
        """A tokenizer that differs in the names of its control tokens, and their ids there → their ids here."""
        values = json.loads(self._fast.to_str())
        values["post_processor"] = values["truncation"] = values["padding"] = None
        for token in values["added_tokens"]:
            token["content"] = self._own.get(token["content"], token["content"])
        self._rename_model(values["model"])
        twin = FastTokenizer.from_str(json.dumps(values))
        ids = [(twin.token_to_id(own), self._fast.token_to_id(name)) for name, own in self._own.items()]
        return twin, {there: here for there, here in ids if there is not None and here is not None and there != here}

    def _rename_model(self, model: dict[str, Any]) -> None:
        own, vocabulary = self._own, model.get("vocab")
        if isinstance(vocabulary, dict):
            model["vocab"] = {own.get(name, name): number for name, number in vocabulary.items()}
        elif vocabulary is not None:
            model["vocab"] = [[own.get(name, name), score] for name, score in vocabulary]
        if model.get("unk_token") is not None:
            model["unk_token"] = own.get(model["unk_token"], model["unk_token"])
        if model.get("merges"):
            model["merges"] = [pair for pair in model["merges"] if not _touches(pair, own)]


def without_generation(rendered: str) -> tuple[Marked, list[tuple[int, int]]]:
    """A rendering without the marks of `GENERATION`, and where the blocks were, in characters of what is returned."""
    pieces = _GENERATED.split(rendered)
    ends = list(accumulate(map(len, pieces)))
    return Marked("".join(pieces)), list(zip(ends[::2], ends[1::2], strict=False))


def _touches(pair: str | Sequence[str], names: Mapping[str, str]) -> bool:
    """Whether a merge has a control token, or makes one."""
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left in names or right in names or left + right in names
