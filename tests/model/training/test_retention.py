"""L2 and EWC: in every layout and dtype the same numbers as one process by hand, and a resumed run loses no bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.data.corpus.loader import PretrainingConfig, PretrainingData
from lockstep.data.corpus.synthetic import write_random_store
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.saver import CheckpointConfig, Saver
from lockstep.distributed.layout import Layout
from lockstep.distributed.optimizer.weight_penalty import MissingOldWeights, Stiffness
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import LoraConfig, ModelConfig, MoEConfig, describe
from lockstep.model.loading import DTYPES, build
from lockstep.model.objectives.token_loss import nll
from lockstep.model.state_dict import pieces
from lockstep.model.training.config import OptimizerConfig, PretrainConfig, TrainerConfig, row_rules
from lockstep.model.training.device_batch import DeviceRows
from lockstep.model.training.pretraining import Pretraining
from lockstep.model.training.trainable import TrainableConfig
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.initialization import RandomWeights
from tests.parameters import every

L2, EWC, SAMPLES, STEPS = 0.3, 40.0, 3, 3
LAYOUTS = [
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2),
    Layout(context=2),
    Layout(expert=2, zero=2),
    *(Layout(data=2, zero=stage) for stage in range(4)),
    Layout(data=2, zero=1, offload=True),
    Layout(data=2, zero=3, offload=True),
    Layout(tensor=2, data=2, zero=2),
    Layout(pipeline=2, data=2, zero=1),
]
QUICK = {(layout, "float32") for layout in LAYOUTS if layout.processes == 2 and layout.context == 1} | {
    (Layout(data=2, zero=2), "bfloat16")
}
Course = tuple[list[tuple[float, float, float]], dict[str, np.ndarray[Any, Any]]]


def model(*, moe: bool = False, lora: bool = False) -> ModelConfig:
    """A tiny transformer whose embedding two stages share, or one with experts."""
    return ModelConfig(
        layers=2,
        width=32,
        heads=4,
        kv_heads=2,
        head_dim=8,
        intermediate=48,
        vocabulary=61,
        context=32,
        tied=not moe,
        moe=MoEConfig(experts=4, experts_per_token=2, intermediate=24) if moe else None,
        lora=LoraConfig(rank=2) if lora else None,
    )


def config(stores: Path, **retain: Any) -> PretrainConfig:
    old = {"old": [{"path": str(stores / "old")}]} if {"ewc", "replay"} & retain.keys() else {}
    return PretrainConfig.model_validate(
        {
            "steps": STEPS,
            "samples_per_step": 4,
            "optimizer": {"learning_rate": 1e-2, "clip_norm": 0.5},
            "data": {"blend": [{"path": str(stores / "new")}], "length": 16},
            "retain": retain | old or None,
        }
    )


def trainer_of(groups: Groups, dtype: str, optimizer: OptimizerConfig, source: Any = None, **given: Any) -> Trainer:
    shape = model(**given)
    stage = build(shape, groups, DTYPES[dtype], source or RandomWeights(shape, 0, deviation=0.2))
    trained = TrainerConfig(trainable=TrainableConfig(lora=shape.lora))
    return Trainer(stage, groups, optimizer, config=trained)


def opened(data: PretrainingConfig | None) -> PretrainingData:
    assert data
    return PretrainingData(data, seed=0, vocabulary=61)


def weights(trainer: Trainer) -> dict[str, np.ndarray[Any, Any]]:
    """This rank's pieces, by name and place."""
    with trainer.engine.whole_weights():
        return {f"{p.name} {p.box}": p.view(t).detach().float().numpy().copy() for t, p in pieces(trainer.transformer)}


def pretraining(trainer: Trainer, given: PretrainConfig, done: int = 0) -> Pretraining:
    old = opened(given.old_data) if given.old_data else None
    rules = row_rules(trainer.groups.layout, 32)
    return Pretraining(trainer, given, opened(given.training_data), rules, done, None, old)


def steps(run: Pretraining, first: int, last: int) -> list[tuple[float, float, float]]:
    results = [run.step(step) for step in range(first, last + 1)]
    run.close()
    return [(r.values["loss"], r.grad_norm, r.values["retain_penalty"]) for r in results]


