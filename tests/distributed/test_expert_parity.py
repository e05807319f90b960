"""Any layout, the same numbers, for models with experts: logits against transformers, training against one process."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lockstep.cluster.conversion.convert import to_huggingface
from lockstep.data.batch import Sample
from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.layout import Layout, LayoutError, check_divides
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool, WorldFailed
from lockstep.model.config import ModelConfig, UnknownModel
from lockstep.model.formats.huggingface.families.registry import from_huggingface
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder
from lockstep.model.layers.recompute import Recompute
from lockstep.model.loading import build, transformer_of
from lockstep.model.objectives.token_loss import nll
from lockstep.model.state_dict import pieces
from lockstep.model.training.config import OptimizerConfig, TrainerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.model.weights.names import logical_tensors
from lockstep.rl.weight_sync.parameters import receive
from lockstep.rl.weight_sync.protocol import Shard
from lockstep.rl.weight_sync.shards import shards_of
from tests.distributed.test_parity import ADAMW, assembled, global_batch
from tests.model.test_transformer import LENGTHS, packed_and_alone, tokens_of
from tests.parameters import every

SIZES: dict[str, Any] = dict(
    vocab_size=131,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
    intermediate_size=24,
    num_experts_per_tok=2,
    rope_theta=5000.0,
)
LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(data=2, zero=3),
    Layout(expert=2),
    Layout(expert=4),
    Layout(expert=2, tensor=2),
    Layout(expert=2, tensor=2, sequence=True),
    Layout(expert=2, data=2, zero=0),
    Layout(expert=2, data=2, zero=1),
    Layout(expert=2, data=2, zero=2),
    Layout(expert=2, pipeline=2),
    Layout(context=2),
    Layout(expert=2, context=2),
]


REPLAYED = [
    Layout(tensor=2, pipeline=2),
    Layout(expert=2, tensor=2, sequence=True),
    Layout(expert=2, context=2),
    Layout(data=2, zero=3),
]

FEW = {
    "mixtral": [
        Layout(),
        Layout(expert=4),
        Layout(expert=2, tensor=2),
        Layout(expert=2, tensor=2, sequence=True),
        Layout(expert=2, data=2, zero=2),
        Layout(expert=2, pipeline=2),
        Layout(expert=2, context=2),
        Layout(data=2, zero=3),
    ],
    "qwen2": [Layout(expert=2, tensor=2), Layout(expert=2, pipeline=2), Layout(expert=2, context=2)],
    "qwen3": [Layout(expert=2, tensor=2, sequence=True), Layout(expert=4), Layout(data=2, zero=3)],
}


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES))


def qwen2() -> PreTrainedModel:
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(num_experts=4, moe_intermediate_size=20, shared_expert_intermediate_size=12, **SIZES)
    )


def qwen3() -> PreTrainedModel:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(num_experts=4, moe_intermediate_size=20, norm_topk_prob=True, head_dim=16, **SIZES)
    )


MODELS = {"qwen2": qwen2, "mixtral": mixtral, "qwen3": qwen3}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    model = MODELS[request.param]()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        elif name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(expert=2)], ids=str)
def test_logits_equal_those_of_transformers(layout: Layout, folder: Path, worlds: RankPool) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [model(t[None]).logits[0].numpy() for t in tokens_of(LENGTHS, model.config.vocab_size)]
    assert max(np.abs(e).max() for e in expected) > 1
    for packed, alone in worlds.run(layout, packed_and_alone, folder, LENGTHS):
        for found, wanted in zip(alone, expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(packed, np.concatenate(expected), atol=1e-4, rtol=1e-4)


def with_losses(config: ModelConfig) -> ModelConfig:
    assert config.moe is not None
    losses = {"balance_coefficient": 0.3, "z_coefficient": 0.01}
    return config.model_copy(update={"moe": config.moe.model_copy(update=losses)})


def train(
    groups: Groups,
    folder: Path,
    steps: int,
    row_tokens: int,
    dtype: torch.dtype = torch.float32,
    optimizer: OptimizerConfig = ADAMW,
) -> Any:
    """Losses, norms and the owned pieces of the weights after some steps."""
    source = HuggingFaceFolder(folder)
    config = with_losses(source.config)
    trainer = Trainer(stage := build(config, groups, dtype, source), groups, optimizer)
    rules = row_rules(groups.layout, row_tokens, config)
    history = []
    for step in range(steps):
        rows = rows_for_ranks(global_batch(config.vocabulary, step % 2), rules)
        result = trainer.step(rows[groups.data_rank], nll, optimizer.learning_rate)
        history.append((result.values["loss"], result.grad_norm))
    with trainer.engine.whole_weights():
        held = pieces(transformer_of(stage))
        return history, [(p.name, p.box, p.view(t).float().clone().numpy()) for t, p in held if p.owned]


def with_records(batch: list[Sample], model: ModelConfig, seed: int) -> list[Sample]:
    """Random experts of all tokens but the last; every fourth sample has none."""
    assert model.moe
    draw, found = np.random.default_rng(seed), []
    for number, each in enumerate(batch):
        size = len(each.prompt) + len(each.completion) - 1, model.layers, model.moe.experts
        experts = draw.random(size).argsort(-1)[..., : model.moe.experts_per_token].astype(np.uint8)
        found.append(replace(each, experts=experts if number % 4 else None))
    return found


def replayed(groups: Groups, folder: Path) -> Any:
    """Losses, norms, gradient norms of parts and shares of differing routing, with recorded experts."""
    source = HuggingFaceFolder(folder)
    config = with_losses(source.config)
    recompute: Recompute = "full" if groups.layout.context > 1 else "none"
    stage = build(config, groups, torch.float32, source)
    trainer = Trainer(stage, groups, ADAMW, config=TrainerConfig(recompute=recompute))
    history = []
    for step in range(2):
        batch = with_records(global_batch(config.vocabulary, step), config, step)
        rows = rows_for_ranks(batch, row_rules(groups.layout, 64, config))[groups.data_rank]
        result = trainer.step(rows, nll, ADAMW.learning_rate)
        parts = [result.grad_norms[name] for name in sorted(result.grad_norms)]
        history.append([result.values["loss"], result.values["routing_differs"], result.grad_norm, *parts])
    return history


@pytest.mark.parametrize("folder", ["mixtral"], indirect=True)
def test_recorded_experts_train_to_the_same_numbers_in_any_layout(folder: Path, worlds: RankPool) -> None:
    expected = worlds.run(Layout(), replayed, folder)[0]
    own = worlds.run(Layout(), train, folder, 2, 64)[0][0]
    assert abs(expected[0][0] - own[0][0]) > 1e-3, "it matters which experts tokens go to"
    assert 0.5 < expected[0][1] < 1
    for layout in REPLAYED:
        for history in worlds.run(layout, replayed, folder):
            np.testing.assert_allclose(history, expected, rtol=5e-5, err_msg=str(layout))


@pytest.fixture(scope="module")
def alone(worlds: RankPool, folder: Path) -> Any:
    return worlds.run(Layout(), train, folder, 4, 64)[0]


@pytest.mark.parametrize(
    ("folder", "layout"),
    every(MODELS, LAYOUTS, part=lambda kind, layout: layout in FEW[kind]),
    ids=str,
    indirect=["folder"],
)
def test_a_layout_trains_to_the_same_numbers(layout: Layout, alone: Any, worlds: RankPool, folder: Path) -> None:
    results = worlds.run(layout, train, folder, 4, 64)
    history, held = alone
    for rank, (other, _) in enumerate(results):
        np.testing.assert_allclose(other, history, rtol=2e-5, err_msg=f"rank {rank}")
    expected = {name: array for name, _, array in held}
    for name, array in assembled([part for _, part in results], expected).items():
        # Adam divides the smallest gradients by their own size, so that rounding moves a weight by some of the rate.
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=3e-5, err_msg=name)


@pytest.mark.parametrize("row_tokens", [1, 1000])
def test_the_size_of_a_micro_batch_changes_no_number(
    row_tokens: int, alone: Any, worlds: RankPool, folder: Path
) -> None:
    history, _ = worlds.run(Layout(), train, folder, 4, row_tokens)[0]
    np.testing.assert_allclose(history, alone[0], rtol=2e-6)


@pytest.mark.parametrize(
    ("folder", "zero"), [("mixtral", 0), ("mixtral", 1), ("mixtral", 2)], ids=str, indirect=["folder"]
)
def test_bfloat16_has_the_same_norms_but_for_rounding(zero: int, alone: Any, worlds: RankPool, folder: Path) -> None:
    history, _ = worlds.run(Layout(expert=2, data=2, zero=zero), train, folder, 1, 64, torch.bfloat16)[0]
    np.testing.assert_allclose(history, alone[0][:1], rtol=0.02)


@pytest.mark.parametrize("folder", ["mixtral"], indirect=True)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_first_step_in_bfloat16_is_the_same_without_zero(kind: Any, worlds: RankPool, folder: Path) -> None:
    arguments = (train, folder, 1, 64, torch.bfloat16, OptimizerConfig(kind=kind, learning_rate=0.05, weight_decay=0.5))
    (_, plain), (_, split) = (worlds.run(Layout(zero=zero), *arguments)[0] for zero in (0, 1))
    for (name, _, a), (_, _, b) in zip(plain, split, strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-3, err_msg=name)


def test_training_reached_routers_and_experts(alone: Any, folder: Path) -> None:
    source = HuggingFaceFolder(folder)
    shapes = logical_tensors(source.config)
    for name, box, array in alone[1]:
        if ".mlp." in name:
            before = source.read(name, box)
            assert array.shape == shapes[name]
            assert (array != before).mean() > 0.9, name


def test_files_survive_the_way_through_our_names(folder: Path, tmp_path: Path) -> None:
    to_huggingface(str(folder), tmp_path / "written")
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "written", folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (folder, tmp_path / "written"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert HuggingFaceFolder(tmp_path / "written").config == HuggingFaceFolder(folder).config


def sent(groups: Groups, folder: Path) -> list[Shard]:
    source = HuggingFaceFolder(folder)
    return shards_of(transformer_of(build(source.config, groups, torch.float32, source)))


def received(groups: Groups, folder: Path, shards: list[Shard]) -> None:
    model = HuggingFaceFolder(folder).config
    receive(transformer_of(build(model, groups, torch.float32, RandomWeights(model, seed=1))), shards)


@pytest.mark.parametrize("folder", ["qwen2"], indirect=True)
def test_rollout_workers_receive_experts_from_all_ranks(folder: Path, worlds: RankPool) -> None:
    shards = [shard for rank in worlds.run(Layout(expert=2, tensor=2), sent, folder) for shard in rank]
    worlds.run(Layout(), received, folder, shards)
    missing = [shard for shard in shards if ".experts.3.up_proj" not in shard.name]
    with pytest.raises(WorldFailed, match="WeightsDiffer: the policy sent 0 of"):
        worlds.run(Layout(), received, folder, missing)


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
@pytest.mark.parametrize(("word", "value"), [("mlp_only_layers", [0]), ("decoder_sparse_step", 2)])
def test_models_with_experts_in_some_layers_only_are_refused(word: str, value: Any, folder: Path) -> None:
    words = json.loads((folder / "config.json").read_text())
    with pytest.raises(UnknownModel, match=f"uses {word}, which is not supported"):
        from_huggingface(words | {word: value})


def test_parameters_are_counted_without_building_the_model(folder: Path) -> None:
    config = HuggingFaceFolder(folder).config
    assert config.parameters == AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert config.parameters == sum(int(np.prod(shape)) for shape in logical_tensors(config).values())


def test_layouts_that_do_not_divide_experts_are_refused(folder: Path) -> None:
    sizes = HuggingFaceFolder(folder).config.sizes
    with pytest.raises(LayoutError, match=r"expert=3 does not divide the model's 4 experts: use one of 1, 2, 4"):
        check_divides(Layout(expert=3), **sizes)
    with pytest.raises(LayoutError, match="does not divide the model's 13 shared experts' width: use one of 1"):
        check_divides(Layout(tensor=2), **sizes | {"shared_intermediate": 13})
