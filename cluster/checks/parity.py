"""Compares layouts: each trains on the same data from the same weights, and must agree with one process.

Floating-point sums depend on their order, so no two layouts agree to the last bit. How far apart they may be is
measured in the same breath: one process takes its micro-batches in another order, and what that changes is the noise
floor. Where a token's probabilities of two experts are equal but for rounding, layouts choose differently and go ways
of their own: steps are compared up to there.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.table import Table

from lockstep.cluster.checks.expert_ties import Routing, RoutingWatch, tie
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import parse_layout
from lockstep.cluster.recipe.model_source import starting_point
from lockstep.cluster.recipe.schema import Recipe
from lockstep.data.corpus.loader import PretrainingConfig, PretrainingData
from lockstep.data.corpus.synthetic import random_text
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.saver import Saver
from lockstep.distributed.checkpoint.tensors import to_numpy, whole
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig, check_layout, describe
from lockstep.model.formats.lockstep import write_checkpoint
from lockstep.model.formats.registry import ModelContents
from lockstep.model.loading import DTYPES, build
from lockstep.model.objectives.token_loss import nll
from lockstep.model.state_dict import pieces
from lockstep.model.training.config import PretrainConfig, TrainerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.names import logical_tensors

FP32_BOUND = {"loss": 2e-5, "norm": 2e-5, "weights": 1e-4}
"""Largest relative differences in fp32."""
FLOORS = 3.0
"""In any dtype, differences of up to so many noise floors are noise."""
TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Job:
    """What every layout trains: model, first weights, data, steps."""

    model: ModelConfig
    start: Path
    dtype: str
    pretrain: PretrainConfig
    data: PretrainingConfig
    trainer: TrainerConfig
    seed: int
    steps: int
    until: int
    """The last step that is trained; the learning rate falls as if all were."""


@dataclass(frozen=True)
class Course:
    """Loss and gradient norm of each step in one world; and, for weights, how far they are from the baseline's."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    weights: float = 0.0
    worst: str = ""
    """The logical tensor that differs most."""
    routing: tuple[Routing, ...] = ()
    """What this rank saw of routers' choices in each step."""


@dataclass(frozen=True)
class Difference:
    """Largest relative differences from one process, in loss, gradient norm and weights."""

    loss: float
    norm: float
    weights: float
    worst: str
    tie: tuple[int, int] | None = None
    """Step and layer of the choice between equally probable experts that ended the comparison, one step before."""

    def beyond(self, bound: dict[str, float]) -> list[str]:
        """The names of the quantities that exceed a bound; one that is NaN does."""
        return [name for name, limit in bound.items() if not getattr(self, name) <= limit]


@dataclass(frozen=True)
class Parity:
    """The differences of all layouts, beside the noise floor and the bound."""

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
    start = starting_point(recipe.model, recipe.seed)
    for layout in wanted.values():
        check_layout(layout, start.config)
    with tempfile.TemporaryDirectory() as folder, RankPool(TIMEOUT_S) as worlds:
        runs = Runs(worlds, job_of(recipe, start, steps, Path(folder)), Path(folder))
        floor = runs.difference(Layout(), reordered=True)
        bound = _bound(recipe.model.dtype, floor)
        found = {}
        for text, layout in wanted.items():
            found[text] = runs.difference(layout)
            say(f"{text}: {_figures(found[text])}")
    return Parity(floor, bound, found)


def _figures(d: Difference) -> str:
    tied = f" before experts tie in step {d.tie[0]}, layer {d.tie[1]}" if d.tie else ""
    return f"loss {d.loss:.1e}, norm {d.norm:.1e}, weights {d.weights:.1e}{tied}"


class Runs:
    """Trains layouts, and one process for as many steps as each layout is compared with it."""

    def __init__(self, worlds: RankPool, job: Job, folder: Path) -> None:
        self._worlds, self._job, self._folder = worlds, job, folder
        self._baselines: dict[int, Course] = {}

    def difference(self, layout: Layout, reordered: bool = False) -> Difference:
        """Train a layout and compare it with one process, up to the step before experts tie."""
        job, tied = self._job, None
        while True:
            one = self._baseline(job)
            ranks = self._worlds.run(layout, course, job, self._saved(job), reordered, False)
            # In lower precision experts tie all the time: that is part of the noise.
            found = _first_tie(one, ranks) if job.dtype == "float32" else None
            if found is None:
                return replace(difference(one, ranks), tie=tied)
            if found[0] == 1:
                raise RecipeError(
                    f"seed={job.seed} begins with weights for which experts tie in layer {found[1]}: choose another"
                )
            tied, job = found, replace(job, until=found[0] - 1)

    def _baseline(self, job: Job) -> Course:
        if job.until not in self._baselines:
            self._baselines[job.until] = self._worlds.run(Layout(), course, job, self._saved(job), False, True)[0]
        return self._baselines[job.until]

    def _saved(self, job: Job) -> Path:
        return self._folder / f"baseline-{job.until}"


