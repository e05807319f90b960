"""The worked example's probabilities by the formula, and one traced step against `transformers`."""

from pathlib import Path

import pytest
import torch

from lockstep.cluster.evaluation.studies.catalog.step import StepSettings, measure, tempered, traced
from lockstep.cluster.evaluation.studies.study import Subject
from lockstep.data.tokenizer import Tokenizer
from lockstep.model.transformer import Transformer
from lockstep.rl.rollout.engine import RolloutEngine


def test_the_worked_example_by_its_formula() -> None:
    logits = torch.tensor([2.0, 1.0, 0.1], dtype=torch.float64)
    assert tempered(logits, 2.0).tolist() == pytest.approx([0.502, 0.304, 0.194], abs=5e-4)
    assert tempered(logits, 1.0).tolist() == pytest.approx([0.659, 0.242, 0.099], abs=5e-4)
    assert float(tempered(logits, 1e-3).max()) == 1.0


def test_a_traced_step_is_what_transformers_computes(
    transformer: Transformer, tokenizer: Tokenizer, tiny_folder: Path
) -> None:
    from transformers import LlamaForCausalLM

    tokens = (5, 40, 77, 12)
    shape, logits = traced(transformer, tokens)
    assert shape == (4, 48)
    with torch.no_grad():
        wanted = LlamaForCausalLM.from_pretrained(tiny_folder).eval()(torch.tensor([tokens])).logits[0, -1]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_the_engine_draws_what_the_trace_says(transformer: Transformer, tokenizer: Tokenizer) -> None:
    subject = Subject(RolloutEngine(transformer, decode=tokenizer.decode), tokenizer, None)
    settings = StepSettings(prompt="12 + 34 =", top=3)
    found = [measure(subject, settings, 1.5, seed) for seed in range(12)]
    assert all(each["engine's difference"] < 1e-4 for each in found)
    assert len({each["drawn"]["token"] for each in found}) > 1
    first = found[0]
    assert first["embeddings"] == [len(first["tokens"]), 48]
    assert [row["p"] for row in first["logits"]] == sorted((row["p"] for row in first["logits"]), reverse=True)
    assert first["p of the likeliest"] == first["logits"][0]["p"]
