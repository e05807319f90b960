"""Attention over trees of documents against one dense mask."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lockstep.model import attention
from lockstep.model.attention import DocumentAttention

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


def visible(documents: Documents) -> Tensor:
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
    return mask


def dense(documents: Documents, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k_TGE, v_TGE))
    scores = torch.einsum("the,she->hts", q_THE, k) / WIDTH**0.5
    scores = scores.masked_fill(~visible(documents), float("-inf"))
    return torch.einsum("hts,she->the", scores.softmax(-1), v)


def inputs(documents: Documents, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = sum(map(sum, documents))
    shapes = [(total, HEADS, WIDTH), (total, KV_HEADS, WIDTH), (total, KV_HEADS, WIDTH)]
    return [(2 * torch.randn(s, generator=generator)).to(dtype).requires_grad_() for s in shapes]


def check(documents: Documents, dtype: torch.dtype, tolerance: float) -> None:
    """Equal values and gradients; the dense version computes in fp64."""
    given_inputs = inputs(documents, dtype)
    wide = [x.detach().double().requires_grad_() for x in given_inputs]
    ours = DocumentAttention(documents, CPU)(0, *given_inputs)
    naive = dense(documents, *wide)
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


@pytest.fixture
def only_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONGEST_IN_FULL", 0)


@pytest.mark.parametrize(
    "documents",
    [[[1]], [[1, 0, 2]], [[9], [33], [20, 5]], [[5, 3, 0, 7], [6, 2, 8], [1, 1, 1], [40]], [[70, 20, 35], [64, 18]]],
    ids=str,
)
def test_the_flash_kernel_equals_a_dense_mask(documents: Documents, only_flash: None) -> None:
    check(documents, torch.float32, 2e-5)


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
