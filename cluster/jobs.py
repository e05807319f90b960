"""What `lockstep train` does: places the actors, runs the phases of a recipe, and keeps the record."""

import logging
import os
import platform
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import ray
from rich.console import Console

from lockstep.cluster.config import Recipe, RecipeError, to_toml
from lockstep.cluster.convert import write_checkpoint
from lockstep.cluster.display import Progress
from lockstep.cluster.pretraining import run_pretraining
from lockstep.cluster.records import RunFolder
from lockstep.cluster.report import write_report
from lockstep.cluster.sources import OpenModel, starting_point
from lockstep.cluster.tracing import traced
from lockstep.data.loader import PretrainingData
from lockstep.data.problems import Split, make_split
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.layout import Layout
from lockstep.model.config import ModelConfig, check_layout, check_numerics
from lockstep.model.recipes import OptimizerConfig
from lockstep.rl.actors import Policy, Rollouts, Verifiers, gather, threads_for
from lockstep.rl.controller import Controller, StepRecord
from lockstep.rl.types import Scored
from lockstep.rl.verifiers.verdict import Outcome

SHUTDOWN_S = 5.0
"""How long processes may take to end by themselves when a run ends."""


class Interruption:
    """The first Ctrl-C or SIGTERM ends a run as KeyboardInterrupt; later ones are ignored, so that cleaning up ends."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.getsignal(number) for number in self.SIGNALS}
        self._interrupted = False
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Take the signals over; again after something else took them, as `ray.init` does."""
        for number in self.SIGNALS:
            signal.signal(number, self._interrupt)

    def _interrupt(self, *_: object) -> None:
        if not self._interrupted:
            self._interrupted = True
            raise KeyboardInterrupt


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """A connection to the Ray cluster at `address`, or to one that is started here and stopped at the end."""
    joined = address or os.environ.get("RAY_ADDRESS")
    try:
        _connect(joined)
        yield
    finally:
        started = [] if joined else psutil.Process().children(recursive=True)
        ray.shutdown()
        _end(started)


def _connect(address: str | None) -> None:
    """`ray.init`; once more where a busy machine does not start a cluster within the 30 s that Ray grants it."""
    for attempt in (1, 2):
        try:
            ray.init(
                address=address,
                include_dashboard=False if address is None else None,
                log_to_driver=True,
                logging_level=logging.ERROR,
                configure_logging=True,
            )
            return
        except Exception as error:
            if attempt == 2 or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


def _end(processes: Sequence[psutil.Process]) -> None:
    """Wait for processes, then kill those that stay: actors may outlive the daemons that started them."""
    _, alive = psutil.wait_procs(processes, timeout=SHUTDOWN_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=SHUTDOWN_S)


def check(recipe: Recipe) -> OpenModel:
    """The model that a recipe starts from.

    Refuses, before anything is written, a layout that the model does not divide by or that has no exact numerics where
    they are asked for, and text that cannot be read.

    Raises:
        ValueError: one sentence on what does not fit.
    """
    start = _, model, files = starting_point(recipe.model, recipe.seed)
    check_layout(recipe.layout, model)
    check_layout(Layout(tensor=recipe.rollout.tensor), model)
    check_numerics(recipe.model.numerics, recipe.layout, model)
    if recipe.pretrain and recipe.pretrain.data:
        if recipe.pretrain.data.length > model.context:
            raise RecipeError(
                f"pretrain.data.length={recipe.pretrain.data.length} is longer than the model's context of "
                f"{model.context} tokens: shorten it, or give a model with a longer context"
            )
        tokenizer = Tokenizer(files).digest if files else None
        PretrainingData(recipe.pretrain.data, seed=recipe.seed, vocabulary=model.vocabulary, tokenizer=tokenizer)
    return start


