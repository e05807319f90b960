"""Our experts against those of `transformers`, and the router's losses against a naive version, in many layouts."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from lockstep.distributed.device import megatron_device
from lockstep.distributed.layout import Layout
from lockstep.distributed.optimizer.parameter_marks import is_expert
from lockstep.distributed.pipeline import megatron_config
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import MoEConfig
from lockstep.model.layers.moe import MoE, Sequences
from tests.parameters import every

WIDTH, EXPERTS, INNER, SHARED = 12, 8, 10, 6
KINDS = {
    "mixtral": MoEConfig(experts=EXPERTS, experts_per_token=2, intermediate=INNER),
    "qwen3": MoEConfig(experts=EXPERTS, experts_per_token=3, intermediate=INNER, normalize=False),
    "qwen2": MoEConfig(
        experts=EXPERTS,
        experts_per_token=2,
        intermediate=INNER,
        shared_intermediate=SHARED,
        shared_gate=True,
        normalize=False,
    ),
}
LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(tensor=2, sequence=True),
    Layout(expert=2),
    Layout(expert=4),
    Layout(expert=2, data=2),
    Layout(expert=2, tensor=2),
    Layout(expert=2, tensor=2, sequence=True),
    Layout(expert=2, context=2),
]
LENGTHS = (14, 6, 2, 10)
"""Tokens of each replica."""


def reference(kind: str) -> nn.Module:
    """The block of transformers, with experts that nobody chooses."""
    common = dict(hidden_size=WIDTH, experts_implementation="eager")
    moe = KINDS[kind]
    block: nn.Module
    if kind == "mixtral":
        block = MixtralSparseMoeBlock(
            MixtralConfig(num_local_experts=EXPERTS, num_experts_per_tok=2, intermediate_size=INNER, **common)
        )
    elif kind == "qwen3":
        block = Qwen3MoeSparseMoeBlock(
            Qwen3MoeConfig(num_experts=EXPERTS, num_experts_per_tok=3, moe_intermediate_size=INNER, **common)
        )
    else:
        block = Qwen2MoeSparseMoeBlock(
            Qwen2MoeConfig(
                num_experts=EXPERTS,
                num_experts_per_tok=2,
                moe_intermediate_size=INNER,
                shared_expert_intermediate_size=SHARED,
                **common,
            )
        )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        block.gate.weight[0] = block.gate.weight[1]
        block.gate.weight[0, 0] -= 100  # inputs start with a number above 1: nobody chooses expert 0
        assert block.gate.weight.shape == (moe.experts, WIDTH)
    return block


def inputs(replica: int) -> tuple[Tensor, Tensor]:
    """Tokens of a replica, and the gradient that reaches their outputs."""
    generator = torch.Generator().manual_seed(10 + replica)
    x, gradient = (torch.randn(LENGTHS[replica], WIDTH, generator=generator) for _ in range(2))
    x[:, 0] = x[:, 0].abs() + 1
    return x, gradient


def rows(weight: Tensor, part: int, parts: int) -> Tensor:
    """Part of a stack of gate and up matrices: rows of each."""
    gate, up = (half.chunk(parts, dim=-2)[part] for half in weight.chunk(2, dim=-2))
    return torch.cat([gate, up], dim=-2)


def local_parts(groups: Groups, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this rank holds of tensors, or gradients, with transformers' names."""
    tensor, part = groups.layout.tensor, groups.tensor_rank
    gate_up, down = (
        whole[f"experts.{name}"].chunk(groups.layout.expert)[groups.expert_rank]
        for name in ("gate_up_proj", "down_proj")
    )
    held = {
        "router": whole["gate.weight"],
        "gate_up": rows(gate_up, part, tensor),
        "down": down.chunk(tensor, dim=2)[part],
    }
    if "shared_expert_gate.weight" in whole:
        both = torch.cat([whole["shared_expert.gate_proj.weight"], whole["shared_expert.up_proj.weight"]])
        held["shared.gate_up.weight"] = rows(both, part, tensor)
        held["shared.down.weight"] = whole["shared_expert.down_proj.weight"].chunk(tensor, dim=1)[part]
        held["shared.gate"] = whole["shared_expert_gate.weight"]
    return held


