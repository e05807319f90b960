"""Attention over trees of documents against one dense mask."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lockstep.model.attention import packed
from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.attention.spec import PLAIN, AttentionSpec

CPU = torch.device("cpu")
HEADS, KV_HEADS, WIDTH = 6, 2, 4

Documents = list[list[int]]

# Short documents with branches of no tokens, and long ones that fall into several buckets.
some_documents = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 5), st.lists(st.integers(0, 6), max_size=4)),
        st.tuples(st.integers(1, 70), st.lists(st.integers(0, 40), max_size=3)),
    ).map(lambda d: [d[0], *d[1]]),
    min_size=1,
    max_size=4,
)


some_specs = st.builds(
    AttentionSpec,
    scale=st.none() | st.just(0.7),
    cap=st.none() | st.just(1.5),
    window=st.none() | st.integers(1, 90),
)


def positions(documents: Documents) -> Tensor:
    """[T]: a branch goes on where its prompt ends."""
    spans = [span for p, *branches in documents for span in [(0, p), *((p, p + b) for b in branches)]]
    return torch.cat([torch.arange(*span) for span in spans])


def visible(documents: Documents, window: int | None = None) -> Tensor:
    """[T, T]: whether the row's token sees the column's."""
    total = sum(map(sum, documents))
    mask = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for prompt, *branches in documents:
        first = start
        for i in range(prompt):
            mask[first + i, first : first + i + 1] = True
        start += prompt
        for branch in branches:
            for i in range(branch):
                mask[start + i, first : first + prompt] = True
                mask[start + i, start : start + i + 1] = True
            start += branch
    if window is not None:
        place = positions(documents)
        mask &= place[:, None] - place[None] < window
    return mask


def dense(documents: Documents, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k_TGE, v_TGE))
    scores = torch.einsum("the,she->hts", q_THE, k) * (spec.scale or WIDTH**-0.5)
    if spec.cap:
        scores = spec.cap * torch.tanh(scores / spec.cap)
    scores = scores.masked_fill(~visible(documents, spec.window), float("-inf"))
    return torch.einsum("hts,she->the", scores.softmax(-1), v)


def inputs(documents: Documents, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = sum(map(sum, documents))
    shapes = [(total, HEADS, WIDTH), (total, KV_HEADS, WIDTH), (total, KV_HEADS, WIDTH)]
    return [(2 * torch.randn(s, generator=generator)).to(dtype).requires_grad_() for s in shapes]


def check(documents: Documents, dtype: torch.dtype, tolerance: float, spec: AttentionSpec = PLAIN) -> None:
    """Equal values and gradients; the dense version computes in fp64."""
    given_inputs = inputs(documents, dtype)
    wide = [x.detach().double().requires_grad_() for x in given_inputs]
    ours = DocumentAttention(documents, CPU)(0, *given_inputs, spec)
    naive = dense(documents, *wide, spec)
    assert ours.dtype == dtype
    assert torch.allclose(ours.double(), naive, rtol=tolerance, atol=tolerance)
    slope = torch.randn(naive.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(ours, given_inputs, slope)
    expected = torch.autograd.grad(naive, wide, slope.double())
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.double(), b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


@settings(deadline=None, max_examples=40)
@given(some_documents)
@example([[1]])
@example([[1, 0]])
@example([[1, 0, 0, 0]])
@example([[1, 3, 0, 5], [2], [1, 1, 1]])
@example([[17, 16, 15, 17], [16, 1, 33], [100]])
def test_trees_equal_a_dense_mask(documents: Documents) -> None:
    check(documents, torch.float32, 2e-5)


@settings(deadline=None, max_examples=40)
@given(some_documents, some_specs)
@example([[5, 9, 0, 3], [1]], AttentionSpec(window=1))
@example([[40, 30, 2], [70]], AttentionSpec(window=33, cap=1.5))
def test_scales_caps_and_windows_equal_a_dense_mask(documents: Documents, spec: AttentionSpec) -> None:
    check(documents, torch.float32, 2e-5, spec)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "ROWS_AT_ONCE", 16)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some_documents, some_specs)
@example([[40, 30, 2], [70]], AttentionSpec(window=33, cap=1.5))
@example([[16, 16, 17], [32], [48, 5]], AttentionSpec(window=1))
def test_blocks_of_rows_equal_a_dense_mask(small_blocks: None, documents: Documents, spec: AttentionSpec) -> None:
    check(documents, torch.float32, 2e-5, spec)


def test_bfloat16_is_as_exact_as_the_flash_kernel(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[100, 20, 40], [150], [64]]
    given_inputs = inputs(documents, torch.bfloat16)
    slope = torch.randn(given_inputs[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()

    def results(attend: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
        mixed = attend(*tensors)
        return [mixed, *torch.autograd.grad(mixed, tensors, slope.to(mixed.dtype))]

    def errors() -> list[float]:
        found = results(partial(DocumentAttention(documents, CPU), 0), *given_inputs)
        return [(a.double() - b).norm().item() for a, b in zip(found, exact, strict=True)]

    exact = results(partial(dense, documents), *(x.detach().double().requires_grad_() for x in given_inputs))
    ours = errors()
    monkeypatch.setattr(packed, "LONGEST_IN_FULL", 0)
    (value, *gradients), (flash_value, *flash_gradients) = ours, errors()
    assert value < 1.5 * flash_value
    assert all(a < b for a, b in zip(gradients, flash_gradients, strict=True))


@pytest.fixture
def only_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LONGEST_IN_FULL", 0)


@pytest.mark.parametrize(
    "documents",
    [[[1]], [[1, 0, 2]], [[9], [33], [20, 5]], [[5, 3, 0, 7], [6, 2, 8], [1, 1, 1], [40]], [[70, 20, 35], [64, 18]]],
    ids=str,
)
def test_the_flash_kernel_equals_a_dense_mask(documents: Documents, only_flash: None) -> None:
    check(documents, torch.float32, 2e-5)


@pytest.mark.parametrize("window", [1, 6, 40])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_long_documents_have_scales_caps_and_windows_too(window: int, cap: float | None, only_flash: None) -> None:
    check([[9], [33], [20, 5, 30]], torch.float32, 2e-5, AttentionSpec(scale=0.7, cap=cap, window=window))


def test_one_attention_serves_layers_of_several_kinds() -> None:
    documents, tensors = [[30, 4, 5]], inputs([[30, 4, 5]], torch.float32)
    attend = DocumentAttention(documents, CPU)
    for spec in (PLAIN, AttentionSpec(window=4), PLAIN, AttentionSpec(window=9), AttentionSpec(window=4, cap=2.0)):
        assert torch.allclose(attend(0, *tensors, spec), dense(documents, *tensors, spec), atol=2e-5)


@pytest.mark.parametrize("documents", [[[9], [33]], [[5, 3, 0, 7], [6, 2, 8], [40]]], ids=str)
def test_bfloat16(documents: Documents) -> None:
    check(documents, torch.bfloat16, 3e-2)


@settings(deadline=None, max_examples=20)
@given(some_documents, st.data())
def test_no_token_sees_what_it_may_not(documents: Documents, data: st.DataObject) -> None:
    q, k, v = (t.detach() for t in inputs(documents, torch.float32))
    changed = data.draw(st.integers(0, len(q) - 1))
    before = DocumentAttention(documents, CPU)(0, q, k, v)
    k[changed], v[changed] = 3, -7
    after = DocumentAttention(documents, CPU)(0, q, k, v)
    differs = (before != after).flatten(1).any(1)
    assert differs.tolist() == visible(documents)[:, changed].tolist()


def test_masks_are_made_where_no_kernel_does_without() -> None:
    """A mask of 8,192 by 8,192 tokens in fp32 is 268 MB, and a causal kernel needs none."""
    tokens = packed.LONGEST_IN_FULL + 6
    q, k, v = (torch.randn(tokens, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    for documents, masks in [([[tokens]], 0), ([[tokens - 3, 2, 1]], 1)]:
        attention = DocumentAttention(documents, CPU)
        assert not any(batch._biases for batch in attention._batches)
        for layer in range(2):
            attention(layer, q, k, v)
        assert sum(len(batch._biases) for batch in attention._batches if batch.queries > packed.LONGEST_IN_FULL) == 0
        assert sum(len(batch._biases) for batch in attention._batches) == masks