def train(
    recipe: Recipe, console: Console, *, address: str | None = None, profile: bool = False, resume: bool = False
) -> Path:
    """Run all phases of a recipe; returns the run's folder, with its report written.

    Args:
        profile: trace a few steps of the trainer.
        resume: go on with the run that lies there from its last checkpoint, where it has saved one.

    Raises:
        ValueError: when the recipe does not fit its model; nothing is written then.
    """
    start = check(recipe)
    last = last_checkpoint(recipe, start[1]) if resume else None
    split = None if recipe.pretrain else make_split(recipe.task, recipe.seed)
    traces = recipe.folder / "traces" if profile else None
    with Interruption() as interruption:
        run = RunFolder.resume(recipe.folder) if last else RunFolder.create(recipe.folder, to_toml(recipe), recipe.name)
        try:
            with run, Progress(console) as progress:
                _describe(run, split)
                with ray_cluster(address):
                    interruption.listen()
                    if split is None:
                        run_pretraining(recipe, start, run, progress, traces, last)
                    else:
                        _run_phases(recipe, start, split, run, progress, traces)
        finally:
            write_report(recipe.folder)
    return recipe.folder


def last_checkpoint(recipe: Recipe, model: ModelConfig) -> manager.Checkpoint | None:
    """What a run goes on from, or None where it has saved nothing.

    Raises:
        RecipeError: when the recipe is not one that can go on from there.
    """
    if recipe.pretrain is None:
        raise RecipeError("--resume goes on with runs that train on text: give a recipe with a [pretrain] section")
    if not manager.saved(recipe.folder / "checkpoints"):
        return None
    last = manager.Checkpoint(recipe.folder / "checkpoints")
    for key, there, here in (
        ("model", ModelConfig(**last.manifest["model"]), model),
        ("pretrain.optimizer.kind", last.manifest.get("optimizer"), recipe.pretrain.optimizer.kind),
        ("seed", last.manifest.get("seed"), recipe.seed),
        ("pretrain.samples_per_step", last.manifest.get("samples_per_step"), recipe.pretrain.samples_per_step),
    ):
        if there != here:
            raise RecipeError(f"{last.path} was saved with {key}={there}, and the recipe says {here}: make them equal")
    return last


