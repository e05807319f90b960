"""Do layouts compute the same? Each trains on the same data from the same weights, and is compared with one process.

Floating-point sums depend on their order, so no two layouts agree to the last bit. How far apart they may be is
measured in the same breath: one process takes its micro-batches in another order, and what that changes is the noise
floor.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from rich.table import Table

from lockstep.cluster.config import Recipe, RecipeError, parse_layout
from lockstep.cluster.convert import starting_point, write_checkpoint
from lockstep.data.loader import PretrainingConfig, PretrainingData
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.spec import Source, to_numpy, whole
from lockstep.distributed.groups import Groups
from lockstep.distributed.layout import Layout
from lockstep.distributed.worlds import Worlds
from lockstep.model.config import ModelConfig
from lockstep.model.loss import nll
from lockstep.model.names import logical_tensors, pieces
from lockstep.model.pretrain import PretrainConfig, random_data
from lockstep.model.train import DTYPES, Trainer, TrainerConfig, build, describe, row_rules
from lockstep.model.transformer import check_layout

FP32_BOUND = {"loss": 2e-5, "norm": 2e-5, "weights": 1e-4}
"""Largest relative differences in fp32."""
FLOORS = 3.0
"""In any dtype, differences of up to so many noise floors are noise."""
TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Job:
    """What every layout trains."""

    model: ModelConfig
    start: Path
    dtype: str
    pretrain: PretrainConfig
    data: PretrainingConfig
    trainer: TrainerConfig
    seed: int
    steps: int


@dataclass(frozen=True)
class Course:
    """What a world saw: loss and gradient norm of each step; and, for weights, how far they are from the baseline's."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    weights: float = 0.0
    worst: str = ""
    """The logical tensor that differs most."""


@dataclass(frozen=True)
class Difference:
    """Largest relative differences from one process."""

    loss: float
    norm: float
    weights: float
    worst: str

    def beyond(self, bound: dict[str, float]) -> list[str]:
        """What lies outside of a bound; a difference that is not a number does."""
        return [name for name, limit in bound.items() if not getattr(self, name) <= limit]


@dataclass(frozen=True)
class Parity:
    """A comparison of layouts."""

    floor: Difference
    bound: dict[str, float]
    layouts: dict[str, Difference]

    @property
    def holds(self) -> bool:
        """Whether every layout stays within the bound."""
        return not any(d.beyond(self.bound) for d in self.layouts.values())


def compare(recipe: Recipe, layouts: Sequence[str], steps: int, say: Callable[[str], None]) -> Parity:
    """Train `steps` steps in one process and in each layout, given as "tensor=2,zero=2".

    Raises:
        ValueError: one sentence on a recipe or a layout that cannot run.
    """
    wanted = {text: parse_layout(text) for text in layouts}
    source, model, _ = starting_point(recipe.model, recipe.seed)
    for layout in wanted.values():
        check_layout(layout, model)
    with tempfile.TemporaryDirectory() as folder, Worlds(TIMEOUT_S) as worlds:
        job = _job(recipe, source, model, steps, Path(folder))
        baseline = Path(folder) / "baseline"
        one = worlds.run(Layout(), course, job, baseline, False, True)[0]
        floor = difference(one, worlds.run(Layout(), course, job, baseline, True, False))
        bound = _bound(recipe.model.dtype, floor)
        found = {}
        for text, layout in wanted.items():
            found[text] = difference(one, worlds.run(layout, course, job, baseline, False, False))
            say(f"{text}: loss {found[text].loss:.1e}, norm {found[text].norm:.1e}, weights {found[text].weights:.1e}")
    return Parity(floor, bound, found)


def _job(recipe: Recipe, source: Source, model: ModelConfig, steps: int, folder: Path) -> Job:
    pretrain = recipe.pretrain
    if pretrain is None:
        raise RecipeError("lockstep parity trains on text: give a recipe with a [pretrain] section")
    return Job(
        model=model,
        start=write_checkpoint(source, model, {}, folder / "start"),
        dtype=recipe.model.dtype,
        pretrain=pretrain,
        data=pretrain.data or random_data(folder / "random", model, pretrain, recipe.seed),
        trainer=recipe.trainer,
        seed=recipe.seed,
        steps=steps,
    )


