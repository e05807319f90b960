"""Supervised fine-tuning (SFT): its recipe section, and conversations: read, tokenized, and split by their prompts.

All are tokenized before the first step, so that what cannot be used and what is too long is known then.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lockstep.data.conversations.assistant_mask import MaskedTokens, masked_tokens
from lockstep.data.conversations.conversation import Conversation, read
from lockstep.data.conversations.token_table import TokenTable
from lockstep.data.row_reader import BadRow, OnBad, left_out, stop
from lockstep.data.tokenizer import Tokenizer
from lockstep.model.training.config import OptimizerConfig, given

_TOGETHER = 256
"""Conversations that the tokenizer gets in one call."""


class SupervisedConfig(BaseModel):
    """Supervised fine-tuning (SFT) on what the assistant says in conversations, or on answers to training problems.

    Conversations come from a file; answers have the form that task.completion gives.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(10, ge=0, description="updates of the weights")
    problems_per_step: int = Field(32, ge=1, description="solved problems, or conversations, in a global batch")
    source: Annotated[str, Path] = Field(
        "", description="a file of conversations; empty for the answers to training problems"
    )
    on_bad: Literal["stop", "skip"] = Field("stop", description="stop at a bad row of source, or skip and count it")
    chat: bool = Field(True, description="put the conversations of source into the tokenizer's chat template")
    train_on: Literal["all", "last"] = Field(
        "all", description="turns of the assistant in a conversation that are learned from"
    )
    longest: int = Field(
        0, ge=0, description="tokens of a conversation at most; 0 for as many as the model's context holds"
    )
    on_long: Literal["stop", "skip", "truncate"] = Field(
        "stop", description="stop at a longer conversation, skip and count it, or cut off what is too much at its end"
    )
    held_out: int = Field(
        32, ge=0, description="conversations of source that are not learned from; the loss is measured on them"
    )
    evaluate_every: int = Field(0, ge=0, description="steps between these measurements; 0 for the last step alone")
    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="after")
    def _has_what_keys_need(self) -> "SupervisedConfig":
        keys = ("on_bad", "chat", "train_on", "longest", "on_long", "held_out", "evaluate_every")
        for key in () if self.source else given(self, *keys):
            raise ValueError(f"{key} is of conversations, and source='': name a file of them, or leave it out")
        if self.evaluate_every and not self.held_out:
            raise ValueError(f"evaluate_every={self.evaluate_every} has nothing to measure: held_out=0")
        return self

    def measures_at(self, step: int) -> bool:
        """Whether the held-out conversations are measured after this step."""
        return is_due(step, self.steps, self.evaluate_every)


class TooFewConversations(ValueError):
    """No conversation is left to learn from."""


@dataclass
class _Long:
    """Conversations of more tokens than there may be: how many were left out, and cut off."""

    limit: int
    counts: dict[str, int] = field(default_factory=lambda: {"left out": 0, "cut off": 0})

    def __str__(self) -> str:
        found = " and ".join(f"{count} {what}" for what, count in self.counts.items() if count)
        return f"Conversations of more than {self.limit} tokens: {found}" if found else ""


def read_conversations(
    config: SupervisedConfig, tokenizer: Tokenizer, context: int, say: Callable[[str], None] = lambda sentence: None
) -> TokenTable:
    """Reads and tokenizes all conversations of the recipe's file, with an assistant mask.

    Args:
        context: tokens that the model can read; those of a conversation at most, where `longest` says nothing.
        say: takes sentences on what was found and what was left out.

    Raises:
        BadRow: names file and line of a row that cannot be used, or that is too long.
        BadTemplate, RefusedChat: when there is no chat template, or it takes no question with an answer.
        TooFewConversations: when there is none.
    """
    skipped, long = list[BadRow](), _Long(config.longest or context)
    on_bad = skipped.append if config.on_bad == "skip" else stop
    table = TokenTable.of(_sequences(config, tokenizer, long, on_bad))
    for sentence in filter(None, (left_out(skipped), str(long))):
        say(sentence)
    if not len(table):
        raise TooFewConversations(f"supervised.source={config.source} has no conversation to learn from")
    share = table.taught.mean()
    say(f"{len(table)} conversations of {len(table.tokens)} tokens, {share:.0%} of which are the assistant's")
    return table


def is_due(step: int, steps: int, every: int) -> bool:
    """Whether something is measured after a step: the last one, and each so many where that is not 0."""
    return step == steps or bool(every and step % every == 0)


def split_conversations(table: TokenTable, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the conversations to learn from and of those held out; no prompt is on both sides.

    Raises:
        TooFewConversations: when nothing is left to learn from.
    """
    train, kept = split_by_prompt([table.prompt(number) for number in range(len(table))], held_out, seed, "sft")
    if not train:
        raise TooFewConversations(
            f"{len(table)} conversations were found and supervised.held_out={held_out} keeps all of them to measure "
            "with: lower it, or give more of them"
        )
    return train, kept


def split_by_prompt(prompts: Sequence[Hashable], held_out: int, seed: int, phase: str) -> tuple[list[int], list[int]]:
    """Splits places of examples into those to learn from and those held out, in an order that the seed decides.

    No prompt is on both sides: all examples of a held-out prompt are held out, so that there may be a few more.
    """
    order = np.random.default_rng([seed, *phase.encode()]).permutation(len(prompts)).tolist()
    kept = {prompts[place] for place in order[:held_out]}
    train = [place for place in order if prompts[place] not in kept]
    return train, [place for place in order if prompts[place] in kept]


def _sequences(
    config: SupervisedConfig, tokenizer: Tokenizer, long: _Long, on_bad: OnBad
) -> Iterator[list[MaskedTokens]]:
    """The tokens of each conversation that can be used."""
    rows = read(config.source, on_bad=on_bad)
    while together := [_chosen(each, config) for each in islice(rows, _TOGETHER)]:
        for conversation, found in zip(together, masked_tokens(together, tokenizer, chat=config.chat), strict=True):
            if isinstance(found, BadRow):
                on_bad(found)
            elif not any(any(each.taught[1:]) for each in found):
                on_bad(BadRow(f"{conversation.place}: the chat template's generation blocks mark nothing to learn"))
            elif kept := _within(found, long, config, conversation.place):
                yield kept


def _chosen(conversation: Conversation, config: SupervisedConfig) -> Conversation:
    return conversation if config.train_on == "all" else replace(conversation, taught=conversation.taught[-1:])


def _within(found: Sequence[MaskedTokens], long: _Long, config: SupervisedConfig, place: str) -> list[MaskedTokens]:
    """What is learned from of a conversation: sequences that are short enough and teach something."""
    most = max(len(each.tokens) for each in found)
    if most > long.limit and config.on_long == "stop":
        raise BadRow(
            f"{place}: the conversation has {most} tokens, and may have {long.limit}: raise supervised.longest up to "
            "the model's context, or set supervised.on_long to skip or truncate"
        )
    cut = [MaskedTokens(each.tokens[: long.limit], each.taught[: long.limit]) for each in found]
    kept = [each for each in cut if any(each.taught[1:])]
    if most > long.limit:
        kept = kept if config.on_long == "truncate" else []
        long.counts["cut off" if kept else "left out"] += 1
    return kept