def built(groups: Groups, moe: MoEConfig, weights: dict[str, Tensor]) -> MoE:
    config = megatron_config(groups, layers=1, width=WIDTH, heads=2, dtype=torch.float32)
    module = MoE(moe, WIDTH, groups, config)
    parts = local_parts(groups, weights)
    assert parts.keys() == dict(module.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(parts[name])
    return module


def own_tokens(groups: Groups, x: Tensor) -> Tensor:
    return x.chunk(groups.layout.tensor)[groups.tensor_rank] if groups.layout.sequence else x


def reduced(module: MoE, groups: Groups) -> dict[str, Tensor]:
    """Gradients over the global batch, as ZeRO would reduce them."""
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
        dist.all_reduce(found[name], group=groups.expert_replicas if is_expert(parameter) else groups.replicas)
    return found


@megatron_device()
def run(groups: Groups, moe: MoEConfig, weights: dict[str, Tensor]) -> Any:
    """Output, gradient of the input and gradients of the weights, with what they are expected to be a part of."""
    module = built(groups, moe, weights)
    x, gradient = (own_tokens(groups, t) for t in inputs(dist.get_rank(groups.replicas)))
    x = x[:, None].requires_grad_()
    out = module(x)
    with torch.no_grad():
        torch.testing.assert_close(module(x), out, rtol=0, atol=0)
    out.backward(gradient[:, None])
    assert x.grad is not None
    return dist.get_rank(groups.replicas), out[:, 0].detach(), x.grad[:, 0], reduced(module, groups)


def split(groups: Groups, outputs: list[Tensor], x_gradients: list[Tensor], gradients: dict[str, Tensor]) -> Any:
    """This rank's part of what is expected."""
    replica = dist.get_rank(groups.replicas)
    return (
        own_tokens(groups, outputs[replica]),
        own_tokens(groups, x_gradients[replica]),
        local_parts(groups, gradients),
    )


@pytest.mark.parametrize(
    ("layout", "kind"),
    every(
        LAYOUTS,
        KINDS,
        part=lambda layout, kind: kind == "qwen2" or layout in (Layout(), Layout(expert=2, tensor=2, sequence=True)),
    ),
    ids=str,
)
def test_outputs_and_gradients_equal_those_of_transformers(layout: Layout, kind: str, worlds: RankPool) -> None:
    block = reference(kind)
    outputs, x_gradients = [], []
    for replica in range(layout.replicas * layout.context):
        x, gradient = inputs(replica)
        x.requires_grad_()
        out = block(x[None])[0]
        out.backward(gradient)
        assert x.grad is not None
        outputs.append(out.detach())
        x_gradients.append(x.grad)
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in block.named_parameters()}
    assert gradients["gate.weight"].abs().max() > 0.1
    assert not gradients["experts.down_proj"][0].any()
    weights = {name: p.detach() for name, p in block.named_parameters()}
    found = worlds.run(layout, run, KINDS[kind], weights)
    expected = worlds.run(layout, split, outputs, x_gradients, gradients)
    for (_, out, x_gradient, ours), (wanted, wanted_x, theirs) in zip(found, expected, strict=True):
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x_gradient, wanted_x, rtol=1e-5, atol=2e-5)
        for name, part in theirs.items():
            torch.testing.assert_close(ours[name], part, rtol=1e-5, atol=5e-5, msg=name)


def test_a_token_has_the_same_bits_whatever_travels_with_it(groups: Groups) -> None:
    module = built(groups, KINDS["qwen2"], {n: p.detach() for n, p in reference("qwen2").named_parameters()}).bfloat16()
    x = torch.cat([inputs(i)[0] for i in range(4)]).bfloat16()[:, None]
    with torch.no_grad():
        alone = torch.cat([module(row) for row in x.split(1)])
        torch.testing.assert_close(module(x), alone, rtol=0, atol=0)


DOCUMENTS = (5, 1, 8, 2)
WEIGHTS = (0.3, 0.0, 0.6, 0.1)
LOSSES = KINDS["mixtral"].model_copy(update={"balance_coefficient": 0.7, "z_coefficient": 0.02})


