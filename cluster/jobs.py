"""What `lockstep train` does: places the actors, runs the phases of a recipe, and keeps the record."""

import logging
import os
import platform
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import psutil
import ray
from rich.console import Console

from lockstep.cluster.cast import models, processes, scorer_source
from lockstep.cluster.config import Recipe, RecipeError, to_toml
from lockstep.cluster.display import Progress
from lockstep.cluster.phases import run_phases
from lockstep.cluster.placement import Placement, plan
from lockstep.cluster.position import continued, newest
from lockstep.cluster.pretraining import continued_text, run_pretraining
from lockstep.cluster.records import RunFolder
from lockstep.cluster.report import write_report
from lockstep.cluster.roles import ScorerConfig
from lockstep.cluster.sources import OpenModel, starting_point
from lockstep.data.corpus.loader import PretrainingData
from lockstep.data.tasks.task import Split, make_split
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.layout import Layout
from lockstep.model.config import ModelConfig, check_layout, check_numerics
from lockstep.model.weights.lora import with_adapters
from lockstep.rl.sandbox.isolation import SandboxError
from lockstep.rl.verifiers.code_pool import CodePool
from lockstep.rl.verifiers.config import SandboxConfig

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
    source, model, files = starting_point(recipe.model, recipe.seed)
    model, source = with_adapters(model, source, recipe.trainer.trainable.lora, recipe.seed)
    recipe.trainer.trainable.check(model)
    check_layout(recipe.layout, model)
    check_layout(Layout(tensor=recipe.rollout.tensor), model)
    check_numerics(recipe.model.numerics, recipe.layout, model)
    for name, beside in models(recipe).items():
        other = scorer_source(name, recipe)[1] if isinstance(beside, ScorerConfig) and beside.source else model
        check_layout(beside.layout or recipe.layout, other)
        if other.vocabulary != model.vocabulary:
            raise RecipeError(
                f"roles.{name}.source reads {other.vocabulary} tokens and the policy writes {model.vocabulary}: "
                "give a model with the same tokenizer"
            )
    if recipe.rl and recipe.roles.reference.place == "apart" and recipe.rl.reference.moves:
        raise RecipeError("a reference that moves is in the policy's own processes: place it together")
    if recipe.pretrain and recipe.pretrain.data:
        if recipe.pretrain.data.length > model.context:
            raise RecipeError(
                f"pretrain.data.length={recipe.pretrain.data.length} is longer than the model's context of "
                f"{model.context} tokens: shorten it, or give a model with a longer context"
            )
        tokenizer = Tokenizer(files).digest if files else None
        PretrainingData(recipe.pretrain.data, seed=recipe.seed, vocabulary=model.vocabulary, tokenizer=tokenizer)
    return source, model, files


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
    if split and split.has_programs:
        console.print(check_sandbox(recipe.verifier.sandbox), markup=False, highlight=False)
    traces = recipe.folder / "traces" if profile else None
    with Interruption() as interruption:
        run = RunFolder.resume(recipe.folder) if last else RunFolder.create(recipe.folder, to_toml(recipe), recipe.name)
        try:
            with run, Progress(console) as progress:
                _describe(run, split)
                with ray_cluster(address), Placement(plan(recipe.roles, processes(recipe))) as placement:
                    interruption.listen()
                    if split is None:
                        run_pretraining(recipe, start, run, progress, traces, last, placement.of("policy"))
                    else:
                        run_phases(recipe, start, split, run, progress, traces, placement, last)
        finally:
            write_report(recipe.folder)
    return recipe.folder


def check_sandbox(config: SandboxConfig) -> str:
    """What keeps programs in on this machine, in one line.

    Raises:
        ValueError: where that is less than the recipe requires.
    """
    try:
        with CodePool(1, config.limits, config.required) as sandboxes:
            return str(sandboxes.protection)
    except SandboxError as error:
        raise RecipeError(f"verifier.sandbox.requires={list(config.requires)}: {error}") from error


def last_checkpoint(recipe: Recipe, model: ModelConfig) -> manager.Checkpoint | None:
    """What a run goes on from, or None where it has saved nothing.

    Raises:
        RecipeError: when the recipe is not one that can go on from there.
    """
    if not manager.saved(recipe.saves):
        return None
    last = manager.Checkpoint(recipe.saves) if recipe.pretrain else newest(recipe)
    expected = [("model", "model", model), ("seed", "seed", recipe.seed)]
    expected += continued_text(recipe.pretrain) if recipe.pretrain else continued(recipe)
    for key, name, here in expected:
        there = ModelConfig(**last.manifest["model"]) if key == "model" else last.manifest.get(key)
        if there != here:
            raise RecipeError(
                f"{last.place} was saved with {name}={there}, and the recipe says {here}: make them equal"
            )
    if not last.states:
        raise RecipeError(
            f"{last.place} holds no state of the optimizer, which a run needs to go on: save with checkpoints.every"
        )
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
