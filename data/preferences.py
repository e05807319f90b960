"""Preference data: ranked completions of a prompt, read from the row formats of HH, UltraFeedback and others.

A ranking is best first, and a pair is a ranking of two. What ranks nothing (equal texts, equal scores) is a bad row.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from lockstep.data.conversations.messages import Turn, question, turns_of
from lockstep.data.row_reader import BadRow, OnBad, Row, read_rows, stop
from lockstep.data.tokenizer import Tokenizer

_SPEAKER = re.compile(r"\n\n(Human|Assistant):[ ]?")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_SCORES = ("overall_score", "score")
_PROMPTS = ("prompt", "conversations", "instruction")
"""Fields that hold what is asked: TRL's, ShareGPT's and Alpaca's."""


@dataclass(frozen=True)
class Preference:
    """A prompt and completions of it, best first."""

    index: int
    """Of the row that it came from."""
    prompt: str
    """The last user message; or the whole prompt text, where the completions are a model's own."""
    ranked: tuple[str, ...]
    """Two completions or more, all different."""
    before: tuple[Turn, ...] = ()
    """The conversation up to the prompt."""


@dataclass(frozen=True)
class RankedTokens:
    """A tokenized preference: all completions continue the same prompt tokens."""

    index: int
    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    """Best first; each ends as the chat template ends a turn, or with the tokenizer's end token where there is one."""


def read(source: str, *, on_bad: OnBad = stop) -> list[Preference]:
    """Read preferences from local files or the Hub; see `row_reader.read_rows` for what a source may be.

    Recognised are Anthropic's HH (`chosen`, `rejected` as transcripts, arXiv:2204.05862), UltraFeedback (message lists
    in `chosen` and `rejected`; or `instruction` with `completions` and their `overall_score`, arXiv:2310.01377), TRL's
    `prompt`, `chosen`, `rejected`, as texts or as messages, ShareGPT's `conversations` and Alpaca's `instruction`,
    `input` in the place of `prompt`, and rankings: `prompt`, a text or messages, with `ranked`, best first, or with
    `responses` and `scores`.

    Args:
        on_bad: called with the error of each bad row, which is skipped; the default raises it.

    Raises:
        BadRow: names file, line and field.
    """
    found = []
    for index, row in enumerate(read_rows(source, on_bad=on_bad)):
        try:
            found.append(_preference(index, row))
        except BadRow as error:
            on_bad(error)
    return found


def from_verdicts(rows: Iterable[Mapping[str, Any]], *, pairs: int = 1) -> Iterator[Preference]:
    """Make preference pairs, correct over incorrect, from graded completions; ungradable ones are left out.

    Args:
        rows: `prompt`, `completion` and `outcome` of each, as `lockstep eval` and runs save them.
        pairs: of each prompt at most; each completion is in one of them at most.
    """
    sides: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: {"correct": {}, "incorrect": {}})
    for row in rows:
        if row["outcome"] in ("correct", "incorrect"):
            sides[str(row["prompt"])][str(row["outcome"])][str(row["completion"])] = None
    for index, (prompt, found) in enumerate(sides.items()):
        both = found["correct"].keys() & found["incorrect"].keys()  # a verdict that changed with its mind is none
        good, bad = ([text for text in found[side] if text not in both] for side in ("correct", "incorrect"))
        yield from (Preference(index, prompt, pair) for pair in islice(zip(good, bad, strict=False), pairs))


def tokenized(preference: Preference, tokenizer: Tokenizer, *, chat: bool = True) -> RankedTokens:
    """Tokenize a preference with the chat template, or its texts as they are, for prompts that a model has read so.

    The prompt is encoded once and alone, as rollouts read it, so that all completions share its tokens exactly.
    Completions are encoded as they go on behind it. Control tokens that they spell are text.

    Raises:
        BadTemplate, RefusedChat: when there is no chat template, or it refuses the conversation.
    """
    if chat:
        turns = [asdict(turn) for turn in (*preference.before, Turn("user", preference.prompt))]
        prompt = tokenizer.encode_chat(turns)
        completions = [tokenizer.chat_answer(turns, text) for text in preference.ranked]
    else:
        prompt = tokenizer.encode_prompt(preference.prompt)
        before = tokenizer.verbatim(preference.prompt)
        completions = [tokenizer.text_answer(before, tokenizer.marked(text)) for text in preference.ranked]
    return RankedTokens(preference.index, tuple(prompt), tuple(map(tuple, completions)))


