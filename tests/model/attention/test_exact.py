"""Attention in tiles: right, and the same bits for a row whatever stands beside it, in front of it or behind it."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lockstep.model.attention.exact import KEYS, attend_exactly
from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.attention.spec import PLAIN, AttentionSpec
from tests.model.attention.test_packed import CPU, Documents, dense, inputs, some_documents, some_specs
from tests.model.exact_rollouts import WAYS, by_way

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def sequence(length: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values of one sequence."""
    draw = torch.Generator().manual_seed(length)
    return [torch.randn(length, h, width, generator=draw).to(dtype) for h in (heads, kv_heads, kv_heads)]


def by_head(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def attended(qkv: list[Tensor], spec: AttentionSpec) -> Tensor:
    q, k, v = qkv
    return attend_exactly(q[None], *by_head(k[None], v[None]), torch.zeros(1, dtype=torch.long), spec)[0]


@WAYS
@DTYPES
@settings(max_examples=25)
@given(
    length=st.one_of(st.integers(1, 300), st.integers(500, 1100)),
    shape=st.sampled_from([(9, 3, 64), (2, 2, 12), (6, 1, 80), (3, 3, 128), (4, 2, 256)]),
    spec=some_specs,
    data=st.data(),
)
def test_rows_have_the_same_bits_alone_in_chunks_and_in_batches(
    compiled: bool,
    dtype: torch.dtype,
    length: int,
    shape: tuple[int, int, int],
    spec: AttentionSpec,
    data: st.DataObject,
) -> None:
    q, k, v = sequence(length, *shape, dtype)
    with by_way(compiled):
        whole = attended([q, k, v], spec)
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    beside, padding = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 130))
    first = torch.full((beside + 1,), start)
    batch = [
        torch.full((beside + 1, n, *x.shape[1:]), 3.0).to(dtype)
        for n, x in zip((stop - start + 2, stop + padding, stop + padding), (q, k, v), strict=True)
    ]
    batch[0][-1, : stop - start], batch[1][-1, :stop], batch[2][-1, :stop] = q[start:stop], k[:stop], v[:stop]
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    with by_way(compiled):
        found = attend_exactly(batch[0], *by_head(*batch[1:]), first, spec)[-1, : stop - start]
    torch.set_num_threads(1)
    assert torch.equal(found, whole[start:stop])


@WAYS
@pytest.mark.parametrize("window", [1, 64, 65, 100])
def test_keys_before_a_window_may_be_left_out(compiled: bool, window: int) -> None:
    q, k, v = sequence(500, 6, 2, 16, torch.float32)
    positions = [150, 299]
    begin = torch.tensor([max(0, p - window + 1) // KEYS * KEYS for p in positions])
    parts = [torch.stack([x[b : b + 192] for b in begin]) for x in (k, v)]
    with by_way(compiled):
        whole = attended([q, k, v], AttentionSpec(window=window))
        found = attend_exactly(
            q[positions][:, None], *by_head(*parts), torch.tensor(positions), AttentionSpec(window=window), begin
        )
    assert torch.equal(found[:, 0], whole[positions])


@WAYS
@DTYPES
@settings(max_examples=30)
@given(documents=some_documents, spec=some_specs)
@example(documents=[[17, 16, 15, 17], [16, 1, 33], [100]], spec=PLAIN)
@example(documents=[[40, 130, 2], [70]], spec=AttentionSpec(window=33, cap=1.5))
def test_documents_equal_a_dense_mask_and_have_the_fast_gradient(
    compiled: bool, dtype: torch.dtype, documents: Documents, spec: AttentionSpec
) -> None:
    given_inputs = inputs(documents, dtype)
    with by_way(compiled):
        ours = DocumentAttention(documents, CPU, "exact")(0, *given_inputs, spec)
    fast = DocumentAttention(documents, CPU)(0, *given_inputs, spec)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    naive = dense(documents, *(x.detach().double() for x in given_inputs), spec)
    assert ours.dtype == dtype
    assert torch.allclose(ours.double(), naive, rtol=tolerance, atol=tolerance)
    slope = torch.randn(naive.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, expected = (torch.autograd.grad(mixed, given_inputs, slope) for mixed in (ours, fast))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
