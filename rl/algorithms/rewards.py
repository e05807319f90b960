"""Rewards as sums of named, weighted terms, each of them reported.

Correctness, or the score of a reward model, is one term; the others look at the completion alone: its form, its length,
its language. A rollout whose verdict is ungradable has no reward, whatever its other terms say.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lockstep.data.tasks.user_function import LLM_JUDGE, parse
from lockstep.rl.algorithms.advantage import overlong
from lockstep.rl.types import Judged, Reward, Rewarded

Script = Literal[
    "latin", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "thai", "hangul", "japanese", "chinese"
]

_NAMES: dict[Script, tuple[str, ...]] = {
    "hangul": ("HANGUL", "CJK"),
    "japanese": ("HIRAGANA", "KATAKANA", "CJK"),
    "chinese": ("CJK",),
}
"""Where Unicode's names of a script's letters do not begin with its own."""


class _Term(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(0.0, allow_inf_nan=False, description="what the term is multiplied by; 0 leaves it out")

    @model_validator(mode="after")
    def _weighs_something(self) -> "_Term":
        if "weight" not in self.model_fields_set and (found := sorted(self.model_fields_set)):
            raise ValueError(f"{found[0]} is given and weight is not, which is 0 then: give a weight")
        return self


class FormatTerm(_Term):
    """1 for a completion that matches a regular expression as a whole, 0 for others."""

    pattern: str = Field(
        r"(?s)<think>.*</think>\s*<answer>.*</answer>\s*", description="a regular expression for the whole completion"
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"it is no regular expression: {error}") from error
        return pattern


class OverlongTerm(_Term):
    """DAPO's soft overlong punishment: 0 up to maximum − cache tokens, then down to −1; see `advantage.overlong`."""

    maximum: int = Field(20480, ge=1, description="tokens at which the punishment is −1")
    cache: int = Field(4096, ge=1, description="tokens over which it grows")

    @model_validator(mode="after")
    def _cache_fits(self) -> "OverlongTerm":
        if self.cache > self.maximum:
            raise ValueError(f"cache={self.cache} is above maximum={self.maximum}: it is the last part of it")
        return self


class LengthTerm(_Term):
    """1 for a completion whose length in tokens is within bounds, 0 for others."""

    low: int = Field(0, ge=0, description="tokens at least")
    high: int = Field(1 << 30, ge=0, description="tokens at most")

    @model_validator(mode="after")
    def _has_lengths_within(self) -> "LengthTerm":
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}, so that no completion is within bounds")
        return self


class LanguageTerm(_Term):
    """The share of a completion's letters that belong to a script; 1 where it has no letters."""

    script: Script = Field("latin", description="the script that letters should belong to")


class FunctionTerm(BaseModel):
    """A function of the user's, or an LLM judge, that gives a completion a number, asked by a verifier's process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    function: Annotated[str, Callable] = Field(
        description="module:function or file.py:function, which may take completion, answer, prompt, tokens, "
        "finish_reason and task by name; or llm_judge, from 0 to 1 by verifier.llm_judge"
    )
    weight: float = Field(1.0, allow_inf_nan=False, description="what its value is multiplied by; 0 leaves it out")
    name: str = Field("", description="of the term in metrics; that of the function where it is empty")

    @property
    def term(self) -> str:
        """The name of the term."""
        return self.name or self.function.rpartition(":")[2]

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, function: str) -> str:
        return function if function == LLM_JUDGE else str(parse(function))


class RewardConfig(BaseModel):
    """The reward of a completion: the sum of these terms, each times its weight. Those of weight 0 are left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    correctness: float = Field(
        1.0, allow_inf_nan=False, description="weight of the verdict's reward, or of a reward model's score"
    )
    format: FormatTerm = FormatTerm()
    overlong: OverlongTerm = OverlongTerm()
    length: LengthTerm = LengthTerm()
    language: LanguageTerm = LanguageTerm()
    functions: tuple[FunctionTerm, ...] = ()

    @field_validator("functions", mode="before")
    @classmethod
    def _takes_a_list(cls, functions: Any) -> Any:
        """A task's reward comes out of validators that have read JSON into lists by then."""
        return tuple(functions) if isinstance(functions, list) else functions

    @model_validator(mode="after")
    def _has_terms_of_different_names(self) -> "RewardConfig":
        names = ["correctness", "score", "format", "overlong", "length", "language"]
        for term in self.functions:
            if term.term in names:
                raise ValueError(f"two terms are called {term.term}: give a function another name, by its key name")
            names.append(term.term)
        return self

    @property
    def user_functions(self) -> dict[str, str]:
        """Functions of the user's that count, by the name of their term."""
        return {each.term: each.function for each in self.functions if each.weight}


