"""The CPU kernel of attention over packed documents against one dense mask, in fp64."""

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lockstep.model.attention import packed
from lockstep.model.attention.flash_kernel import serves
from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.attention.spec import PLAIN, AttentionSpec
from lockstep.model.ops.cpu import kernels, library
from tests.model.attention.test_packed import Documents, some_documents, visible

CPU = torch.device("cpu")
SHAPES = [(4, 2, 16), (3, 1, 48), (2, 2, 64)]
"""Query heads, key-value heads, head dim."""
ODD: list[Documents] = [[[1]], [[15]], [[16], [17]], [[130]], [[1, 0, 0]], [[33, 0, 1, 64], [1, 31]], [[5, 9], [1]]]
LONG: list[Documents] = [[[600, 30, 0, 200], [33]], [[530], [40, 16, 60, 31]]]


def inputs(documents: Documents, shape: tuple[int, int, int], dtype: torch.dtype, size: float = 1.5) -> list[Tensor]:
    """Queries, keys, values and the gradient of what comes out."""
    heads, kv_heads, width = shape
    generator, total = torch.Generator().manual_seed(0), sum(map(sum, documents))
    drawn = [torch.randn(total, h, width, generator=generator) for h in (heads, kv_heads, kv_heads, heads)]
    return [(size * x).to(dtype).requires_grad_() for x in drawn]


def results(documents: Documents, tensors: list[Tensor], spec: AttentionSpec = PLAIN) -> list[Tensor]:
    """Attention, and the gradients of queries, keys and values."""
    mixed = DocumentAttention(documents, CPU)(0, *tensors[:3], spec)
    return [mixed.detach(), *torch.autograd.grad(mixed, tensors[:3], tensors[3])]


def naive(documents: Documents, tensors: list[Tensor], spec: AttentionSpec = PLAIN) -> list[Tensor]:
    q, k, v, slope = (x.detach().double().requires_grad_() for x in tensors)
    every = q.shape[1] // k.shape[1]
    scores = torch.einsum("the,she->hts", q, k.repeat_interleave(every, 1)) * (spec.scale or q.shape[2] ** -0.5)
    weights = scores.masked_fill(~visible(documents, spec.window), float("-inf")).softmax(-1)
    mixed = torch.einsum("hts,she->the", weights, v.repeat_interleave(every, 1))
    return [mixed.detach(), *torch.autograd.grad(mixed, (q, k, v), slope)]


def check(documents: Documents, tensors: list[Tensor], spec: AttentionSpec, tolerance: float = 2e-5) -> None:
    assert serves(tensors[0], spec)
    for found, wanted in zip(results(documents, tensors, spec), naive(documents, tensors, spec), strict=True):
        slack = tolerance * max(1.0, wanted.abs().max().item())
        assert torch.allclose(found.double(), wanted, rtol=tolerance, atol=slack)


@settings(deadline=None, max_examples=25)
@given(
    some_documents,
    st.builds(AttentionSpec, scale=st.none() | st.just(0.7), window=st.none() | st.integers(1, 90)),
    st.sampled_from(SHAPES),
)
@example([[16, 16, 17], [32], [48, 5]], AttentionSpec(window=1), SHAPES[0])
@example([[40, 30, 2], [70]], AttentionSpec(window=33), SHAPES[1])
def test_trees_equal_a_dense_mask(documents: Documents, spec: AttentionSpec, shape: tuple[int, int, int]) -> None:
    check(documents, inputs(documents, shape, torch.float32), spec)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("documents", [*ODD, *LONG], ids=str)
def test_lengths_that_do_not_fill_blocks_equal_a_dense_mask(documents: Documents, window: int | None) -> None:
    check(documents, inputs(documents, SHAPES[0], torch.float32), AttentionSpec(window=window))


