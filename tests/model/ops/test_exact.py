"""Exact numerics: a rollout's log-probabilities are the trainer's bits, however tokens are put together."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lockstep.distributed.layout import Layout, LayoutError
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import check_numerics
from lockstep.model.ops.cpu import kernels
from lockstep.model.ops.exact import reductions
from lockstep.model.ops.exact.matmul import LARGER, TILE, delicate, product, tile_sizes
from lockstep.model.ops.linear import packed
from tests.model.exact_rollouts import MODELS, WAYS, by_way, differing, learned, rolled, samples_of, transformer

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def compared(groups: Groups, name: str, dtype: str, seeds: int, longest: int) -> tuple[int, int, float]:
    """Differing bits of ways to train from ways to roll out, the number of tokens, and their mean."""
    trainer, model = transformer(groups, name, dtype)
    bits, tokens, mean = 0, 0, 0.0
    for seed in range(seeds):
        draw = np.random.default_rng(seed)
        samples = samples_of(draw, prompts=int(draw.integers(1, 5)), longest=longest if seed % 2 else 8)
        budget, recompute = int(draw.choice([32, 200, 2000])), ("none", "selective", "full")[seed % 3]
        expected = learned(groups, trainer, samples, 150, "none", grad=False)
        found = [learned(groups, trainer, samples, budget, recompute, grad=True), rolled(model, samples, draw)]
        model.pack()
        found.append(rolled(model, samples, draw))
        bits += sum(differing(each, expected) for each in found)
        tokens, mean = tokens + len(expected), float(expected.mean())
    return bits, tokens, mean


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_rollouts_and_training_have_the_same_bits(name: str, dtype: str, groups: Groups) -> None:
    bits, tokens, mean = compared(groups, name, dtype, 2, 100)
    assert tokens > 150
    assert -30 < mean < -0.1
    assert bits == 0


def all_compared(groups: Groups, dtype: str) -> list[tuple[int, int, float]]:
    return [compared(groups, name, dtype, 1, 8) for name in MODELS]


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.exhaustive), "bfloat16"])
def test_so_they_have_at_two_tensor_ranks(dtype: str, worlds: RankPool) -> None:
    for rank in worlds.run(Layout(tensor=2), all_compared, dtype):
        for bits, tokens, _ in rank:
            assert tokens > 5
            assert bits == 0


def trained(groups: Groups, names: list[str], dtype: str) -> dict[str, np.ndarray]:
    """Log-probabilities of the tokens that this data rank learns from, by model."""
    found = {}
    for name in names:
        trainer, _ = transformer(groups, name, dtype)
        samples = samples_of(np.random.default_rng(1), prompts=3, longest=40)
        found[name] = learned(groups, trainer, samples, 64, "none", grad=True)
    return found


@pytest.mark.parametrize(
    ("layout", "like", "names"),
    [
        (Layout(tensor=2, sequence=True), Layout(tensor=2), list(MODELS)),
        pytest.param(Layout(context=2), Layout(), ["llama", "gemma"], marks=pytest.mark.exhaustive),
        pytest.param(Layout(pipeline=2), Layout(), ["llama"], marks=pytest.mark.exhaustive),
        (Layout(expert=2), Layout(), ["experts"]),
    ],
    ids=str,
)
def test_layouts_of_one_tensor_degree_have_the_same_bits(
    layout: Layout, like: Layout, names: list[str], worlds: RankPool, groups: Groups
) -> None:
    alone = like.processes == 1
    expected = trained(groups, names, "bfloat16") if alone else worlds.run(like, trained, names, "bfloat16")[0]
    for found in worlds.run(layout, trained, names, "bfloat16"):
        for name in found:
            learned_here = ~np.isnan(found[name])
            assert not np.isnan(expected[name]).any()
            assert differing(found[name][learned_here], expected[name][learned_here]) == 0


@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("gpt2", "float32"), ("experts", "bfloat16")])
def test_fast_numerics_have_other_bits(name: str, dtype: str, groups: Groups) -> None:
    trainer, model = transformer(groups, name, dtype, "fast")
    samples = samples_of(np.random.default_rng(1), prompts=3, longest=50)
    expected = learned(groups, trainer, samples, 150, "none", grad=False)
    found = rolled(model, samples, np.random.default_rng(0))
    assert differing(found, expected) > 0
    assert dtype == "bfloat16" or np.abs(found - expected).max() <= 1e-4


def test_a_ring_is_refused() -> None:
    with pytest.raises(LayoutError, match="context=2 by a ring"):
        check_numerics("exact", Layout(context=2, context_by="ring"), MODELS["llama"])
    with pytest.raises(LayoutError, match="context=4 by a ring"):
        check_numerics("exact", Layout(context=4), MODELS["llama"])
    check_numerics("exact", Layout(context=2), MODELS["llama"])
    check_numerics("fast", Layout(context=2, context_by="ring"), MODELS["llama"])


widths = st.sampled_from([1, 2, 7, 33, 64, 130, 301, 512, 577, 1030])


@WAYS
@DTYPES
@settings(max_examples=25)
@given(
    inputs=widths, outputs=widths, cuts=st.lists(st.integers(1, 700), min_size=1, max_size=4), threads=st.integers(1, 3)
)
@example(inputs=4096, outputs=64, cuts=[1, 31, 33, 64, 200], threads=2)
@example(inputs=1536, outputs=1, cuts=[1, 5, 900], threads=3)
@example(inputs=576, outputs=960, cuts=[700, 1024, 3], threads=2)
@example(inputs=33, outputs=1, cuts=[89], threads=1)
@example(inputs=7, outputs=7, cuts=[1], threads=1)
@example(inputs=31, outputs=9, cuts=[40, 3, 700], threads=2)
@example(inputs=64, outputs=1, cuts=[11], threads=1)
@example(inputs=1030, outputs=7, cuts=[1], threads=1)
@example(inputs=8190, outputs=9, cuts=[1, 40], threads=2)
def test_a_product_of_a_row_has_the_same_bits_in_any_company(
    compiled: bool, dtype: torch.dtype, inputs: int, outputs: int, cuts: list[int], threads: int
) -> None:
    x, weight = delicate(sum(cuts), inputs, dtype, 0), delicate(outputs, inputs, dtype, 1)
    with by_way(compiled):
        whole, blocks = product(x, weight), packed(weight, "exact")
        torch.set_num_threads(threads)
        parts = torch.cat([product(part, weight) for part in x.split(cuts)])
        found = [parts] if blocks is None else [parts, blocks(x), torch.cat([blocks(part) for part in x.split(cuts)])]
        torch.set_num_threads(1)
    assert len(found) == (3 if compiled else 1)
    for each in found:
        assert torch.equal(whole.view(torch.uint8), each.view(torch.uint8))


@WAYS
@DTYPES
def test_a_product_is_a_product(compiled: bool, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight, slope = (torch.randn(s, generator=draw).to(dtype) for s in ((5, 1, 48), (31, 48), (5, 1, 31)))
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    with by_way(compiled):
        ours, theirs = product(*inputs), F.linear(*(t.double() for t in inputs))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    found, expected = torch.autograd.grad(ours, inputs, slope), torch.autograd.grad(theirs, inputs, slope.double())
    for a, b in zip((ours, *found), (theirs, *expected), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance * 4)
    assert product(x[:0], weight).shape == (0, 1, 31)


def test_a_weight_that_does_not_fit_is_refused() -> None:
    """The kernel would read beyond it."""
    x, weight = torch.randn(3, 64), torch.randn(40, 64)
    for other in (weight.bfloat16(), weight[:, :32], weight[:39], kernels.in_tiles(weight[:, :32])):
        with pytest.raises(ValueError, match="does not fit a weight"):
            kernels.product(x, other, 40)
    assert kernels.product(x, weight, 40).shape == (3, 40)


def test_larger_tiles_are_those_that_agree() -> None:
    sizes = tile_sizes(576, 960, torch.float32)
    assert set(sizes) <= {*LARGER, TILE}
    assert list(sizes) == sorted(sizes, reverse=True)
    assert sizes[-1] == TILE


ONE_BY_ONE = {
    "sigmoid": (reductions.sigmoid, torch.sigmoid),
    "silu": (reductions.silu, F.silu),
    "gelu": (reductions.gelu, F.gelu),
    "gelu_tanh": (reductions.gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
}


@DTYPES
@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_a_number_has_the_same_bits_at_any_place(name: str, dtype: torch.dtype) -> None:
    ours, theirs = ONE_BY_ONE[name]
    x = (4 * torch.randn(40_000, generator=torch.Generator().manual_seed(0))).to(dtype)
    whole = ours(x)
    torch.set_num_threads(2)
    for first, count in ((0, 1), (1, 7), (3, 33), (8, 100), (17, 2999), (5, 35_001)):
        assert torch.equal(ours(x[first : first + count]), whole[first : first + count])
    torch.set_num_threads(1)
    assert torch.equal(ours(x.view(200, 200)[:, 7:90]), whole.view(200, 200)[:, 7:90])
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert torch.allclose(whole.double(), theirs(x.double()), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [1, 31, 577, 16_384, 20_001, 49_152])
@pytest.mark.parametrize("of", [reductions.row_sum, reductions.log_sum_exp], ids=["sum", "log-sum-exp"])
def test_a_sum_over_a_row_has_the_same_bits_beside_any_rows(of: Any, width: int) -> None:
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(width))
    whole = of(x)
    for threads, rows in ((1, 1), (2, 1), (2, 2), (3, 1), (3, 17)):
        torch.set_num_threads(threads)
        parts: list[Tensor] = [of(part) for part in x.split(rows)]
        torch.set_num_threads(1)
        assert torch.equal(torch.cat(parts), whole)
    expected = x.double().sum(-1) if of is reductions.row_sum else x.double().logsumexp(-1)
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-5 * width**0.5)


def test_a_row_without_any_weight_has_no_sum() -> None:
    assert reductions.log_sum_exp(torch.full((2, 5), -torch.inf)).tolist() == [-torch.inf] * 2