CORRECTNESS = RewardConfig()
"""The verdict's reward alone."""


@dataclass(frozen=True)
class Rewards:
    """The reward of each task: its own where it has one, which takes the place of the run's as a whole."""

    run: RewardConfig = CORRECTNESS
    own: Mapping[str, RewardConfig] = field(default_factory=dict)
    """By the name of the task."""

    def of(self, task: str) -> RewardConfig:
        """The reward of completions of a task."""
        return self.own.get(task, self.run)

    @property
    def user_functions(self) -> dict[str, dict[str, str]]:
        """Functions of the user's by the name of their term, by task; under an empty name those of all other tasks."""
        return {"": self.run.user_functions} | {task: config.user_functions for task, config in self.own.items()}


def rewarded(
    group: Sequence[Judged], config: RewardConfig, punishment: Callable[[int], float] = lambda length: 0.0
) -> tuple[Rewarded, ...]:
    """The rollouts of a group with their rewards.

    Args:
        punishment: what the method takes off for a completion of so many tokens; 0 or less.
    """
    found = (replace(reward_of(j, config), punishment=punishment(len(j.rollout.tokens))) for j in group)
    return tuple(Rewarded(j.rollout, j.verdict, reward, score=j.score) for j, reward in zip(group, found, strict=True))


def reward_of(judged: Judged, config: RewardConfig) -> Reward:
    """The reward of a rollout; a reward model's score, where there is one, takes the place of the verdict's reward.

    The total is None where it says nothing: it is no finite number, as of a reward model whose score overflowed, or a
    function of the user's failed.
    """
    text, length, found = judged.rollout.text, len(judged.rollout.tokens), judged.verdict.terms
    grade = "correctness" if judged.score is None else "score"
    values = {grade: (config.correctness, judged.grade)} if config.correctness else {}
    if config.format.weight:
        values["format"] = config.format.weight, _has_form(text, config.format.pattern)
    if config.overlong.weight:
        values["overlong"] = config.overlong.weight, overlong(length, config.overlong.maximum, config.overlong.cache)
    if config.length.weight:
        values["length"] = config.length.weight, float(config.length.low <= length <= config.length.high)
    if config.language.weight:
        values["language"] = config.language.weight, share_of_script(text, config.language.script)
    values |= {each.term: (each.weight, found.get(each.term)) for each in config.functions if each.weight}
    terms = {name: weight * value for name, (weight, value) in values.items() if value is not None}
    total = sum(terms.values())
    said = judged.grade is not None and math.isfinite(total) and config.user_functions.keys() <= found.keys()
    return Reward(total if said else None, terms)


def means(rewards: Sequence[Reward]) -> dict[str, float]:
    """The mean of each term over the rewards that have it and a total, as metrics: `reward/format` and so on."""
    graded = [reward.terms for reward in rewards if reward.total is not None]
    names = dict.fromkeys(name for terms in graded for name in terms)
    return {f"reward/{name}": float(np.mean([terms[name] for terms in graded if name in terms])) for name in names}


def share_of_script(text: str, script: Script) -> float:
    """The share of text's letters that belong to a script, from 0 to 1; 1 where there are none."""
    letters = {character: count for character, count in Counter(text).items() if character.isalpha()}
    names = _NAMES.get(script, (script.upper(),))
    own = sum(count for letter, count in letters.items() if unicodedata.name(letter, "").startswith(names))
    return own / sum(letters.values()) if letters else 1.0


def _has_form(text: str, pattern: str) -> float:
    return float(re.fullmatch(pattern, text) is not None)
