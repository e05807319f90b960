"""Tokens go to recorded experts, by the router's own probabilities, as in plain torch and in any layout."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import silu

from lockstep.distributed.device import megatron_device
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import MoEConfig
from lockstep.model.layers.routing import UNRECORDED, Recorder, Replay, expert_dtype
from tests.model.layers.test_moe import EXPERTS, KINDS, built, inputs, own_tokens, reduced, reference, split

LAYERS = [4, 7]
"""Of which the second is replayed."""


def records(moe: MoEConfig, replica: int) -> Tensor:
    """Random experts of a replica's tokens in two layers; every fourth token has no record."""
    tokens = len(inputs(replica)[0])
    drawn = torch.rand(tokens, 2, EXPERTS, generator=torch.Generator().manual_seed(replica)).argsort(-1)
    experts_TLK = drawn[..., : moe.experts_per_token].to(torch.int16)
    experts_TLK[::4] = UNRECORDED
    return experts_TLK


def naive(moe: MoEConfig, weights: dict[str, Tensor], x_TD: Tensor, recorded_TK: Tensor) -> tuple[Tensor, list[int]]:
    """Outputs token by token; and how many tokens a router would have sent elsewhere, and have a record."""
    rows, counts = [], [0, 0]
    for x, recorded in zip(x_TD, recorded_TK.tolist(), strict=True):
        probability = (weights["gate.weight"] @ x).softmax(-1)
        own = probability.topk(moe.experts_per_token).indices.tolist()
        chosen = own if recorded[0] == UNRECORDED else recorded
        counts[0] += {*own} != {*chosen}
        counts[1] += recorded[0] != UNRECORDED
        gates = probability[chosen]
        gates = gates / gates.sum() if moe.normalize else gates
        hidden = [(weights["experts.gate_up_proj"][e] @ x).chunk(2) for e in chosen]
        outputs = [weights["experts.down_proj"][e] @ (silu(g) * u) for e, (g, u) in zip(chosen, hidden, strict=True)]
        rows.append(sum(gate * output for gate, output in zip(gates, outputs, strict=True)))
    return torch.stack(rows), counts


@megatron_device()
def replayed(groups: Groups, moe: MoEConfig, weights: dict[str, Tensor]) -> Any:
    """Output, gradient of the input and of the weights, and what was counted."""
    module, replica = built(groups, moe, weights), dist.get_rank(groups.replicas)
    x, gradient = (own_tokens(groups, t) for t in inputs(replica))
    x, counts = x[:, None].requires_grad_(), torch.zeros(2, dtype=torch.int64)
    out = module(x, None, partial(Replay(records(moe, replica), LAYERS, counts), LAYERS[1]))
    out.backward(gradient[:, None])
    assert x.grad is not None
    return out[:, 0].detach(), x.grad[:, 0], reduced(module, groups), counts.tolist()


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("mixtral", Layout()),
        ("qwen3", Layout(tensor=2)),
        ("mixtral", Layout(expert=2, tensor=2, sequence=True)),
        ("qwen3", Layout(expert=2, context=2)),
    ],
    ids=str,
)
def test_recorded_experts_are_taken_by_the_routers_own_probabilities(
    kind: str, layout: Layout, worlds: RankPool
) -> None:
    moe, weights = KINDS[kind], {n: p.detach().clone().requires_grad_() for n, p in reference(kind).named_parameters()}
    outputs, x_gradients, counts = [], [], []
    for replica in range(layout.replicas * layout.context):
        x, gradient = inputs(replica)
        out, counted = naive(moe, weights, x.requires_grad_(), records(moe, replica)[:, 1])
        out.backward(gradient)
        assert x.grad is not None
        outputs.append(out.detach())
        x_gradients.append(x.grad)
        counts.append(counted)
    assert sum(differs for differs, _ in counts) > 5
    gradients = {n: p.grad for n, p in weights.items() if p.grad is not None}
    assert gradients["gate.weight"].abs().max() > 0.1
    found = worlds.run(layout, replayed, moe, {n: p.detach() for n, p in weights.items()})
    expected = worlds.run(layout, split, outputs, x_gradients, gradients)
    ranks = layout.tensor
    for rank, ((out, x_gradient, ours, counted), (wanted, wanted_x, theirs)) in enumerate(
        zip(found, expected, strict=True)
    ):
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x_gradient, wanted_x, rtol=1e-5, atol=2e-5)
        for name, part in theirs.items():
            torch.testing.assert_close(ours[name], part, rtol=1e-5, atol=5e-5, msg=name)
        assert counted == counts[rank // ranks]


def test_the_routers_own_choice_replayed_changes_no_bit(groups: Groups) -> None:
    moe = KINDS["qwen2"]
    module = built(groups, moe, {n: p.detach() for n, p in reference("qwen2").named_parameters()})
    x, gradient = (t[:, None] for t in inputs(0))
    found, recorder = [], Recorder()
    for route in (None, partial(recorder, 3), partial(Replay(torch.tensor([]), [3]), 3)):
        if len(found) == 2:
            kept = recorder.experts(expert_dtype(moe.experts))
            assert kept.dtype == torch.uint8
            assert kept.shape == (len(x), 1, moe.experts_per_token)
            route = partial(Replay(kept.to(torch.int16), [3]), 3)
        module.zero_grad()
        own = x.clone().requires_grad_()
        out = module(own, None, route)
        out.backward(gradient)
        found.append([out.detach(), own.grad, *(p.grad for p in module.parameters())])
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_experts_are_counted_in_bytes_as_long_as_these_suffice() -> None:
    assert [expert_dtype(experts) for experts in (1, 256, 257, 512)] == [torch.uint8] * 2 + [torch.int16] * 2
    recorder = Recorder()
    for layer in (1, 0):
        recorder(layer, torch.tensor([[255, layer]]))
    assert recorder.experts(expert_dtype(256)).tolist() == [[[255, 0], [255, 1]]]
