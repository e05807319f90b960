"""Preference pairs and rankings for DPO, IPO and reward models: read from a file or made by verdicts, split, batched.

The reference of DPO and IPO is the policy as it was when the phase began. Its log-probabilities of all completions are
computed once, before the first update, and are kept with the comparisons, so that no second model is in memory.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lockstep.data.batch import Floats, Sample
from lockstep.data.preferences import RankedTokens, read, tokenized
from lockstep.data.row_reader import BadRow, left_out, stop
from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.algorithms.config import PreferenceConfig
from lockstep.rl.algorithms.samples import preference_samples
from lockstep.rl.algorithms.supervised import split_by_prompt
from lockstep.rl.types import Judged
from lockstep.rl.verdict import Outcome


@dataclass(frozen=True)
class Comparison:
    """Completions of one prompt, best first, with the reference's log-probabilities of their tokens."""

    ranked: RankedTokens
    reference_logp: tuple[Floats, ...] | None = None
    """None for a reward model, which has no reference."""

    def row(self) -> dict[str, Any]:
        """The comparison as a row of a table."""
        return asdict(self.ranked) | {"reference_logp": self.reference_logp}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Comparison":
        """The comparison that a row holds."""
        logp = row["reference_logp"]
        return cls(
            RankedTokens(row["index"], tuple(row["prompt"]), tuple(map(tuple, row["completions"]))),
            None if logp is None else tuple(np.array(each, np.float32) for each in logp),
        )


class TooFewComparisons(ValueError):
    """No comparison is left to learn from."""


def read_comparisons(
    config: PreferenceConfig, tokenizer: Tokenizer, say: Callable[[str], None] = lambda sentence: None
) -> list[Comparison]:
    """Reads and tokenizes all comparisons of the recipe's file.

    Args:
        say: takes a sentence on rows that were left out.

    Raises:
        BadRow: names file, line and field.
        BadTemplate, RefusedChat: when there is no chat template, or it refuses a conversation.
    """
    skipped: list[BadRow] = []
    rows = read(config.source, on_bad=skipped.append if config.on_bad == "skip" else stop)
    if skipped:
        say(left_out(skipped))
    return [Comparison(tokenized(row, tokenizer, chat=config.chat)) for row in rows]


def by_verdict(groups: Iterable[Sequence[Judged]], pairs: int) -> list[Comparison]:
    """Pairs of a correct and an incorrect completion of one prompt, with the tokens that were sampled.

    Completions that are alike count once, each is in one pair at most, and the ungradable and the empty are in none.

    Args:
        pairs: of each prompt, at most.
    """
    found = []
    for group in groups:
        sides = (_distinct(group, outcome) for outcome in (Outcome.correct, Outcome.incorrect))
        prompt = group[0].rollout.prompt
        for pair in list(zip(*sides, strict=False))[:pairs]:
            found.append(Comparison(RankedTokens(prompt.index, prompt.tokens, pair)))
    return found


def apart(comparisons: Sequence[Comparison], held_out: int, seed: int) -> tuple[list[Comparison], list[Comparison]]:
    """Splits comparisons into those to learn from and those held out, in an order that the seed decides.

    No prompt is on both sides: all comparisons of a held-out prompt are held out, so that there may be a few more.

    Raises:
        TooFewComparisons: when nothing is left to learn from.
    """
    train, kept = split_by_prompt([c.ranked.prompt for c in comparisons], held_out, seed, "preference")
    if not train:
        raise TooFewComparisons(
            f"{len(comparisons)} comparisons were found and preference.held_out={held_out} keeps all of them to "
            "measure with: lower it, give more of them, or sample more prompts"
        )
    return [comparisons[place] for place in train], [comparisons[place] for place in kept]


def samples_to_compare(chosen: Sequence[Comparison], *, judged: bool) -> list[Sample]:
    """The samples of a global batch of comparisons, each a group of its own; see `preference_samples`."""
    found = []
    for number, comparison in enumerate(chosen):
        completions = comparison.ranked.completions
        found += preference_samples(
            comparison.ranked.prompt,
            completions,
            range(len(completions), 0, -1),
            group=number,
            groups=len(chosen),
            judged=judged,
            reference_logp=comparison.reference_logp,
        )
    return found


def completions_of(comparisons: Sequence[Comparison]) -> list[tuple[Sequence[int], Sequence[int]]]:
    """The prompt and the completion of every completion of the comparisons, in order."""
    return [(c.ranked.prompt, completion) for c in comparisons for completion in c.ranked.completions]


def with_reference(comparisons: Sequence[Comparison], logp: Iterable[Floats]) -> list[Comparison]:
    """Adds the reference's log-probabilities to comparisons; they come in the order of `completions_of`."""
    columns = iter(logp)
    return [replace(c, reference_logp=tuple(next(columns) for _ in c.ranked.completions)) for c in comparisons]


def _distinct(group: Sequence[Judged], outcome: Outcome) -> list[tuple[int, ...]]:
    found = (tuple(s.rollout.tokens) for s in group if s.verdict.outcome is outcome)
    return list(dict.fromkeys(tokens for tokens in found if tokens))
