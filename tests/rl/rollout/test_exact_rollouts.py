"""The engine in exact numerics: its log-probabilities are the trainer's bits, whatever the scheduler does."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lockstep.cluster.checks.mismatch import compare, reported, rescored
from lockstep.cluster.cli import app
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.attention.kv_cache import kinds
from lockstep.model.ops.cpu import kernels
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.output_processor import generate
from lockstep.rl.types import Prompt
from tests.model.exact_rollouts import transformer


def differing_bits(groups: Groups, names: list[str], dtype: str, blocks: int) -> list[tuple[int, int, int]]:
    """Differing bits, preemptions and shared tokens of completions that fight for a few blocks, by model."""
    found = []
    for name in names:
        trainer, model = transformer(groups, name, dtype)
        engine = RolloutEngine(
            model,
            EngineConfig(length=300, sequences=12, budget=50),
            decode=str,
            blocks=[blocks] * len(kinds(model.model)),
        )
        draw = np.random.default_rng(0)
        prompts = [
            Prompt(i, "", tuple(draw.integers(0, 301, n).tolist()), "") for i, n in enumerate((1, 90, 17, 64, 33, 5))
        ]
        sampling = SamplingParams(temperature=0.9, top_p=0.95, max_new_tokens=40)
        rollouts = list(generate(engine, prompts, sampling, samples=3, seed=1))
        again = rescored(trainer.stage, groups, rollouts, 0.9)
        shared = engine.statistics.cached_prompt_tokens
        found.append((compare(reported(rollouts), again).differing_bits, engine.statistics.preemptions, shared))
    return found


@pytest.mark.parametrize(
    ("names", "dtype"), [(["llama", "gpt2"], "float32"), (["gemma", "olmo", "experts"], "bfloat16")], ids=str
)
def test_no_bit_differs(names: list[str], dtype: str, groups: Groups) -> None:
    for bits, preemptions, shared in differing_bits(groups, names, dtype, 14):
        assert bits == 0
        assert preemptions > 0
        assert shared > 100


def test_no_bit_differs_where_there_is_no_compiler(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "usable", lambda *_: False)
    for bits, preemptions, shared in differing_bits(groups, ["gemma"], "float32", 14):
        assert bits == 0
        assert preemptions > 0
        assert shared > 100


def test_no_bit_differs_at_two_tensor_ranks(worlds: RankPool) -> None:
    for rank in worlds.run(Layout(tensor=2), differing_bits, ["experts"], "bfloat16", 40):
        assert [bits for bits, _, _ in rank] == [0]


def test_the_command_says_so(tiny_folder: Path) -> None:
    given = [
        "mismatch",
        str(tiny_folder),
        "--numerics",
        "exact",
        "--count",
        "2",
        "--max-new-tokens",
        "5",
        "--samples",
        "2",
    ]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert "differing bits" in result.output
    assert "exact numerics, bfloat16, tensor=1" in result.output