def document_tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(20)
    return [torch.randn(n, WIDTH, generator=generator) for n in DOCUMENTS]


def naive_loss(moe: MoEConfig, router: Tensor, documents: list[Tensor]) -> Tensor:
    total = torch.zeros(())
    for x, weight in zip(documents, WEIGHTS, strict=True):
        logits = x @ router.T
        chosen = logits.topk(moe.experts_per_token).indices
        share = torch.tensor([(chosen == e).float().mean() for e in range(moe.experts)])
        balance = moe.experts * (share * logits.softmax(-1).mean(0)).sum()
        z = (logits.exp().sum(-1).log() ** 2).mean()
        total = total + weight * (moe.balance_coefficient * balance + moe.z_coefficient * z)
    return total


@megatron_device()
def router_gradients(groups: Groups, weights: dict[str, Tensor], rows: list[list[int]]) -> Any:
    """Gradients that come from the router's losses alone, for rows of documents shared out over the replicas."""
    module, holders = built(groups, LOSSES, weights), dist.get_world_size(groups.replicas)
    texts, context = document_tokens(), groups.layout.context
    found = {}
    for index, row in enumerate(rows):
        if index % groups.layout.replicas != groups.data_rank:
            continue
        whole = torch.cat([texts[d] for d in row])
        document = torch.cat([torch.full((len(texts[d]),), i) for i, d in enumerate(row)])
        places = torch.arange(len(whole)).tensor_split(context)[groups.context_rank]
        x = own_tokens(groups, whole[places])[:, None].clone().requires_grad_()
        sequences = Sequences(document[places], torch.tensor([WEIGHTS[d] for d in row]))
        out = module(x, sequences)
        (out * 0).sum().backward()
        assert x.grad is not None
        found[index] = (groups.context_rank, groups.tensor_rank, x.grad[:, 0] / holders)
    return found, {name: g / holders for name, g in reduced(module, groups).items()}


@pytest.mark.parametrize(
    ("layout", "packing"),
    [
        (Layout(), [[0, 1, 2, 3]]),
        (Layout(), [[3], [1, 0], [2]]),
        (Layout(), [[2, 0, 3], [1]]),
        (Layout(data=2), [[3, 1], [0, 2]]),
        (Layout(context=2), [[0, 1, 2, 3]]),
        (Layout(context=2), [[3, 2], [1, 0]]),
        (Layout(context=2, expert=2), [[3, 2], [1, 0]]),
        (Layout(tensor=2), [[3, 2], [1, 0]]),
        (Layout(tensor=2, sequence=True), [[3, 2], [1, 0]]),
        (Layout(expert=2, tensor=2, sequence=True), [[3, 2], [1, 0]]),
    ],
    ids=str,
)
def test_losses_of_the_router_depend_on_documents_alone(
    layout: Layout, packing: list[list[int]], worlds: RankPool
) -> None:
    weights = {name: p.detach() for name, p in reference("mixtral").named_parameters()}
    weights["gate.weight"][0, 0] += 100
    router = weights["gate.weight"].clone().requires_grad_()
    documents = [x.requires_grad_() for x in document_tokens()]
    naive_loss(LOSSES, router, documents).backward()
    assert router.grad is not None
    assert router.grad.abs().max() > 0.01
    parts: dict[int, list[Any]] = {}
    for found, gradients in worlds.run(layout, router_gradients, weights, packing):
        torch.testing.assert_close(gradients["router"], router.grad, rtol=1e-5, atol=1e-6)
        for row, part in found.items():
            parts.setdefault(row, []).append(part)
    for row, members in enumerate(packing):
        held = {
            (context, tensor if layout.sequence else 0): gradient.numpy() for context, tensor, gradient in parts[row]
        }
        whole = np.concatenate([held[place] for place in sorted(held)])
        expected = np.concatenate([documents[d].grad.numpy() for d in members])  # type: ignore[union-attr]
        np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"experts_per_token": 9}, "experts_per_token=9 is more than experts=8"),
        ({"shared_gate": True}, "give shared_intermediate"),
    ],
)
def test_impossible_experts_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MoEConfig.model_validate(KINDS["mixtral"].model_dump() | given)