def _preference(index: int, row: Row) -> Preference:
    if "completions" in row.values and "instruction" in row.values:
        return _scored(index, row, (Turn("user", row.text("instruction")),), *_ultrafeedback(row))
    if "ranked" in row.values:
        return _ranking(index, row, "ranked", _prompt(row), row.texts("ranked"))
    if "responses" in row.values:
        return _scored(index, row, _prompt(row), row.texts("responses"), row.items("scores"))
    if not _has_prompt(row) and not isinstance(row.values.get("chosen"), list):
        return _compared(index, row, *(_transcript(row, name) for name in ("chosen", "rejected")))
    return _compared(index, row, *(_conversation(row, name) for name in ("chosen", "rejected")))


def _has_prompt(row: Row) -> bool:
    return any(row.values.get(name) is not None for name in _PROMPTS)


def _prompt(row: Row) -> tuple[Turn, ...]:
    """What is asked: a person's text, or messages that end with one's."""
    name = next((name for name in _PROMPTS if row.values.get(name) is not None), "prompt")
    if name == "instruction":
        turns = [Turn("user", question(row))]
    else:
        turns = turns_of(row, name) if isinstance(row.values.get(name), list) else [Turn("user", row.text(name))]
    if turns[-1].role != "user":
        raise row.bad(name, f"must end with a person's turn, and ends with one of {turns[-1].role!r}")
    return tuple([Turn("system", row.text("system")), *turns] if name != "prompt" and row.has("system") else turns)


def _conversation(row: Row, name: str) -> list[Turn]:
    """A whole conversation: the prompt with an answer behind it, or messages that have the prompt among them."""
    if not isinstance(row.values.get(name), list | dict):
        return [*_prompt(row), Turn("assistant", row.text(name))]
    said = turns_of(row, name)
    if not _has_prompt(row) or (isinstance(row.values.get("prompt"), str) and _asks(said)):
        return said
    prompt = list(_prompt(row))
    return said if said[: len(prompt)] == prompt else prompt + said


def _asks(turns: Sequence[Turn]) -> bool:
    return any(turn.role == "user" for turn in turns)


def _ranking(index: int, row: Row, name: str, asked: tuple[Turn, ...], ranked: Sequence[str]) -> Preference:
    if len(ranked) < 2 or len(set(ranked)) < len(ranked):
        raise row.bad(name, f"ranks {len(set(ranked))} different texts, and needs two or more, each once")
    return Preference(index, asked[-1].content, tuple(ranked), asked[:-1])


def _compared(index: int, row: Row, chosen: list[Turn], rejected: list[Turn]) -> Preference:
    """Two conversations that are alike up to their last turns."""
    if chosen[:-1] != rejected[:-1]:
        raise row.bad("rejected", "differs from 'chosen' before its last turn, so that they answer different prompts")
    if [turn.role for turn in chosen[-2:]] != ["user", "assistant"] or rejected[-1].role != "assistant":
        raise row.bad("chosen", "must end with a person's turn and the assistant's")
    score = [row.values.get(f"score_{side}") for side in ("chosen", "rejected")]
    if None not in score and score[0] == score[1]:
        raise row.bad("score_chosen", f"is that of 'rejected', {score[0]}, so that neither is preferred")
    return _ranking(index, row, "rejected", tuple(chosen[:-1]), [chosen[-1].content, rejected[-1].content])


def _transcript(row: Row, name: str) -> list[Turn]:
    """Turns of a text in which "\\n\\nHuman:" and "\\n\\nAssistant:" say who speaks."""
    before, *parts = _SPEAKER.split(row.text(name))
    if before.strip() or not parts:
        raise row.bad(name, r"must be a transcript that begins with '\n\nHuman:', where there is no field 'prompt'")
    return [Turn(_ROLES[who], said) for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _ultrafeedback(row: Row) -> tuple[list[str], list[Any]]:
    answers = [Row(f"{row.place}, completions", row.checked("completions", c, dict)) for c in row.items("completions")]
    names = [next((name for name in _SCORES if answer.has(name)), _SCORES[0]) for answer in answers]
    return [a.text("response") for a in answers], [a.json(name) for a, name in zip(answers, names, strict=True)]


def _scored(index: int, row: Row, asked: tuple[Turn, ...], texts: Sequence[str], scores: Sequence[Any]) -> Preference:
    """Best first; of completions with one score, which are not ranked among themselves, the first stands for all."""
    name = "responses" if "responses" in row.values else "completions"
    if len(scores) != len(texts) or not all(isinstance(s, int | float) and math.isfinite(s) for s in scores):
        raise row.bad(name, "needs one number for each text as its score")
    by_score: dict[float, str] = {}
    for score, text in zip(scores, texts, strict=True):
        by_score.setdefault(score, text)
    distinct = dict.fromkeys(by_score[score] for score in sorted(by_score, reverse=True))
    return _ranking(index, row, name, asked, list(distinct))