def course(groups: Groups, job: Job, baseline: Path, reordered: bool, is_baseline: bool) -> Course:
    """One rank of a world that trains; the baseline's weights are saved, all others are compared with them."""
    stage = build(job.model, groups, DTYPES[job.dtype], manager.Checkpoint(job.start))
    trainer = Trainer(stage, groups, job.pretrain.optimizer, recompute=job.trainer.recompute)
    data = PretrainingData(job.data, seed=job.seed, vocabulary=job.model.vocabulary)
    rules = row_rules(groups.layout, job.trainer.row_tokens)
    losses, norms = [], []
    for step in range(1, job.steps + 1):
        rows = data.rows(job.pretrain.schedule.samples(step), rules, groups.data_rank)
        rate = job.pretrain.optimizer.rate(step, job.steps)
        rows = rows[::-1] if reordered else rows
        result = trainer.step(rows, nll, rate, z_coefficient=job.pretrain.z_coefficient)
        losses.append(result.values["loss"])
        norms.append(result.grad_norm)
    with trainer.engine.whole_weights():
        if is_baseline:
            manager.save(
                baseline,
                0,
                pieces(trainer.transformer),
                describe(job.model, groups.layout),
                {},
                rank=groups.rank,
                barrier=dist.barrier,
            )
            return Course(tuple(losses), tuple(norms))
        weights, worst = _farthest(trainer, manager.Checkpoint(baseline), job.model)
    return Course(tuple(losses), tuple(norms), weights, worst)


def _farthest(trainer: Trainer, baseline: manager.Checkpoint, model: ModelConfig) -> tuple[float, str]:
    """The largest |Δw| of this rank's pieces over the largest |w| of their tensor, or its root mean square over all."""
    largest, squares = {}, []
    for name, shape in logical_tensors(model).items():
        theirs = np.asarray(baseline.read(name, whole(shape)), np.float64)
        largest[name] = np.abs(theirs).max()
        squares.append(np.square(theirs).mean())
    typical = math.sqrt(np.mean(squares))
    found = [(0.0, "")]
    for parameter, piece in pieces(trainer.transformer):
        ours, theirs = to_numpy(piece.view(parameter)), baseline.read(piece.name, piece.box)
        far = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)).max()
        found.append((float(far / max(largest[piece.name], typical)), piece.name))
    return max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])


def difference(one: Course, ranks: Sequence[Course]) -> Difference:
    """The largest relative differences of any rank from the baseline."""
    worst = max(ranks, key=lambda c: math.inf if math.isnan(c.weights) else c.weights)
    return Difference(
        loss=_relative([c.losses for c in ranks], one.losses),
        norm=_relative([c.norms for c in ranks], one.norms),
        weights=worst.weights,
        worst=worst.worst,
    )


def _relative(found: Sequence[Sequence[float]], expected: Sequence[float]) -> float:
    """The largest relative difference of any rank at any step; not a number where one of them is not."""
    return float(np.max(np.abs(np.subtract(found, expected)) / np.maximum(np.abs(expected), 1e-12)))


def _bound(dtype: str, floor: Difference) -> dict[str, float]:
    fixed = FP32_BOUND if dtype == "float32" else dict.fromkeys(FP32_BOUND, 0.0)
    return {name: max(limit, FLOORS * getattr(floor, name)) for name, limit in fixed.items()}


def table(parity: Parity) -> Table:
    """The comparison for a terminal."""
    shown = Table(title="largest relative difference from one process")
    shown.add_column("layout", overflow="fold")
    for heading in ("loss", "gradient norm", "weights"):
        shown.add_column(heading, justify="right")
    shown.add_column("worst tensor", overflow="fold")
    shown.add_column("")
    rows = {"micro-batches reordered (noise floor)": (parity.floor, "")}
    rows |= {
        t: (d, f"beyond in {', '.join(b)}" if (b := d.beyond(parity.bound)) else "same")
        for t, d in parity.layouts.items()
    }
    for text, (d, verdict) in rows.items():
        shown.add_row(text, f"{d.loss:.1e}", f"{d.norm:.1e}", f"{d.weights:.1e}", d.worst, verdict)
    shown.add_section()
    shown.add_row("bound", *(f"{limit:.1e}" for limit in parity.bound.values()), "", "")
    return shown