def _first_tie(one: Course, ranks: Sequence[Course]) -> tuple[int, int] | None:
    """Step and layer where ranks leave the baseline's way because experts tie."""
    for step, (expected, *found) in enumerate(zip(one.routing, *(c.routing for c in ranks), strict=True), 1):
        if (layer := tie(expected, found)) is not None:
            return step, layer
    return None


def job_of(recipe: Recipe, start: ModelContents, steps: int, folder: Path) -> Job:
    """What every layout trains: the recipe's text from the weights that it starts from, both written to a folder.

    Raises:
        RecipeError: when the recipe trains on problems.
    """
    pretrain, model = recipe.pretrain, start.config
    if pretrain is None:
        raise RecipeError("lockstep parity trains on text: give a recipe with a [pretrain] section")
    if pretrain.retain:
        raise RecipeError("lockstep parity compares plain training: give a recipe without [pretrain.retain]")
    return Job(
        model=model,
        start=write_checkpoint(start.source, model, {}, folder / "start"),
        dtype=recipe.model.dtype,
        pretrain=pretrain,
        data=pretrain.data
        or random_text(
            folder / "random",
            vocabulary=model.vocabulary,
            context=model.context,
            samples_per_step=pretrain.samples_per_step,
            seed=recipe.seed,
        ),
        trainer=recipe.trainer,
        seed=recipe.seed,
        steps=steps,
        until=steps,
    )


def course(groups: Groups, job: Job, baseline: Path, reordered: bool, is_baseline: bool) -> Course:
    """Train on one rank; the baseline saves its weights, all other layouts compare theirs with them."""
    stage = build(job.model, groups, DTYPES[job.dtype], manager.Checkpoint(job.start))
    trainer = Trainer(stage, groups, job.pretrain.optimizer, config=job.trainer)
    data = PretrainingData(job.data, seed=job.seed, vocabulary=job.model.vocabulary)
    rules = row_rules(groups.layout, job.trainer.row_tokens, job.model)
    watch = RoutingWatch(trainer.transformer)
    losses, norms, routing = [], [], []
    for step in range(1, job.until + 1):
        rows = data.rows(job.pretrain.schedule.samples(step), rules, groups.data_rank)
        rate = job.pretrain.optimizer.rate(step, job.steps)
        rows = rows[::-1] if reordered else rows
        result = trainer.step(rows, nll, rate, z_coefficient=job.pretrain.z_coefficient)
        losses.append(result.values["loss"])
        norms.append(result.grad_norm)
        routing.append(watch.taken())
    with trainer.engine.whole_weights():
        if is_baseline:
            Saver(baseline).save(0, trainer.chunks(state=False), describe(job.model, groups.layout), {})
            return Course(tuple(losses), tuple(norms), routing=tuple(routing))
        weights, worst = _farthest(trainer, manager.Checkpoint(baseline), job.model)
    return Course(tuple(losses), tuple(norms), weights, worst, tuple(routing))


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
    """A table of the comparison for a terminal."""
    shown = Table(title="largest relative difference from one process")
    shown.add_column("layout", overflow="fold")
    for heading in ("loss", "gradient norm", "weights"):
        shown.add_column(heading, justify="right")
    shown.add_column("worst tensor", overflow="fold")
    shown.add_column("")
    rows = {"micro-batches reordered (noise floor)": (parity.floor, _compared(parity.floor))}
    rows |= {text: (d, _verdict(d, parity.bound)) for text, d in parity.layouts.items()}
    for text, (d, verdict) in rows.items():
        shown.add_row(text, f"{d.loss:.1e}", f"{d.norm:.1e}", f"{d.weights:.1e}", d.worst, verdict)
    shown.add_section()
    shown.add_row("bound", *(f"{limit:.1e}" for limit in parity.bound.values()), "", "")
    return shown


def _verdict(found: Difference, bound: dict[str, float]) -> str:
    beyond = found.beyond(bound)
    return (f"beyond in {', '.join(beyond)}" if beyond else "same") + _compared(found)


def _compared(found: Difference) -> str:
    return f" in {found.tie[0] - 1} steps, then experts tie" if found.tie else ""
