"""Adapters and frozen parameters: the same numbers in any layout, nothing else changes, and what is sent is merged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.data.batch import TokenBatch
from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.reshard import WEIGHTS
from lockstep.distributed.checkpoint.saver import Saver
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool, WorldFailed
from lockstep.model.config import LoraConfig, ModelConfig, MoEConfig, Numerics, describe
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder
from lockstep.model.loading import DTYPES, build
from lockstep.model.objectives.objective import LossInputs
from lockstep.model.objectives.token_loss import nll
from lockstep.model.state_dict import LocalWeights, pieces, pieces_by_parameter
from lockstep.model.training.config import OptimizerConfig, TrainerConfig, row_rules
from lockstep.model.training.trainable import NothingLearns, TrainableConfig
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.model.weights.lora import merged, with_adapters
from lockstep.model.weights.names import VALUE, is_adapter
from lockstep.rl.weight_sync.parameters import receive
from lockstep.rl.weight_sync.shards import messages_of, shards_of, signed
from tests.distributed.test_parity import assembled, global_batch
from tests.parameters import every

LORA = LoraConfig(rank=4, alpha=8, targets=("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))
ADAPTERS = TrainableConfig(lora=LORA)
SEED = 7

BIASED = ModelConfig(
    layers=4,
    width=48,
    heads=6,
    kv_heads=2,
    head_dim=8,
    intermediate=80,
    vocabulary=301,
    context=64,
    biases=("qkv", "out", "mlp"),
)

Weights = dict[str, np.ndarray[Any, Any]]


def trainer_of(
    groups: Groups,
    source: Any,
    model: ModelConfig,
    trainable: TrainableConfig,
    dtype: str = "float32",
    numerics: Numerics = "fast",
) -> Trainer:
    model, source = with_adapters(model, source, trainable.lora, SEED)
    stage = build(model, groups, DTYPES[dtype], source, numerics)
    return Trainer(stage, groups, OptimizerConfig(), config=TrainerConfig(trainable=trainable))


def rows_of_step(trainer: Trainer, step: int) -> list[TokenBatch]:
    groups = trainer.groups
    batch = global_batch(trainer.transformer.model.vocabulary, step % 2)
    return rows_for_ranks(batch, row_rules(groups.layout, 64))[groups.data_rank]


def owned(trainer: Trainer) -> list[Any]:
    with trainer.engine.whole_weights():
        held = pieces(trainer.transformer)
        return [(p.name, p.box, p.view(t).float().clone().numpy()) for t, p in held if p.owned]


def steps(trainer: Trainer, count: int, rate: float = 1e-3) -> list[tuple[float, float]]:
    results = [trainer.step(rows_of_step(trainer, step), nll, rate) for step in range(count)]
    return [(result.values["loss"], result.grad_norm) for result in results]


def check_split(trainer: Trainer, before: list[Any], after: list[Any], trainable: TrainableConfig) -> None:
    """What learns has changed and all else has not, by a bit; the optimizer remembers what learns alone."""
    for (name, _, old), (_, _, new) in zip(before, after, strict=True):
        assert (old != new).any() == trainable.learns(name), name
    held = pieces_by_parameter(trainer.transformer)
    for kept in trainer.engine.flat_shards():
        learns = trainable.learns(held[kept.parameter][0].name)
        assert (set(kept.values) == {WEIGHTS}) == (not learns), held[kept.parameter]


def learn(groups: Groups, folder: Path | None, trainable: TrainableConfig) -> tuple[Any, Any]:
    source: Any = HuggingFaceFolder(folder) if folder else RandomWeights(BIASED, 3, 0.2)
    trainer = trainer_of(groups, source, source.config if folder else BIASED, trainable)
    before = owned(trainer)
    history = steps(trainer, 3)
    after = owned(trainer)
    check_split(trainer, before, after, trainable)
    return history, after


PATTERNS = TrainableConfig(tensors=("model.layers.*.mlp.*", "model.norm.weight"))
SPLITS = {"adapters": ADAPTERS, "biases": TrainableConfig(tensors="biases"), "patterns": PATTERNS}
LAYOUTS = [
    Layout(tensor=2),
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual=2),
    Layout(context=2),
    Layout(data=2, zero=0),
    Layout(data=2),
    Layout(data=2, zero=2),
    Layout(data=2, zero=3),
]
SOME = [Layout(tensor=2, sequence=True), Layout(data=2, zero=3)]
MORE = [*SOME, Layout(pipeline=2, virtual=2)]


@pytest.fixture(scope="module")
def alone(worlds: RankPool, tiny_folder: Path) -> dict[str, Any]:
    return {
        name: worlds.run(Layout(), learn, None if name == "biases" else tiny_folder, split)[0]
        for name, split in SPLITS.items()
    }


@pytest.mark.parametrize(
    ("name", "layout"),
    every(SPLITS, LAYOUTS, part=lambda name, layout: layout in (MORE if name == "adapters" else SOME)),
    ids=str,
)
def test_a_layout_learns_the_same(
    name: str, layout: Layout, alone: dict[str, Any], worlds: RankPool, tiny_folder: Path
) -> None:
    history, held = alone[name]
    assert history[2][0] < history[0][0]
    results = worlds.run(layout, learn, None if name == "biases" else tiny_folder, SPLITS[name])
    for other, _ in results:
        np.testing.assert_allclose(other, history, rtol=2e-5)
    expected = {piece: array for piece, _, array in held}
    for piece, array in assembled([part for _, part in results], expected).items():
        np.testing.assert_allclose(array, expected[piece], rtol=1e-4, atol=1e-5, err_msg=piece)


def distance(logp_K: torch.Tensor, columns: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """From the reference."""
    loss = (columns.weight * (logp_K - columns.reference_logp).square()).sum()
    return loss, {"distance": loss}


def free_reference(groups: Groups, folder: Path, numerics: Numerics) -> tuple[list[Any], list[Any], list[Any]]:
    """Scores of the base, of new adapters, and of the base under adapters that have learned."""
    source = HuggingFaceFolder(folder)
    base = trainer_of(groups, source, source.config, TrainableConfig(), numerics=numerics)
    rows = rows_of_step(base, 0)
    expected = base.score(rows)
    trainer = trainer_of(groups, source, source.config, ADAPTERS, numerics=numerics)
    new = trainer.score(rows)
    assert trainer.is_base()
    assert not base.is_base()
    assert trainer.step(rows, distance, 1e-2, trainer.base).values["distance"] == 0
    steps(trainer, 2, rate=1e-2)
    assert trainer.step(rows, distance, 1e-9, trainer.base).values["distance"] > 1e-3
    assert not trainer.is_base()
    beneath = trainer.score(rows, trainer.base)
    assert (torch.cat(trainer.score(rows)) - torch.cat(expected)).abs().max() > 0.1
    return tuple([logp.numpy() for logp in scores] for scores in (expected, new, beneath))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("layout", "numerics"),
    every(
        [Layout(), *SOME],
        ["fast", "exact"],
        part=lambda layout, numerics: layout in SOME and (numerics == "fast") == (layout.zero == 3),
    ),
    ids=str,
)
def test_without_its_adapters_a_model_is_its_base_to_the_bit(
    layout: Layout, numerics: str, worlds: RankPool, tiny_folder: Path
) -> None:
    for expected, new, beneath in worlds.run(layout, free_reference, tiny_folder, numerics):
        assert expected
        for a, b, c in zip(expected, new, beneath, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, c)


def sent_and_scored(groups: Groups, folder: Path, dtype: str, numerics: Numerics) -> tuple[Any, Any, Any, Any]:
    """Losses and shards of a model that learns adapters, in two ways, and its scores."""
    source = HuggingFaceFolder(folder)
    trainer = trainer_of(groups, source, source.config, ADAPTERS, dtype, numerics)
    history = steps(trainer, 3, rate=1e-2)
    with trainer.engine.whole_weights():
        shards = shards_of(trainer.transformer)
        messages = [shard for message in messages_of(trainer.transformer, 3000) for shard in signed(message)]
        held = LocalWeights(trainer.transformer)
    copied = build(trainer.transformer.model, groups, DTYPES[dtype], held, numerics)
    rows = rows_of_step(trainer, 0)
    scores = [s.numpy() for s in trainer.score(rows)], [s.numpy() for s in trainer.score(rows, copied)]
    return history, shards, messages, scores


@pytest.mark.parametrize(
    ("layout", "dtype", "numerics"),
    [
        pytest.param(Layout(), "float32", "fast", marks=pytest.mark.exhaustive),
        pytest.param(Layout(), "bfloat16", "exact", marks=pytest.mark.exhaustive),
        (Layout(tensor=2), "float32", "fast"),
        (Layout(tensor=2), "bfloat16", "exact"),
    ],
    ids=str,
)
def test_rollouts_are_sent_weights_with_the_adapters_in_them(
    layout: Layout, dtype: str, numerics: Numerics, worlds: RankPool, tiny_folder: Path
) -> None:
    results = worlds.run(layout, sent_and_scored, tiny_folder, dtype, numerics)
    model = HuggingFaceFolder(tiny_folder).config
    for shards in ([s for r in results for s in r[1]], [s for r in results for s in r[2]]):
        assert not any(is_adapter(shard.name) for shard in shards)
        scored = worlds.run(layout, scores_of_shards, model, shards, dtype, numerics)
        for (_, _, _, (adapted, copied)), found in zip(results, scored, strict=True):
            for a, b, c in zip(adapted, found, copied, strict=True):
                np.testing.assert_array_equal(a, c)
                if numerics == "exact":
                    np.testing.assert_array_equal(a, b)
                else:
                    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def scores_of_shards(groups: Groups, model: ModelConfig, shards: Any, dtype: str, numerics: Numerics) -> list[Any]:
    trainer = trainer_of(groups, RandomWeights(model, 0), model, TrainableConfig(), dtype, numerics)
    receive(trainer.transformer, shards)
    return [scores.numpy() for scores in trainer.score(rows_of_step(trainer, 0))]


def exact_steps(groups: Groups, folder: Path) -> list[tuple[float, float]]:
    source = HuggingFaceFolder(folder)
    return steps(trainer_of(groups, source, source.config, ADAPTERS, "float32", "exact"), 3)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(Layout(), marks=pytest.mark.exhaustive), Layout(tensor=2, sequence=True)],
    ids=str,
)
def test_merged_weights_have_the_gradients_of_thin_products(
    layout: Layout, alone: dict[str, Any], worlds: RankPool, tiny_folder: Path
) -> None:
    for found in worlds.run(layout, exact_steps, tiny_folder):
        np.testing.assert_allclose(found, alone["adapters"][0], rtol=2e-4)


def save_after(groups: Groups, folder: Path, to: Path) -> list[tuple[float, float]]:
    """Losses of four steps, the second of which is saved."""
    source = HuggingFaceFolder(folder)
    trainer = trainer_of(groups, source, source.config, ADAPTERS)
    first = steps(trainer, 2)
    saver = Saver(to, rank=groups.rank, ranks=groups.layout.processes, barrier=torch.distributed.barrier)
    said = describe(trainer.transformer.model, groups.layout) | {"updates": trainer.engine.updates}
    saver.save(2, trainer.chunks(state=True), said, {})
    saver.close()
    return first + steps(trainer, 2)


def go_on(groups: Groups, saved: Path) -> list[tuple[float, float]]:
    checkpoint = Checkpoint(saved)
    trainer = trainer_of(groups, checkpoint, ModelConfig(**checkpoint.manifest["model"]), ADAPTERS)
    trainer.restore(checkpoint)
    return steps(trainer, 2)


def test_adapters_go_on_from_a_checkpoint_of_another_layout(
    worlds: RankPool, tiny_folder: Path, tmp_path: Path
) -> None:
    whole = worlds.run(Layout(tensor=2), save_after, tiny_folder, tmp_path)[0]
    np.testing.assert_allclose(worlds.run(Layout(pipeline=2), go_on, tmp_path)[0], whole[2:], rtol=2e-5)
    states = {name for name in Checkpoint(tmp_path).tensors if "/" in name}
    assert states
    assert all(is_adapter(name) for name in states)


def test_adapters_that_are_not_asked_for_are_merged(tiny_folder: Path) -> None:
    source = HuggingFaceFolder(tiny_folder)
    adapted, with_new = with_adapters(source.config, source, LORA, SEED)
    again, _ = with_adapters(adapted, with_new, LORA, SEED + 1)
    assert again == adapted
    other, _ = with_adapters(adapted, with_new, LoraConfig(rank=2), SEED)
    assert other.adapted == source.config.projections
    assert other.without_adapters == source.config
    plain, weights = merged(adapted, with_new)
    box = ((3, 9), (5, 20))
    assert plain == source.config
    np.testing.assert_array_equal(
        weights.read("model.layers.1.self_attn.q_proj.weight", box),
        source.read("model.layers.1.self_attn.q_proj.weight", box),
    )


def test_experts_and_what_a_model_lacks_have_no_adapters() -> None:
    experts = BIASED.model_copy(
        update={"biases": (), "moe": MoEConfig(experts=4, experts_per_token=2, intermediate=40)}
    )
    with pytest.raises(ValueError, match="experts have no adapters: name the projections of attention"):
        with_adapters(experts, RandomWeights(experts, 0), LoraConfig(), SEED)
    with pytest.raises(ValueError, match="names gate_proj, and adapters are for q_proj, k_proj, v_proj, o_proj"):
        with_adapters(experts, RandomWeights(experts, 0), LoraConfig(targets=("q_proj", "gate_proj")), SEED)
    assert with_adapters(experts, RandomWeights(experts, 0), LoraConfig(targets=("q_proj",)), SEED)[0].adapted == (
        "q_proj",
    )
    plain = BIASED.model_copy(update={"gated": False})
    with pytest.raises(ValueError, match="names gate_proj, and adapters are for q_proj"):
        with_adapters(plain, RandomWeights(plain, 0), LoraConfig(targets=("gate_proj",)), SEED)


def test_a_declaration_that_chooses_nothing_is_refused(groups: Groups, tiny_folder: Path) -> None:
    source = HuggingFaceFolder(tiny_folder)

    def refused(*tensors: str) -> str:
        given = tensors[0] if tensors == ("biases",) else tensors
        with pytest.raises(NothingLearns) as error:
            trainer_of(groups, source, source.config, TrainableConfig(tensors=given))
        return str(error.value)

    assert "has no biases" in refused("biases")
    assert "'layers.*' is the name of no tensor" in refused("layers.*")
    assert "q_proj.weight and model.layers.0.self_attn.v_proj.weight lie in one" in refused("*.q_proj.weight")


def test_parts_that_learn_nothing_on_a_stage_are_refused(worlds: RankPool, tiny_folder: Path) -> None:
    first = TrainableConfig(tensors=("model.layers.0.*",))
    with pytest.raises(WorldFailed, match="choose tensors of all pipeline stages"):
        worlds.run(Layout(pipeline=2), learn, tiny_folder, first)


def test_a_critic_learns_its_head_beside_adapters(tiny_folder: Path, groups: Groups) -> None:
    source = HuggingFaceFolder(tiny_folder)
    model, start = with_adapters(source.config, source, LORA, SEED)
    stage = build(model, groups, torch.float32, start, head="value")
    trainer = Trainer(stage, groups, OptimizerConfig(), config=TrainerConfig(trainable=ADAPTERS))
    learns = {
        piece.name
        for parameter, held in pieces_by_parameter(trainer.transformer).items()
        for piece in held
        if parameter.requires_grad
    }
    assert VALUE in learns
    assert all(is_adapter(name) for name in learns - {VALUE})
    assert len(learns) == 1 + 2 * len(model.adapted) * model.layers
