"""The mismatch of rollouts and training: its numbers, and the pairing of a rollout's tokens with the trainer's."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.cluster.checks.mismatch import compare, reported, rescored
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.world.groups import Groups
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder, read_text_files
from lockstep.model.loading import build, transformer_of
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.output_processor import generate
from lockstep.rl.types import Prompt


def test_its_numbers_are_those_of_their_formulas() -> None:
    draw = np.random.default_rng(0)
    old = -draw.exponential(size=2000).astype(np.float32)
    new = old.copy()
    new[:3] += np.float32([0.5, -1.0, 0.25])
    found = compare(old, new)
    delta = new.astype(np.float64) - old
    assert (found.tokens, found.differing_tokens) == (2000, 3)
    assert found.largest == pytest.approx(np.abs(delta).max())
    assert found.mean == pytest.approx(np.abs(delta).mean())
    assert found.percentile_99_9 == pytest.approx(np.quantile(np.abs(delta), 0.999))
    assert found.kl == pytest.approx((np.exp(delta) - 1 - delta).mean())
    assert found.differing_bits == sum(
        bin(int(a) ^ int(b)).count("1") for a, b in zip(old.view(np.uint32), new.view(np.uint32), strict=True)
    )
    assert compare(old, old).differing_bits == compare(old, old).largest == 0


@pytest.mark.parametrize("bad", [[], [float("nan")], [float("-inf")]])
def test_nothing_and_no_numbers_are_refused(bad: list[float]) -> None:
    numbers = np.asarray(bad, np.float32)
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(numbers, numbers)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_token_is_scored_again_at_its_place(temperature: float, tiny_folder: Path, groups: Groups) -> None:
    source = HuggingFaceFolder(tiny_folder)
    stage = build(source.config, groups, torch.float32, source)
    engine = RolloutEngine(transformer_of(stage), decode=Tokenizer(read_text_files(tiny_folder)).decode)
    prompts = [Prompt(i, "", tuple(range(3, 4 + 5 * i)), "") for i in range(4)]
    sampling = SamplingParams(temperature=temperature, max_new_tokens=12)
    rollouts = list(generate(engine, prompts, sampling, samples=3, seed=1))
    found = compare(reported(rollouts), rescored(stage, groups, rollouts, temperature))
    assert found.tokens == sum(len(r.tokens) for r in rollouts)
    assert found.largest <= 1e-4
    assert compare(reported(rollouts), rescored(stage, groups, rollouts[::-1], temperature)).largest > 0.1