def _describe(run: RunFolder, split: Split | None) -> None:
    packages = ("torch", "megatron-core", "deepspeed", "ray", "tensorstore")
    run.update(
        software={"python": platform.python_version()} | {p: version(p) for p in packages},
        machine={"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
    )
    if split is not None:
        run.update(
            split={
                "train": len(split.train),
                "held_out": len(split.held_out),
                "overlap": split.overlap,
                "method": split.method,
            }
        )


def _run_phases(
    recipe: Recipe, start: OpenModel, split: Split, run: RunFolder, progress: Progress, traces: Path | None
) -> None:
    progress.say(f"converting {recipe.model.source} into {recipe.folder / 'model'}")
    checkpoint = write_checkpoint(*start, recipe.folder / "model")
    progress.say(f"starting {recipe.layout.processes} policy and {recipe.rollout.workers} rollout workers")
    policy, rollouts, verifiers = _start_actors(recipe, checkpoint)
    tokenizer = Tokenizer(manager.Checkpoint(checkpoint).files)
    controller = Controller(
        policy, rollouts, verifiers, tokenizer=tokenizer, task=recipe.task, split=split, seed=recipe.seed
    )
    phases = _Phases(recipe, controller, policy, run, progress, traces)
    phases.measure("before")
    if recipe.supervised and recipe.supervised.steps:
        phases.run("sft", recipe.supervised.steps, controller.supervised(recipe.supervised))
        phases.measure("supervised")
    if recipe.rl and recipe.rl.steps:
        phases.run("rl", recipe.rl.steps, controller.reinforce(recipe.rl))
        phases.measure("after")
    phases.save()
    policy.call("saved")
    verifiers.close()


def _start_actors(recipe: Recipe, checkpoint: Path) -> tuple[Policy, Rollouts, Verifiers]:
    sampling = recipe.rl.sampling if recipe.rl else None
    checkpoint = checkpoint.resolve()
    policy = Policy(recipe.layout, threads=threads_for(recipe.layout.processes), trainer=recipe.trainer)
    processes = recipe.rollout.workers * recipe.rollout.tensor
    rollouts = Rollouts(recipe.rollout, threads=threads_for(processes))
    verifiers = Verifiers(recipe.verifier.workers, recipe.verifier.processes, recipe.verifier.deadline)
    calls = rollouts.start(checkpoint, recipe.model.dtype, recipe.model.numerics)
    optimizer = (
        recipe.rl.optimizer if recipe.rl else recipe.supervised.optimizer if recipe.supervised else OptimizerConfig()
    )
    temperature = (sampling.temperature if sampling else 1.0) or 1.0
    numerics = recipe.model.numerics
    gather(policy.start(checkpoint, recipe.model.dtype, optimizer, temperature, numerics) + calls)
    policy.call("open_checkpoints", (recipe.folder / "checkpoints").resolve(), recipe.checkpoints)
    return policy, rollouts, verifiers


class _Phases:
    """Runs phases and writes down what they report."""

    def __init__(
        self,
        recipe: Recipe,
        controller: Controller,
        policy: Policy,
        run: RunFolder,
        progress: Progress,
        traces: Path | None,
    ) -> None:
        self._recipe, self._controller, self._policy = recipe, controller, policy
        self._run, self._progress, self._traces = run, progress, traces
        self._rows: list[dict[str, Any]] = []
        self._steps = 0
        self._saved: int | None = None

    def run(self, name: str, total: int, records: Iterator[StepRecord]) -> None:
        """One phase, a record a step."""
        self._progress.begin(name, total)
        with traced(self._policy, self._traces and self._traces / name, self._progress):
            for record in records:
                self._record(name, record)

    def _record(self, name: str, record: StepRecord) -> None:
        self._steps += 1
        self._run.log(name, record.step, record.metrics)
        if record.scored:
            self._run.rollouts(record.step, [_rollout_row(record.step, i, s) for i, s in enumerate(record.scored)])
        self._progress.step(name, record.step, record.metrics)
        every = self._recipe.checkpoints.every
        if every and self._steps % every == 0:
            self.save()

    def measure(self, stage: str) -> None:
        """Greedy accuracy on the held-out problems."""
        self._progress.say(f"measuring held-out accuracy ({stage})")
        scored = self._controller.evaluate(self._recipe.evaluation.max_new_tokens)
        row = _evaluation(stage, self._steps, scored)
        self._rows.append(row)
        self._run.evaluation(stage, [_answer_row(s) for s in scored])
        self._run.log("eval", self._steps, row)
        self._run.update(rows=self._rows)
        self._progress.say(f"{stage}: {row['correct']} of {row['total']} correct")

    def save(self) -> None:
        """A checkpoint of the policy as it is."""
        if self._saved != self._steps:
            self._policy.call("save", self._steps, {"name": self._recipe.name}, False, False)
            self._saved = self._steps


def _evaluation(stage: str, step: int, scored: Sequence[Scored]) -> dict[str, Any]:
    outcomes = [s.verdict.outcome for s in scored]
    correct, ungradable = outcomes.count(Outcome.correct), outcomes.count(Outcome.ungradable)
    return {
        "stage": stage,
        "accuracy": correct / len(scored),
        "correct": correct,
        "total": len(scored),
        "ungradable": ungradable,
        "step": step,
    }


def _answer_row(scored: Scored) -> dict[str, Any]:
    rollout, verdict = scored.rollout, scored.verdict
    return {
        "problem": rollout.prompt.index,
        "prompt": rollout.prompt.text,
        "answer": rollout.prompt.answer,
        "completion": rollout.text,
        "outcome": str(verdict.outcome),
        "reason": verdict.reason,
    }


def _rollout_row(step: int, number: int, scored: Scored) -> dict[str, Any]:
    rollout = scored.rollout
    return _answer_row(scored) | {
        "step": step,
        "group": rollout.prompt.index,
        "sample": number,
        "reward": scored.verdict.reward,
        "weight_version": rollout.weight_version,
        "finish_reason": rollout.finish_reason,
        "prompt_tokens": len(rollout.prompt.tokens),
        "completion_tokens": len(rollout.tokens),
        "advantage": scored.advantage,
    }
