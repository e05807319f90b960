"""Log-probabilities in chunks and over the tensor axis against log_softmax of the whole logits."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.layers.logprobs import CHUNKS, _d_chunk, local_logits, token_logprobs, token_scores
from lockstep.model.weights.sharding import padded_vocabulary
from tests.model.exact_rollouts import by_way

WIDTH = 12
SIZES = [(0, 31), (1, 31), (5, 2), (CHUNKS["fast"], 30), (CHUNKS["fast"] + 3, 31), (2 * CHUNKS["fast"] + 1, 7)]


def problem(tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, WIDTH, generator=generator)
    weight = torch.randn(vocabulary, WIDTH, generator=generator)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return hidden, weight, targets, torch.randn(tokens, generator=generator)


def naive(tokens: int, vocabulary: int, temperature: float) -> list[Tensor]:
    """Values and gradients of activations and weight, in fp64."""
    hidden, weight, targets, slope = (t.double() if t.is_floating_point() else t for t in problem(tokens, vocabulary))
    hidden.requires_grad_()
    weight.requires_grad_()
    logp = (hidden @ weight.t() / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return [logp.detach(), *torch.autograd.grad(logp, (hidden, weight), slope)]


def ours(groups: Groups, tokens: int, vocabulary: int, temperature: float, dtype: torch.dtype) -> list[Tensor]:
    """As `naive`, with this rank's rows of the weight; what lies in the padding must not matter."""
    hidden, whole, targets, slope = problem(tokens, vocabulary)
    rows = padded_vocabulary(vocabulary, groups.layout.tensor)
    padded = torch.cat((whole, torch.full((rows - vocabulary, WIDTH), 50.0)))
    weight = padded.chunk(groups.layout.tensor)[groups.tensor_rank].to(dtype).requires_grad_()
    hidden = hidden.to(dtype).requires_grad_()
    logp = token_logprobs(hidden, weight, targets, vocabulary=vocabulary, group=groups.tensor, temperature=temperature)
    return [logp.detach(), *torch.autograd.grad(logp, (hidden, weight), slope)]


def on_rank(groups: Groups, *args: Any) -> list[Any]:
    return [t.numpy() for t in ours(groups, *args)]


def check(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("log p", "d hidden", "d weight"), found, expected, strict=True):
        assert a.shape == b.shape, name
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        assert torch.allclose(a.double(), b, rtol=tolerance, atol=tolerance * scale), name


@pytest.mark.parametrize(("tokens", "vocabulary"), SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_one_rank_equals_log_softmax(tokens: int, vocabulary: int, temperature: float, groups: Groups) -> None:
    found = ours(groups, tokens, vocabulary, temperature, torch.float32)
    check(found, naive(tokens, vocabulary, temperature), 2e-5)
    assert found[0].dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_bfloat16_stays_near(temperature: float, groups: Groups) -> None:
    found = ours(groups, 40, 31, temperature, torch.bfloat16)
    check(found, naive(40, 31, temperature), 0.06)
    assert found[0].dtype == torch.float32


@pytest.mark.parametrize(("tokens", "vocabulary", "temperature"), [(*size, t) for size in SIZES for t in (1.0, 0.5)])
def test_two_tensor_ranks_equal_one(tokens: int, vocabulary: int, temperature: float, worlds: RankPool) -> None:
    ranks = worlds.run(Layout(tensor=2), on_rank, tokens, vocabulary, temperature, torch.float32)
    first, second = ([torch.from_numpy(a) for a in rank] for rank in ranks)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    weight = torch.cat((first[2], second[2]))
    assert not weight[vocabulary:].any()
    check([first[0], first[1], weight[:vocabulary]], naive(tokens, vocabulary, temperature), 2e-5)


def z_gradients(groups: Groups) -> list[Any]:
    """Of Σ slope · log p + Σ (log-sum-exp)², by this rank's part of the weight."""
    hidden, whole, targets, slope = problem(9, 32)
    weight = whole.chunk(groups.layout.tensor)[groups.tensor_rank].clone().requires_grad_()
    hidden.requires_grad_()
    logp, log_sum = token_scores(hidden, weight, targets, vocabulary=32, group=groups.tensor, temperature=0.7)
    loss = (slope * logp).sum() + log_sum.square().sum()
    return [t.numpy() for t in (log_sum.detach(), *torch.autograd.grad(loss, (hidden, weight)))]


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2)], ids=str)
def test_the_log_sum_has_a_gradient_of_its_own(layout: Layout, worlds: RankPool) -> None:
    found = worlds.run(layout, z_gradients)
    hidden, whole, targets, slope = (t.double() if t.is_floating_point() else t for t in problem(9, 32))
    scaled = hidden.requires_grad_() @ whole.requires_grad_().t() / 0.7
    loss = (slope * scaled.log_softmax(-1).gather(1, targets[:, None])[:, 0]).sum() + scaled.logsumexp(
        -1
    ).square().sum()
    expected = [scaled.logsumexp(-1).detach(), *torch.autograd.grad(loss, (hidden, whole))]
    for rank in found:
        weight = np.concatenate([part[2] for part in found])
        check([torch.from_numpy(a) for a in (rank[0], rank[1], weight)], expected, 2e-5)