@pytest.mark.parametrize("shape", [(9, 3, 64), (2, 1, 80), (1, 1, 256)], ids=str)
@pytest.mark.parametrize("documents", [[[17]], [[130], [40, 30, 2]], [[40, 16, 60, 31, 1]]], ids=str)
def test_bfloat16_is_more_exact_than_padded_batches(documents: Documents, shape: tuple[int, int, int]) -> None:
    tensors = inputs(documents, shape, torch.bfloat16)
    wanted = naive(documents, tensors)

    def errors() -> list[float]:
        return [(a.double() - b).norm().item() for a, b in zip(results(documents, tensors), wanted, strict=True)]

    ours = errors()
    with patch.object(packed, "serves", return_value=False):
        theirs = errors()
    assert all(a <= 1.02 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
    assert sum(ours[:3]) < 0.95 * sum(theirs[:3])


@pytest.fixture
def plain_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As for a processor that has neither wide vectors nor tiles."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "FLAGS", ("-std=gnu11", "-shared", "-fPIC"))
    library.library_of.cache_clear()
    kernels.tiled.cache_clear()
    yield
    library.library_of.cache_clear()
    kernels.tiled.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_processors_without_wide_vectors_compute_the_same(dtype: torch.dtype, plain_compiler: None) -> None:
    documents: Documents = [[40, 30, 2], [70]]
    loose = 2e-5 if dtype == torch.float32 else 3e-2
    check(documents, inputs(documents, SHAPES[1], dtype), AttentionSpec(window=65), loose)


def test_processors_without_tiles_compute_the_same() -> None:
    documents: Documents = [[40, 30, 2], [70]]
    with patch.object(kernels, "tiled", return_value=False):
        check(documents, inputs(documents, SHAPES[1], torch.bfloat16), AttentionSpec(window=65), 3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_threads_nor_other_documents_change_bits(dtype: torch.dtype) -> None:
    documents: Documents = [[600, 30, 0, 60], [33], [530]]
    tensors, before = inputs(documents, SHAPES[0], dtype), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(documents, tensors))
    finally:
        torch.set_num_threads(before)
    alone = results([[33]], [x[690:723].detach().requires_grad_() for x in tensors])
    for first, second, third, own in zip(*found, alone, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        assert torch.equal(first[690:723], own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    """Scores in the thousands, whose maxima grow from block to block."""
    documents: Documents = [[300, 1, 20], [1]]
    tensors = inputs(documents, SHAPES[2], dtype)
    growing = torch.linspace(1, 200, 322)[:, None, None].to(dtype)
    tensors[1] = (tensors[1].detach() * growing).requires_grad_()
    check(documents, tensors, PLAIN, 1e-3 if dtype == torch.float32 else 6e-2)


def test_heads_within_rows_that_hold_more_are_read_in_place() -> None:
    documents: Documents = [[40, 30, 2]]
    q, k, v, slope = inputs(documents, (4, 2, 16), torch.float32)
    together = torch.cat([q, k, v], 1).detach().requires_grad_()
    apart = results(documents, [q, k, v, slope])
    mixed = DocumentAttention(documents, CPU)(0, *together.split([4, 2, 2], dim=1))
    assert torch.equal(mixed, apart[0])
    assert torch.equal(torch.autograd.grad(mixed, together, slope)[0], torch.cat(apart[1:], 1))


def test_what_is_no_number_is_seen_where_it_is_looked_at() -> None:
    documents: Documents = [[40, 30, 2], [70]]
    q, k, v, _ = (x.detach() for x in inputs(documents, SHAPES[0], torch.float32))
    for changed in (q, k, v):
        kept, changed[50] = changed[50].clone(), float("nan")
        mixed = DocumentAttention(documents, CPU)(0, q, k, v)
        changed[50] = kept
        assert mixed[50].isnan().all()
        assert not mixed[72:].isnan().any()


@pytest.mark.parametrize("width", [4, 24, 272])
def test_other_heads_and_soft_caps_go_another_way(width: int) -> None:
    assert not serves(torch.zeros(1, 1, width), PLAIN)
    assert not serves(torch.zeros(1, 1, 16), AttentionSpec(cap=1.5))
    assert serves(torch.zeros(1, 1, 16), PLAIN)
