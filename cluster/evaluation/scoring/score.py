"""Scores texts with a checkpoint: a row of totals for each, and the perplexity and bits a byte of all."""

import math
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from lockstep.cluster.evaluation.scoring.likelihood import Likelihood, Pair, Scoring, likelihoods
from lockstep.cluster.evaluation.scoring.texts import BadText, Part, Text, parts_of, utf8_bytes
from lockstep.cluster.evaluation.scoring.windows import rolling_windows
from lockstep.data.batch import Floats
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.model.config import ModelConfig, check_layout, check_numerics
from lockstep.model.formats.lockstep import check_language_model
from lockstep.model.formats.registry import open_model
from lockstep.rl.rollout.loading import as_lockstep


@dataclass(frozen=True)
class Rolling:
    """How texts are scored that are longer than the model's context; see `rolling_windows`."""

    window: int
    stride: int


@dataclass(frozen=True)
class Measures:
    """Log-probability in nats of so many tokens and bytes, and what follows from it."""

    logprob: float = 0.0
    tokens: int = 0
    bytes: int = 0

    @property
    def perplexity(self) -> float | None:
        """exp(−logprob / tokens); None without tokens, and where it is beyond float64."""
        if not self.tokens or -self.logprob / self.tokens > math.log(np.finfo(np.float64).max):
            return None
        return math.exp(-self.logprob / self.tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """−logprob / (bytes · ln 2), with which models of different tokenizers are compared; None without bytes."""
        return -self.logprob / (self.bytes * math.log(2)) if self.bytes else None

    def __add__(self, other: "Measures") -> "Measures":
        return Measures(self.logprob + other.logprob, self.tokens + other.tokens, self.bytes + other.bytes)


@dataclass
class Totals:
    """Measures of all texts so far."""

    texts: int = 0
    measures: Measures = field(default_factory=Measures)

    def add(self, measures: Measures) -> None:
        """Count one more text."""
        self.texts, self.measures = self.texts + 1, self.measures + measures

    def table(self) -> Table:
        """A table for a terminal."""
        shown = Table(title="all texts")
        shown.add_column("")
        shown.add_column("", justify="right")
        found = self.measures
        for name, value in (
            ("texts", f"{self.texts:,}"),
            ("tokens", f"{found.tokens:,}"),
            ("bytes", f"{found.bytes:,}"),
            ("log-probability, nats", f"{found.logprob:.4f}"),
            ("perplexity, a token", "" if found.perplexity is None else f"{found.perplexity:.4f}"),
            ("bits a byte", "" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"),
        ):
            shown.add_row(name, value)
        return shown


@dataclass(frozen=True)
class ScoredText:
    """A text in tokens: the parts of it that are scored, and for each the pairs of context and continuation."""

    text: Text
    parts: Sequence[Part]
    pairs: Sequence[Pair]


@dataclass(frozen=True)
class Work:
    """Texts that were found fit to be scored, and the checkpoint that scores them; made by `planned`."""

    checkpoint: Path | Storage
    tokenizer: Tokenizer
    scoring: Scoring
    texts: Sequence[ScoredText]

    def rows(self, totals: Totals, *, per_token: bool = False) -> Generator[dict[str, Any], None, None]:
        """Score the texts; yields a row for each, in order, as soon as it can be.

        Args:
            totals: what is scored is added to it.
            per_token: whether rows have each token with its log-probability.

        Raises:
            BadText: when log-probabilities are no numbers.
        """
        pairs = [pair for each in self.texts for pair in each.pairs]
        with closing(likelihoods(self.checkpoint, pairs, self.scoring)) as found:
            for index, each in enumerate(self.texts):
                row, measures = _row(each, list(islice(found, len(each.pairs))), self.tokenizer, per_token=per_token)
                totals.add(measures)
                own = {"id": each.text.given["id"]} if "id" in each.text.given else {}
                yield {"index": index} | own | row
            next(found, None)  # after the last one it waits for the ranks to end


@contextmanager
def planned(name: str, texts: Sequence[Text], scoring: Scoring, rolling: Rolling | None = None) -> Iterator[Work]:
    """Open a checkpoint of any format and tokenize texts for it; nothing is loaded before all texts are found fit.

    Args:
        rolling: how texts are scored; those that are longer than the model's context are refused without it.

    Raises:
        ValueError: one sentence on a text that cannot be scored, a checkpoint or a layout.
    """
    opened = open_model(name)
    model, tokenizer = opened.config, Tokenizer(opened.files)
    check_language_model(model, name)
    check_layout(scoring.layout, model)
    check_numerics(scoring.numerics, scoring.layout, model)
    _check_rolling(rolling, model)
    fit = [_scored_text(text, tokenizer, model, rolling) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        yield Work(as_lockstep(opened, Path(folder)), tokenizer, scoring, fit)


def _check_rolling(rolling: Rolling | None, model: ModelConfig) -> None:
    if rolling and not 1 <= rolling.stride <= rolling.window <= model.context:
        raise BadText(
            f"window={rolling.window} with stride={rolling.stride} does not fit a model that reads {model.context} "
            f"tokens: a window has at most {model.context}, and a stride at most a window"
        )


def _scored_text(text: Text, tokenizer: Tokenizer, model: ModelConfig, rolling: Rolling | None) -> ScoredText:
    parts = parts_of(text, tokenizer, model)
    return ScoredText(text, parts, [pair for part in parts for pair in _pairs(part, text, model, rolling)])


def _pairs(part: Part, text: Text, model: ModelConfig, rolling: Rolling | None) -> list[Pair]:
    """The pair of a part, or those of its windows; none where nothing is scored."""
    if not part.scored:
        return []
    whole = (*part.context, *part.scored)
    if rolling:
        windows = rolling_windows(len(whole), len(part.context), rolling.window, rolling.stride)
        return [(whole[w.begin : w.start], whole[w.start : w.end]) for w in windows]
    if len(whole) - 1 > model.context:
        raise BadText(
            f"{text.where} has {len(whole)} tokens with its context, and the model reads {model.context}: shorten "
            f"it, or score it in windows with window={model.context}"
        )
    return [(part.context, part.scored)]


def _row(
    scored: ScoredText, scores: Sequence[Likelihood], tokenizer: Tokenizer, *, per_token: bool
) -> tuple[dict[str, Any], Measures]:
    """What is said of a text, and its measures."""
    logp: Floats = np.concatenate([np.zeros(0, np.float32), *(each.logp for each in scores)])
    if not np.isfinite(logp).all():
        raise BadText(
            f"{scored.text.where} has log-probabilities that are not finite: look whether the checkpoint is damaged, "
            "or try dtype=float32"
        )
    total = math.fsum(logp.tolist())
    found = Measures(total, len(logp), sum(utf8_bytes(part.characters) for part in scored.parts))
    row: dict[str, Any] = {
        "logprob": total,
        "tokens": found.tokens,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "greedy": all(each.greedy for each in scores),
    }
    if per_token:
        ids = [token for part in scored.parts for token in part.scored]
        row["token_ids"] = ids
        row["token_texts"] = [tokenizer.decode([token], skip_special=False) for token in ids]
        row["token_logprobs"] = logp.tolist()
    return row, found