def test_a_second_backward_gives_the_same_gradient(groups: Groups) -> None:
    hidden, weight, targets, slope = problem(9, 31)
    hidden.requires_grad_()
    logp = token_logprobs(hidden, weight, targets, vocabulary=31, group=groups.tensor, temperature=0.5)
    first, second = (torch.autograd.grad(logp, hidden, slope, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("padding", "temperature"), [(0, 1.0), (2, 0.7)])
def test_soft_capped_logits(padding: int, temperature: float, groups: Groups) -> None:
    hidden, weight, targets, slope = problem(9, 31)
    wide = [t.double().requires_grad_() for t in (hidden, weight)]
    capped = 1.2 * torch.tanh(wide[0] @ wide[1].t() / 1.2)
    expected = (capped / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    padded = torch.cat((weight, torch.full((padding, WIDTH), 50.0))).requires_grad_()
    hidden.requires_grad_()
    logp = token_logprobs(hidden, padded, targets, vocabulary=31, group=groups.tensor, temperature=temperature, cap=1.2)
    d_hidden, d_weight = torch.autograd.grad(logp, (hidden, padded), slope)
    assert not d_weight[31:].any()
    check(
        [logp.detach(), d_hidden, d_weight[:31]],
        [expected.detach(), *torch.autograd.grad(expected, wide, slope.double())],
        2e-5,
    )


def test_padding_has_probability_zero() -> None:
    hidden, weight, _, _ = problem(3, 8)
    logits = local_logits(hidden, weight, 8, 13)
    assert torch.isneginf(logits[:, 5:]).all()
    assert torch.equal(logits[:, :5], (hidden @ weight.t())[:, :5])
    assert torch.isneginf(local_logits(hidden, weight, 16, 13)).all()


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, 0), (torch.bfloat16, 2 * CHUNKS["fast"] + 1)])
def test_no_fp32_logits_of_all_tokens_are_kept(dtype: torch.dtype, kept: int, groups: Groups) -> None:
    hidden, weight, targets, _ = problem(2 * CHUNKS["fast"] + 1, 301)
    hidden = hidden.to(dtype).requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logprobs(hidden, weight.to(dtype), targets, vocabulary=301, group=groups.tensor)
    logits = [t for t in saved if t.dim() == 2 and t.shape[1] == 301]
    assert sum(len(t) for t in logits) == kept
    assert all(t.dtype == dtype for t in logits)


def entropies(groups: Groups, temperature: float, cap: float | None, dtype: torch.dtype) -> list[Any]:
    """Entropy and its gradient together with that of log p, by this rank's part of a padded weight."""
    hidden, whole, targets, slope = problem(CHUNKS["fast"] + 3, 31)
    rows = padded_vocabulary(31, groups.layout.tensor)
    padded = torch.cat((whole, torch.full((rows - 31, WIDTH), 50.0)))
    weight = padded.chunk(groups.layout.tensor)[groups.tensor_rank].to(dtype).requires_grad_()
    hidden = hidden.to(dtype).requires_grad_()
    settings = {"temperature": temperature, "cap": cap, "entropy": True}
    logp, _, entropy = token_scores(hidden, weight, targets, vocabulary=31, group=groups.tensor, **settings)
    found = [entropy, *torch.autograd.grad((slope * entropy + logp).sum(), (hidden, weight))]
    return [t.detach().float().numpy() for t in found]


def naive_entropies(temperature: float, cap: float | None) -> list[Tensor]:
    hidden, weight, targets, slope = (
        t.double() if t.is_floating_point() else t for t in problem(CHUNKS["fast"] + 3, 31)
    )
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = hidden @ weight.t()
    logits = (logits if cap is None else cap * torch.tanh(logits / cap)) / temperature
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    loss = (slope * entropy + logp.gather(1, targets[:, None])[:, 0]).sum()
    return [entropy.detach(), *torch.autograd.grad(loss, (hidden, weight))]


@pytest.mark.parametrize(("temperature", "cap"), [(1.0, None), (0.5, None), (0.7, 3.0)])
def test_entropy_is_that_of_the_whole_vocabulary(temperature: float, cap: float | None, worlds: RankPool) -> None:
    expected = naive_entropies(temperature, cap)
    for layout in (Layout(), Layout(tensor=2)):
        ranks = worlds.run(layout, entropies, temperature, cap, torch.float32)
        weight = torch.cat([torch.from_numpy(rank[2]) for rank in ranks])
        assert not weight[31:].any()
        check([*map(torch.from_numpy, ranks[0][:2]), weight[:31]], expected, 2e-5)


def test_entropy_in_bfloat16_stays_near(groups: Groups) -> None:
    found = [torch.from_numpy(t) for t in entropies(groups, 1.0, None, torch.bfloat16)]
    check([*found[:2], found[2][:31]], naive_entropies(1.0, None), 0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_of_logits_are_those_without_a_compiler(dtype: torch.dtype, temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(9, 101, generator=draw) * 8).to(dtype)
    logits[:, 90:] = float("-inf")
    targets = torch.tensor([0, 15, 16, 89, 3, -4, 200, 7, 31])  # two are of other ranks
    columns = [logits.float().div(temperature).logsumexp(1), targets, torch.randn(9, generator=draw)]
    columns.append(torch.randn(9, generator=draw))
    found = {}
    for compiled in (True, False):
        with by_way(compiled):
            found[compiled] = _d_chunk(logits, *columns, temperature=temperature, cap=None)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]  # exponents up to 40 are rounded to 4e-6
    assert torch.allclose(found[True], found[False], rtol=tolerance, atol=tolerance / 100)
    assert (found[True][:, 90:] == 0).all()
    logits[4, 50] = float("nan")
    assert _d_chunk(logits, *columns, temperature=temperature, cap=None)[4].isnan().any(), "what is none stays none"