def held(groups: Groups, stores: Path, dtype: str, moe: bool) -> Course:
    given = config(stores, l2=L2, ewc=EWC, fisher_samples=SAMPLES)
    trainer = trainer_of(groups, dtype, given.optimizer, moe=moe)
    return steps(pretraining(trainer, given), 1, STEPS), weights(trainer)


def by_hand(groups: Groups, stores: Path) -> list[tuple[float, float, float]]:
    """The same in plain PyTorch on one process: autograd of the data's loss and of the penalty, Adam, clipping."""
    given = config(stores, l2=L2, ewc=EWC, fisher_samples=SAMPLES)
    trainer = trainer_of(groups, "float32", given.optimizer)
    parameters = [p for p in trainer.transformer.parameters() if p.requires_grad]
    forward, old = trainer._scorer(), opened(given.old_data)

    def gradients(data: PretrainingData, samples: range) -> tuple[float, list[torch.Tensor]]:
        rows = data.rows(samples, row_rules(groups.layout, 32))
        loss = torch.zeros(())
        for batch in DeviceRows(trainer.stage, groups, rows):
            loss = loss + nll(forward(trainer.transformer, batch, None, 0)[0], batch.loss_inputs)[0]
        return loss.item(), list(torch.autograd.grad(loss, parameters))

    counts = [old.predictions(range(n, n + 1)) for n in range(SAMPLES)]
    fisher = [torch.zeros_like(p) for p in parameters]
    for number, count in enumerate(counts):
        for total, gradient in zip(fisher, gradients(old, range(number, number + 1))[1], strict=True):
            total += (count * gradient).square() / sum(counts)
    kept, new = [p.detach().clone() for p in parameters], opened(given.data)
    adam = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    found = []
    for step in range(STEPS):
        loss, of_data = gradients(new, range(4 * step, 4 * step + 4))
        trio = zip(parameters, kept, fisher, strict=True)
        penalty = sum((((L2 + EWC * f) / 2 * (p - old).square()).sum() for p, old, f in trio), torch.zeros(()))
        of_weights = torch.autograd.grad(penalty, parameters)
        for p, a, b in zip(parameters, of_data, of_weights, strict=True):
            p.grad = a + b
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, 0.5))
        adam.step()
        found.append((loss + penalty.item(), norm, penalty.item()))
    return found


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    for seed, name in enumerate(("new", "old"), start=1):
        write_random_store(folder / name, vocabulary=61, tokens=3000, seed=seed)
    return folder


@pytest.fixture(scope="module")
def alone(worlds: RankPool, stores: Path) -> dict[tuple[bool, str], Course]:
    """One process, with experts and without."""
    cases = [(False, "float32"), (False, "bfloat16"), (True, "float32")]
    return {(moe, dtype): worlds.run(Layout(), held, stores, dtype, moe)[0] for moe, dtype in cases}


def test_one_process_does_what_autograd_of_the_whole_loss_says(
    alone: dict[tuple[bool, str], Course], worlds: RankPool, stores: Path
) -> None:
    expected = np.array(worlds.run(Layout(), by_hand, stores)[0])
    np.testing.assert_allclose(np.array(alone[False, "float32"][0]), expected, rtol=2e-5, atol=1e-9)
    assert expected[0, 2] == 0
    assert expected[-1, 2] > 1e-3


@pytest.mark.parametrize(
    ("layout", "dtype"),
    every(LAYOUTS, ["float32", "bfloat16"], part=lambda layout, dtype: (layout, dtype) in QUICK),
    ids=str,
)
def test_the_penalty_is_the_same_in_every_layout(
    layout: Layout, dtype: str, worlds: RankPool, stores: Path, alone: dict[tuple[bool, str], Course]
) -> None:
    if (layout.expert > 1, dtype) not in alone:
        pytest.skip("experts in bf16 tie, and then choose otherwise")
    losses, expected = alone[layout.expert > 1, dtype]
    rtol, atol = (2e-5, 1e-9) if dtype == "float32" else (5e-2, 1e-4)
    for found, held_here in worlds.run(layout, held, stores, dtype, layout.expert > 1):
        np.testing.assert_allclose(np.array(found), np.array(losses), rtol=rtol, atol=atol)
        common = held_here.keys() & expected.keys()
        assert common
        for name in common if dtype == "float32" else ():
            np.testing.assert_allclose(held_here[name], expected[name], rtol=0, atol=2e-5)


