"""Do rollouts and training compute the same? A model writes completions of real prompts, and a trainer scores them."""

import json
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.table import Table

from lockstep.cluster.checks.mismatch import Mismatch, measure
from lockstep.cluster.inference import as_lockstep
from lockstep.data.tasks.task import TaskConfig, make_split
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.layout import Layout
from lockstep.distributed.rank_pool import RankPool
from lockstep.model.config import ModelConfig, Numerics, check_layout
from lockstep.rl.prompts import make_prompt
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.types import Prompt

TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Work:
    """What is written, and in which arithmetic."""

    sampling: SamplingParams
    dtype: str = "bfloat16"
    numerics: Numerics = "fast"
    tensor: int = 1
    prompts: Path | None = None
    """One a line, as text, or as JSON with the key "prompt"; held-out problems of `TaskConfig()` otherwise."""
    count: int = 16
    """Prompts at most."""
    samples: int = 4
    """Completions of each."""
    seed: int = 0


def mismatch(name: str, work: Work) -> Mismatch:
    """What `lockstep mismatch` prints, of a checkpoint of any format.

    Raises:
        ValueError: one sentence on what does not fit.
    """
    layout = Layout(tensor=work.tensor)
    with tempfile.TemporaryDirectory() as folder, RankPool(TIMEOUT_S) as worlds:
        checkpoint = as_lockstep(name, Path(folder))
        source = Checkpoint(checkpoint)
        check_layout(layout, ModelConfig(**source.manifest["model"]))
        prompts = _prompts(work, Tokenizer(source.files))
        given = checkpoint, work.dtype, work.numerics, prompts, work.sampling, work.samples, work.seed
        return worlds.run(layout, measure, *given)[0]


def table(found: Mismatch, work: Work) -> Table:
    """The mismatch for a terminal."""
    shown = Table(title=f"rollouts against training: {work.numerics} numerics, {work.dtype}, tensor={work.tensor}")
    shown.add_column("")
    shown.add_column("", justify="right")
    for name, value in (
        ("|Δ log p|, mean", f"{found.mean:.2e}"),
        ("|Δ log p|, 99.9th percentile", f"{found.percentile_99_9:.2e}"),
        ("|Δ log p|, largest", f"{found.largest:.2e}"),
        ("KL, nats a token", f"{found.kl:.2e}"),
        ("differing bits", f"{found.differing_bits:,}"),
        ("in tokens", f"{found.differing_tokens:,} of {found.tokens:,}"),
    ):
        shown.add_row(name, value)
    return shown


def _prompts(work: Work, tokenizer: Tokenizer) -> list[Prompt]:
    if work.prompts is None:
        config = TaskConfig(held_out=work.count)
        return [make_prompt(problem, config, tokenizer) for problem in make_split(config, work.seed).held_out]
    with work.prompts.open(encoding="utf-8") as lines:
        texts = list(islice((_text(line) for line in lines if line.strip()), work.count))
    if not texts:
        raise ValueError(f"{work.prompts} has no prompts: write one a line")
    return [Prompt(i, text, tuple(tokenizer.encode(text)), "") for i, text in enumerate(texts)]


def _text(line: str) -> str:
    """A line, or its "prompt" where it is JSON that has one."""
    try:
        value = json.loads(line)
    except ValueError:
        return line.rstrip("\n")
    return str(value["prompt"]) if isinstance(value, dict) and "prompt" in value else line.rstrip("\n")
