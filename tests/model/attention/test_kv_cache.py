"""Attention to keys and values in blocks against attention to them head to tail."""

import pytest
import torch
from torch import Tensor

from lockstep.model.attention.kv_cache import KVCache, PagedAttention, Span, block_bytes
from lockstep.model.attention.paged_kernel import BLOCK
from lockstep.model.attention.spec import AttentionSpec
from lockstep.model.config import ModelConfig
from lockstep.model.ops import fused
from tests.model.exact_rollouts import by_way

HISTORIES = ((0, 40), (37, 1), (600, 1), (1100, 3), (5, 30), (0, 1), (63, 1), (64, 17))
"""Of each sequence the tokens that are cached already, and those of this pass."""


def model(heads: int, kv_heads: int, width: int, window: int | None) -> ModelConfig:
    return ModelConfig(
        layers=2,
        width=8,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        intermediate=8,
        vocabulary=10,
        context=2000,
        window=window,
        full_layers=() if window is None else (0,),
    )


def naive(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """[L, H, E] of the last L positions of a sequence whose keys and values are [S, G, E], in fp64."""
    rows, heads, width = q.shape
    k, v = (x.double().repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("lhe,she->hls", q.double(), k) * (spec.scale or width**-0.5)
    if spec.cap is not None:
        scores = spec.cap * torch.tanh(scores / spec.cap)
    position, column = torch.arange(len(k) - rows, len(k))[:, None], torch.arange(len(k))
    hidden = column > position
    if spec.window is not None:
        hidden |= column <= position - spec.window
    return torch.einsum("hls,she->lhe", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("use_kernel", [True, False], ids=["in place", "gathered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (4, 4, 20), (10, 2, 8), (7, 1, 32)])
@pytest.mark.parametrize(
    ("window", "spec"),
    [(None, AttentionSpec()), (50, AttentionSpec(window=50)), (7, AttentionSpec(scale=0.3, cap=2.0, window=7))],
    ids=["all", "window", "cap"],
)
def test_a_mixed_pass_equals_attention_head_to_tail(
    use_kernel: bool,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    width: int,
    window: int | None,
    spec: AttentionSpec,
) -> None:
    torch.manual_seed(0)
    of = model(heads, kv_heads, width, window)
    layer = 1
    kinds = 1 if window is None else 2
    cache = KVCache(of, kv_heads=kv_heads, blocks=[200] * kinds, dtype=dtype, device=torch.device("cpu"))
    sizes = [a + b for a, b in HISTORIES]
    lent = iter(torch.randperm(200).tolist())
    tables = [[next(lent) for _ in range(-(-size // BLOCK))] for size in sizes]
    keys, values = ([torch.randn(size, kv_heads, width).to(dtype) for size in sizes] for _ in range(2))
    for table, k, v, (start, _) in zip(tables, keys, values, HISTORIES, strict=True):
        positions = torch.arange(start)
        blocks = torch.tensor(table)[positions // BLOCK]
        cache.write(layer, blocks, positions % BLOCK, k[:start], v[:start])
    spans = [Span([table] * kinds, *history) for table, history in zip(tables, HISTORIES, strict=True)]
    counts = [count for _, count in HISTORIES]
    qkv = torch.randn(sum(counts), heads + 2 * kv_heads, width).to(dtype)
    q, own_k, own_v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    found = PagedAttention(cache, spans, use_kernel=use_kernel)(layer, q, own_k, own_v, spec).split(counts)
    for mixed, rows, k, v, k_new, v_new, (start, _) in zip(
        found, q.split(counts), keys, values, own_k.split(counts), own_v.split(counts), HISTORIES, strict=True
    ):
        k, v = torch.cat([k[:start], k_new]), torch.cat([v[:start], v_new])
        expected = naive(rows, k, v, spec)
        torch.testing.assert_close(mixed.double(), expected, atol=3e-6 if dtype == torch.float32 else 0.03, rtol=0)


def test_blocks_of_all_layers_are_copied_and_counted() -> None:
    of = model(4, 2, 8, 20)
    cache = KVCache(of, kv_heads=2, blocks=[3, 5], dtype=torch.float32, device=torch.device("cpu"))
    cache.values[0][1] = 1.0
    cache.values[1][1] = 2.0
    cache.copy(1, 1, 4)
    assert not cache.values[0][2].any()
    assert (cache.values[1][4] == 2).all()
    bytes_of = [sum(x[layer][0].nbytes for x in (cache.keys, cache.values)) for layer in (0, 1)]
    assert block_bytes(of, kv_heads=2, dtype=torch.float32) == bytes_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 576, 20])
@pytest.mark.parametrize("rows", [1, 90])
def test_fused_operations_equal_those_without_a_compiler(dtype: torch.dtype, width: int, rows: int) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(rows, 1, width) * 3).to(dtype), torch.randn(width).to(dtype)
    heads = torch.randn(rows, 7, width).to(dtype)[:, 1:6]
    angles = torch.randn(rows, 1, width)
    table = angles.cos().to(dtype), angles.sin().to(dtype)
    calls = {
        "norm": lambda: fused.rms_norm(x, weight, 1e-5),
        "gate": lambda: fused.swiglu(x),
        "turn": lambda: fused.rotary(heads, table),
    }
    with torch.inference_mode():
        with by_way(compiled=False):
            expected = {name: call() for name, call in calls.items()}
        with by_way(compiled=True):
            found = {name: call() for name, call in calls.items()}
    for name, value in expected.items():
        bound = {torch.float32: 1e-6, torch.bfloat16: 0.008}[dtype]
        torch.testing.assert_close(found[name], value, rtol=bound, atol=bound * 0.5, msg=name)
