"""Passes over single tokens as one list of jobs against the modules that train, and the loops below it."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lockstep.cluster.checks.mismatch import compare, reported, rescored
from lockstep.distributed.world.groups import Groups
from lockstep.model.attention.kv_cache import KVCache, PagedAttention, Span
from lockstep.model.attention.paged_kernel import BLOCK
from lockstep.model.config import ModelConfig
from lockstep.model.cpu_decoder import ROWS, CpuDecoder, serves
from lockstep.model.layers.logprobs import local_logits
from lockstep.model.loading import build, transformer_of
from lockstep.model.ops.cpu import kernels, library
from lockstep.model.transformer import Transformer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.output_processor import generate
from lockstep.rl.types import Prompt
from lockstep.rl.weight_sync.shards import shards_of

LLAMA = ModelConfig(layers=3, width=96, heads=6, kv_heads=2, head_dim=32, intermediate=160, vocabulary=301, context=200)
TILED = sorted({False, kernels.tiled(torch.bfloat16, torch.device("cpu"))})
"""Vectors, and where the processor has them its tiles."""


@pytest.fixture(params=TILED, ids=lambda tiled: "tiles" if tiled else "vectors")
def multiplied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what products are computed."""
    monkeypatch.setattr(kernels, "tiled", lambda *_: request.param)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def transformer(groups: Groups, model: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    return transformer_of(build(model, groups, dtype, RandomWeights(model, 0, deviation=0.08))).eval()


@pytest.mark.usefixtures("multiplied")
@DTYPES
@pytest.mark.parametrize("count", [1, 5, 16, 17, 33, ROWS])
@pytest.mark.parametrize(
    "model",
    [
        LLAMA,
        LLAMA.model_copy(update={"tied": False, "biases": ("qkv", "out", "mlp"), "heads": 4, "kv_heads": 4}),
        LLAMA.model_copy(update={"window": 20, "full_layers": (1,), "attention_cap": 3.0}),
    ],
    ids=["grouped", "biases", "windows"],
)
def test_a_pass_equals_that_of_the_modules(groups: Groups, model: ModelConfig, count: int, dtype: torch.dtype) -> None:
    """Over random caches; both are compared with fp64, from which rounding moves them alike."""
    network, precise = transformer(groups, model, dtype), transformer(groups, model, torch.float64)
    assert serves(network)
    torch.manual_seed(0)
    kinds = 1 if model.window is None else 2
    starts = torch.randint(0, 60, (count,))
    tables = [[4 * i + n for n in range(start // BLOCK + 1)] for i, start in enumerate(starts.tolist())]
    spans = [Span([table] * kinds, start, 1) for table, start in zip(tables, starts.tolist(), strict=True)]
    tokens = torch.randint(0, model.vocabulary, (count,))
    caches = [cache_of(model, each, 4 * count) for each in (dtype, dtype, torch.float64)]
    filled(caches, model, tables)
    found = CpuDecoder(network, caches[0])(tokens, starts, PagedAttention(caches[0], spans)).double()
    with torch.inference_mode():
        plain, exact = (
            local_logits(each(tokens, starts, PagedAttention(cache, spans))[:, 0], each.head_weight, 0, 301).double()
            for each, cache in ((network, caches[1]), (precise, caches[2]))
        )
    assert (found - exact).square().mean() < 1.2 * (plain - exact).square().mean() + 1e-9
    assert (found - exact).abs().max() < 2 * (plain - exact).abs().max()
    for layer in range(model.layers):
        torch.testing.assert_close(caches[0].keys[layer], caches[1].keys[layer], atol=0.05, rtol=0.05)


def cache_of(model: ModelConfig, dtype: torch.dtype, blocks: int) -> KVCache:
    kinds = 1 if model.window is None else 2
    return KVCache(model, kv_heads=model.kv_heads, blocks=[blocks] * kinds, dtype=dtype, device=torch.device("cpu"))


def filled(caches: list[KVCache], model: ModelConfig, tables: list[list[int]]) -> None:
    """The same random keys and values in all."""
    places = torch.tensor([block for table in tables for block in table]).repeat_interleave(BLOCK)
    offsets = torch.arange(len(places)) % BLOCK
    for layer in range(model.layers):
        k, v = torch.randn(2, len(places), model.kv_heads, model.head_dim).bfloat16()
        for cache in caches:
            dtype = cache.keys[layer].dtype
            cache.write(layer, places, offsets, k.to(dtype), v.to(dtype))


def test_models_of_other_kinds_are_left_to_the_modules(groups: Groups) -> None:
    others = ({"norm": "layer"}, {"norm_at": "around"}, {"qk_norm": "head"}, {"logit_cap": 9.0}, {"width": 48})
    for change in others:
        assert not serves(transformer(groups, LLAMA.model_copy(update=change))), change
    assert not serves(transformer(groups, LLAMA, torch.float64))


@DTYPES
@pytest.mark.parametrize("tiled", TILED)
@given(st.integers(1, 70), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 1 << 30))
def test_a_product(
    dtype: torch.dtype, tiled: bool, rows: int, lines: int, outs: int, has_bias: bool, adds: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs, outputs = 32 * lines, 32 * outs - seed % 32
    weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(rows, inputs).to(dtype)
    packed = kernels.in_tiles(weight)
    width = packed.shape[0] * kernels.SIDE
    bias, add = torch.randn(width).to(dtype), torch.randn(rows, width).to(dtype)
    out = torch.empty(rows, width, dtype=dtype)
    job = kernels.product_job(x, packed, out, bias if has_bias else None, add if adds else None)
    job.tiled = tiled and dtype == torch.bfloat16
    library.run("product", job, dtype, size=1 << 20)
    expected = x.double() @ weight.double().T
    for used, more in ((has_bias, bias), (adds, add)):
        if used:
            expected = expected.to(dtype).double() + more.double()[..., :outputs]
    rtol, atol = (0.01, 0.07) if dtype == torch.bfloat16 else (1e-5, 1e-4)
    torch.testing.assert_close(out[:, :outputs].double(), expected, rtol=rtol, atol=atol)


@DTYPES
@pytest.mark.parametrize("size", [1, 255, 4099])
def test_log_sums(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(7, size + 3) * 8).to(dtype)[:, :size]
    logits[1, size // 2 :] = float("-inf")
    logits[2] = float("-inf")
    for temperature in (1.0, 0.3):
        found = kernels.log_sums(logits, temperature)
        expected: Tensor = (logits.double() / temperature).logsumexp(1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("multiplied")
@pytest.mark.parametrize("prompts", [1, 9])
def test_an_engine_decodes_with_it_and_with_new_weights(groups: Groups, prompts: int) -> None:
    """Its log-probabilities are the trainer's up to rounding, before and after an update of the weights."""
    weights = RandomWeights(LLAMA, 0, deviation=0.08)
    policy, worker = (build(LLAMA, groups, torch.bfloat16, weights) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.mul_(1.3)
    engine = RolloutEngine(transformer_of(worker), EngineConfig(length=100), decode=lambda tokens: "")
    asked = [Prompt(i, "", tuple(range(3, 9 + 2 * i)), "") for i in range(prompts)]
    for stage, other in ((worker, policy), (policy, worker)):
        if stage is policy:
            other = build(LLAMA, groups, torch.bfloat16, weights)
            engine.receive(1, shards_of(transformer_of(policy)))
        rollouts = list(generate(engine, asked, SamplingParams(max_new_tokens=30), samples=2, seed=0))
        same, different = (compare(reported(rollouts), rescored(s, groups, rollouts, 1.0)) for s in (stage, other))
        assert same.tokens > 50 * prompts
        assert same.mean < 0.02
        assert different.mean > 0.1
        assert isinstance(engine.runner.decoder, CpuDecoder)


@pytest.mark.usefixtures("multiplied")
@DTYPES
@pytest.mark.parametrize("change", [{}, {"tied": False, "biases": ("qkv", "out", "mlp")}, {"window": 20}], ids=str)
def test_in_exact_numerics_its_bits_are_the_trainers(
    groups: Groups, change: dict[str, Any], dtype: torch.dtype
) -> None:
    model = LLAMA.model_copy(update=change)
    stage = build(model, groups, dtype, RandomWeights(model, 0, deviation=0.08), "exact")
    engine = RolloutEngine(transformer_of(stage), EngineConfig(length=150), decode=lambda tokens: "")
    asked = [Prompt(i, "", tuple(range(3, 9 + 30 * i)), "") for i in range(4)]
    torch.set_num_threads(2)
    rollouts = list(generate(engine, asked, SamplingParams(temperature=0.8, max_new_tokens=30), samples=3, seed=0))
    torch.set_num_threads(1)
    assert isinstance(engine.runner.decoder, CpuDecoder)
    found = compare(reported(rollouts), rescored(stage, groups, rollouts, 0.8))
    assert found.tokens == 360
    assert found.differing_bits == 0