def resumed(groups: Groups, stores: Path, folder: Path, dtype: str) -> tuple[Course, Course, list[str]]:
    """A run that is not disturbed, and one that is saved after a step and goes on in new objects."""
    given = config(stores, l2=L2, ewc=EWC, fisher_samples=SAMPLES)
    whole = trainer_of(groups, dtype, given.optimizer)
    undisturbed = steps(pretraining(whole, given), 1, STEPS)
    first = trainer_of(groups, dtype, given.optimizer)
    begun = pretraining(first, given)
    begun.step(1)
    begun.close()
    saver = Saver(
        folder, CheckpointConfig(), rank=groups.rank, ranks=groups.layout.processes, barrier=torch.distributed.barrier
    )
    said = describe(first.transformer.model, groups.layout) | {"updates": first.engine.updates}
    saver.save(1, first.chunks(state=True), said, {}, wait=True)
    checkpoint = Checkpoint(folder)
    second = trainer_of(groups, dtype, given.optimizer, source=checkpoint)
    second.restore(checkpoint)
    after = steps(pretraining(second, given, done=1), 2, STEPS)
    return (undisturbed[1:], weights(whole)), (after, weights(second)), list(checkpoint.states)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    every(
        [Layout(pipeline=2), *(Layout(data=2, zero=stage) for stage in range(4))],
        ["float32", "bfloat16"],
        part=lambda layout, dtype: (layout.zero == 3) == (dtype == "bfloat16") and layout.zero > 1,
    ),
    ids=str,
)
def test_a_resumed_run_finds_old_weights_and_fisher_information_again(
    layout: Layout, dtype: str, worlds: RankPool, stores: Path, tmp_path: Path
) -> None:
    for undisturbed, after, states in worlds.run(layout, resumed, stores, tmp_path, dtype):
        assert undisturbed[0] == after[0]
        for name, expected in undisturbed[1].items():
            np.testing.assert_array_equal(after[1][name], expected)
        assert {name.split("/")[0] for name in states} >= {"old", "fisher"}


def adapters(groups: Groups, stores: Path) -> tuple[dict[str, Any], dict[str, Any], list[tuple[float, float, float]]]:
    given = config(stores, l2=L2)
    trainer = trainer_of(groups, "float32", given.optimizer, lora=True)
    before = weights(trainer)
    history = steps(pretraining(trainer, given), 1, 2)
    return before, weights(trainer), history


def test_adapters_alone_are_held(worlds: RankPool, stores: Path) -> None:
    before, after, history = worlds.run(Layout(), adapters, stores)[0]
    moved = sum(np.square(after[name].astype(np.float64) - before[name]).sum() for name in before)
    assert 0 < history[1][2] < moved * L2 / 2
    assert all("lora" in name for name in before if (after[name] != before[name]).any())


def without_old_weights(groups: Groups, stores: Path) -> str:
    trainer = trainer_of(groups, "float32", config(stores, l2=L2).optimizer)
    with pytest.raises(MissingOldWeights, match="'old' state") as error:
        trainer.engine.penalty.pull(Stiffness(l2=1.0))
    trainer.remember((), 0)
    with pytest.raises(MissingOldWeights, match="'fisher' state"):
        trainer.engine.penalty.pull(Stiffness(ewc=1.0))
    return str(error.value)


def test_a_penalty_needs_what_it_is_a_distance_from(worlds: RankPool, stores: Path) -> None:
    assert "resume from a checkpoint" in worlds.run(Layout(), without_old_weights, stores)[0]


def test_replay_is_an_exact_share_of_the_samples(stores: Path) -> None:
    data = opened(config(stores, replay=0.25).training_data)
    assert data.blend.counts(400) == [300, 100]
    assert config(stores, l2=1.0).training_data == config(stores, l2=1.0).data


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ewc": 1.0}, "ewc needs old data"),
        ({"l2": 1.0, "old": [{"path": "a"}]}, "old is read by ewc and replay"),
        ({"l2": 1.0, "fisher_samples": 3}, "fisher_samples=3 is of ewc"),
        ({"replay": 0.5, "old": [{"path": "a"}]}, "beside new text"),
    ],
)
def test_a_declaration_that_lacks_something_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PretrainConfig.model_validate({"steps": 1, "retain": given})
