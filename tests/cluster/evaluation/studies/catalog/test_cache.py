"""Operations with and without a KV cache, against those that torch counts, and their exponents."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lockstep.cluster.evaluation.studies.catalog.cache import CacheSettings, check, operations
from lockstep.cluster.evaluation.studies.intervals import exponent
from lockstep.model.config import ModelConfig
from lockstep.model.transformer import Transformer


def test_operations_are_those_that_torch_counts(transformer: Transformer, tiny_folder: Path) -> None:
    from transformers import LlamaForCausalLM

    length, model = 50, transformer.model
    reference = LlamaForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        reference(torch.arange(3, 3 + length)[None], logits_to_keep=1)
    found = operations(model, length)
    # Eager attention computes all pairs, and masks those that a causal model has no use for.
    pairs = 4 * model.heads * model.head_dim * model.layers * length**2
    wanted = counter.get_total_flops() - pairs + found["attention, uncached"]
    assert found["operations, uncached"] == pytest.approx(wanted, rel=0.01)  # norms' weights count as products


def test_attention_is_linear_with_a_cache_and_quadratic_without(transformer: Transformer) -> None:
    contexts = [256.0, 1024.0, 4096.0]
    found = [operations(transformer.model, int(context)) for context in contexts]
    assert exponent(contexts, [each["attention, cached"] for each in found]) == pytest.approx(1)
    assert exponent(contexts, [each["attention, uncached"] for each in found]) == pytest.approx(2, abs=0.01)


def test_a_window_bounds_what_a_token_attends_to() -> None:
    sizes = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "intermediate": 16}
    whole, narrow = (ModelConfig(**sizes, vocabulary=8, context=99, window=window) for window in (None, 10))
    assert operations(narrow, 50)["attention, cached"] == operations(whole, 10)["attention, cached"]


def test_contexts_beyond_the_models_are_refused(transformer: Transformer) -> None:
    with pytest.raises(ValueError, match="needs 309 positions, and the model has 256"):
        check(transformer.model, CacheSettings(context=(300,)))
