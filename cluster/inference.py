"""One checkpoint in this process: its rollout engine, and its answers to a task's held-out problems."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lockstep.cluster.config import load_recipe, parse
from lockstep.cluster.convert import to_lockstep
from lockstep.cluster.curves import wilson
from lockstep.cluster.sources import open_source
from lockstep.data.problems import TaskConfig, make_split
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.groups import leave
from lockstep.rl.controller import make_prompt
from lockstep.rl.rollout.engine import RolloutEngine, load_rollout_engine
from lockstep.rl.rollout.sampling import SamplingConfig
from lockstep.rl.verifiers.pool import VerifierPool
from lockstep.rl.verifiers.verdict import Outcome


@contextmanager
def open_engine(
    name: str, dtype: str, *, sequences: int, length: int = 1 << 20, cache_gib: float = 1.0
) -> Iterator[tuple[RolloutEngine, Tokenizer]]:
    """A rollout engine over a checkpoint of any format; other formats pass through a temporary checkpoint of ours.

    Raises:
        ValueError: one sentence on what cannot be opened.
    """
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"--dtype {dtype!r} is not supported: use bfloat16 or float32")
    try:
        with tempfile.TemporaryDirectory() as folder:
            source, _, _ = open_source(name)
            path = source.path if isinstance(source, manager.Checkpoint) else to_lockstep(name, Path(folder))
            opened = load_rollout_engine(path, dtype=dtype, sequences=sequences, length=length, cache_gib=cache_gib)
        yield opened
    finally:
        leave()


def evaluate(
    name: str, task: str, overrides: Sequence[str], *, max_new_tokens: int, dtype: str, output: Path | None
) -> str:
    """Greedy exact match on the held-out problems of a task, as a sentence."""
    config, seed = _task(task, overrides)
    split = make_split(config, seed)
    with open_engine(name, dtype, sequences=32, length=4096) as (engine, tokenizer):
        prompts = [make_prompt(p, config, tokenizer) for p in split.held_out]
        sampling = SamplingConfig(temperature=0, max_new_tokens=max_new_tokens)
        rollouts = list(engine.generate(prompts, sampling, samples=1, seed=0))
    with VerifierPool(1, 5.0) as pool:
        verdicts = pool.grade([(r.text, r.prompt.answer) for r in rollouts])
    if output is not None:
        rows = [
            {
                "prompt": r.prompt.text,
                "answer": r.prompt.answer,
                "completion": r.text,
                "outcome": v.outcome,
                "reason": v.reason,
            }
            for r, v in zip(rollouts, verdicts, strict=True)
        ]
        output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    correct = sum(v.outcome is Outcome.correct for v in verdicts)
    low, high = wilson(correct, len(verdicts))
    return f"{correct} of {len(verdicts)} correct: {correct / len(verdicts):.1%} (95% interval {low:.1%} to {high:.1%})"


def _task(task: str, overrides: Sequence[str]) -> tuple[TaskConfig, int]:
    values = {"task": {"generator": task}}
    recipe = load_recipe(Path(task), overrides) if task.endswith(".toml") else parse(values, overrides)
    return recipe.task, recipe.seed
