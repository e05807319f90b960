"""Runs the phases of a run on problems: supervised, preferences, RL, with held-out accuracy measured between them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lockstep.cluster.evaluation.held_out import accuracy_line, pass_at_line
from lockstep.cluster.launch.actors import RunActors, make_actors, start_actors
from lockstep.cluster.launch.placement import Placement
from lockstep.cluster.launch.plan import RunPlan
from lockstep.cluster.launch.preflight import CheckedRun
from lockstep.cluster.launch.resume import Position, position_of
from lockstep.cluster.recipe.schema import EvaluationConfig
from lockstep.cluster.records.progress import Progress
from lockstep.cluster.records.run_folder import COMPARISONS, CONVERSATIONS, DURING, RunError, RunFolder
from lockstep.cluster.records.tables import COMPARISON_COLUMNS, answer_row, rollout_row, to_arrow
from lockstep.cluster.run.interruption import Interruption
from lockstep.cluster.run.profiling import traced
from lockstep.data.conversations.token_table import TokenTable
from lockstep.data.tasks.mixture import ProblemSet
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.model.formats.lockstep import write_checkpoint
from lockstep.rl.algorithms.config import PreferenceConfig, RLConfig
from lockstep.rl.algorithms.preferences import Comparison
from lockstep.rl.algorithms.supervised import SupervisedConfig, read_conversations
from lockstep.rl.controller import Controller, StepRecord
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.workers.process_watch import ProcessWatch


def run_phases(
    checked: CheckedRun,
    problems: Sequence[ProblemSet],
    run: RunFolder,
    progress: Progress,
    traces: Path | None,
    placement: Placement,
    last: Checkpoint | None,
    interruption: Interruption,
) -> None:
    """Run all phases, or those that are left after the checkpoint `last`; one that is interrupted saves first."""
    plan, recipe, start = checked.plan, checked.plan.recipe, checked.start
    at = position_of(last)
    folder = recipe.folder / "model"
    if not folder.exists():
        progress.say(f"converting {recipe.model.source} into {folder}")
        write_checkpoint(start.source, start.config, start.files, folder)
    first = manager.find(folder.resolve())
    progress.say(f"starting {plan.processes['policy']} policy and {recipe.rollout.workers} rollout workers")
    actors = make_actors(plan, first, placement)
    with ProcessWatch(actors.workers, recipe.recovery.stopped_after, progress.say):
        start_actors(actors, checked, last, at, problems)
        phases = _Phases(plan, _controller(actors, problems, last, at), actors, run, progress, traces, at, interruption)
        if last:
            progress.say(f"going on after step {at.steps}, which {last.place} holds")
        try:
            phases.run()
        except KeyboardInterrupt:
            phases.end(interruption)
            raise
        actors.close()


def _controller(actors: RunActors, problems: Sequence[ProblemSet], last: Checkpoint | None, at: Position) -> Controller:
    """The controller of actors that have their weights, and go on from a checkpoint where there is one."""
    plan, recipe = actors.plan, actors.plan.recipe
    controller = Controller(
        actors.policy,
        actors.rollouts,
        actors.verifiers,
        tokenizer=Tokenizer(Checkpoint(actors.first).files, recipe.mixture[0].chat_template_kwargs),
        problems=problems,
        seed=recipe.seed,
        rewards=recipe.rewards,
        models=actors.models,
        environments=actors.environments,
    )
    if last:
        for checkpoints in (plan.checkpoints, *map(plan.checkpoints_of, plan.trained_models)):
            manager.drop_after(checkpoints, at.steps)
        actors.resume(last, at)
        controller.resume(at.version)
    return controller


class _Phases:
    """Runs phases and writes down what they report."""

    def __init__(
        self,
        plan: RunPlan,
        controller: Controller,
        actors: RunActors,
        run: RunFolder,
        progress: Progress,
        traces: Path | None,
        at: Position,
        interruption: Interruption,
    ) -> None:
        self._plan, self._recipe, self._controller, self._actors = plan, plan.recipe, controller, actors
        self._run, self._progress, self._traces = run, progress, traces
        self._at, self._interruption = at, interruption
        self._rows = [row for row in run.summary().get("rows") or [] if row["step"] <= at.steps]
        self._saved: int | None = at.steps or None
        self._beside = {each.name for each in self._recipe.evaluation.tasks}

    @property
    def steps(self) -> int:
        """Taken so far, of all phases."""
        return self._at.steps

    def run(self) -> None:
        """All phases that are left."""
        recipe, at = self._recipe, self._at
        self.measure("before")
        if recipe.supervised and recipe.supervised.steps and at.phase == "sft":
            self.supervise(recipe.supervised)
        if recipe.preference and recipe.preference.steps and at.phase != "rl":
            self.prefer(recipe.preference)
        if recipe.rl and recipe.rl.steps:
            self.reinforce(recipe.rl)
        self.save(state=bool(recipe.checkpoints.every))  # a run that saves its end only does not go on

    def supervise(self, config: SupervisedConfig) -> None:
        """The phase of conversations, or of answers to problems."""
        done = self._at.done("sft")
        table = self._conversations(config, done) if config.source else None
        self._run_all("sft", config.steps, self._controller.supervised(config, done, table))
        self.measure("supervised")

    def _conversations(self, config: SupervisedConfig, done: int) -> TokenTable:
        """The tokenized conversations of the recipe's file, which a run that goes on has written down."""
        if done and (kept := self._run.kept(CONVERSATIONS)):
            return TokenTable.from_arrow(kept)
        self._progress.say(f"reading conversations from {config.source}")
        first = Checkpoint(self._actors.first)
        tokenizer = Tokenizer(first.files, self._recipe.mixture[0].chat_template_kwargs)
        found = read_conversations(config, tokenizer, int(first.manifest["model"]["context"]), self._progress.say)
        self._run.keep(CONVERSATIONS, found.to_arrow())
        return found

    def prefer(self, config: PreferenceConfig) -> None:
        """The phase of comparisons, which a run that goes on has written down."""
        done = self._at.done(config.phase)
        if done:
            comparisons = self._kept_comparisons()
        else:
            self._progress.say("reading comparisons" if config.source else "writing completions to compare")
            comparisons = self._controller.compare(config, self._progress.say)
            self._run.keep(COMPARISONS, to_arrow([each.row() for each in comparisons], COMPARISON_COLUMNS))
        self._run_all(config.phase, config.steps, self._controller.prefer(config, comparisons, done))
        if config.judged:
            self._actors.save_reward_model(self.steps, self._said())
        else:
            self.measure("preferred")

    def _kept_comparisons(self) -> list[Comparison]:
        kept = self._run.kept(COMPARISONS)
        if kept is None:
            raise RunError(f"{self._run.path / COMPARISONS} is gone, and a run goes on with it: restore it")
        return [Comparison.of(row) for row in kept.to_pylist()]

    def reinforce(self, config: RLConfig) -> None:
        """The phase of rewards."""
        at = self._at
        if self._run.summary().get("stopped_early"):
            self._run.update(stopped_early=None)
        if at.phase != "rl":
            self._actors.keep_reference(at.steps)
        self._actors.load_reference()
        self._run_all("rl", config.steps, self._controller.reinforce(at.adapted(config), at.done("rl"), at.group))
        self.measure("after")

    def _run_all(self, name: str, total: int, records: Iterator[StepRecord]) -> None:
        """One phase, a record a step."""
        self._progress.begin(name, total)
        with traced(self._actors.policy, self._traces and self._traces / name, self._progress):
            while not self._stops_early(name) and self._took_step(name, records):
                self._measure_between(name, total)
                self._save_if_due()

    def _took_step(self, name: str, records: Iterator[StepRecord]) -> bool:
        """Take the next step of a phase, if there is one; what ends the run waits for it."""
        with self._interruption.deferred():
            record = next(records, None)
            if record:
                self._record(name, record)
        return record is not None

    def _measure_between(self, name: str, total: int) -> None:
        """Held-out accuracy after a step of RL, where the recipe asks for it."""
        step, every = self._at.phase_step, self._recipe.evaluation.every
        if name == "rl" and every and (step % every == 0 or step == total):
            self.measure(DURING if step < total else "after")

    def _stops_early(self, name: str) -> bool:
        """Whether accuracy has had no new best for as many measurements of RL as the recipe waits for."""
        patience = self._recipe.evaluation.patience
        best, during = self._best_step(), [row["step"] for row in self._rows if row["stage"] == DURING]
        if name != "rl" or not patience or best is None or sum(step > best for step in during) < patience:
            return False
        said = (
            f"RL ended after {self.steps} steps: no accuracy{self._of_best} in {patience} measurements was above that "
            f"of step {best}"
        )
        self._progress.say(said)
        self._run.update(stopped_early=said)
        self._controller.drop()
        return True

    @property
    def _of_best(self) -> str:
        best = self._recipe.evaluation.best
        return f" of {best}" if best else ""

    def _best_step(self) -> int | None:
        """Steps after which accuracy during RL was highest, the first of equals."""
        best = self._recipe.evaluation.best
        rows = [row for row in self._rows if row["stage"] in (DURING, "after")]
        found = [(row.get(f"accuracy/{best}" if best else "accuracy", math.nan), -row["step"]) for row in rows]
        known = [each for each in found if math.isfinite(each[0])]
        return -max(known)[1] if known else None

    def _record(self, name: str, record: StepRecord) -> None:
        version = self._controller.version
        self._at = Position(name, record.step, record.position, version, record.kl_beta, self.steps + 1)
        self._run.log(name, record.step, record.metrics)
        if record.completions:
            rows = [rollout_row(record.step, i, each) for i, each in enumerate(record.completions)]
            self._run.rollouts(record.step, rows)
        self._progress.step(name, record.step, record.metrics)

    def _save_if_due(self) -> None:
        """A checkpoint after so many steps as the recipe says, and where accuracy is the best so far."""
        every = self._recipe.checkpoints.every
        if (every and self.steps % every == 0) or (self._recipe.evaluation.every and self._best_step() == self.steps):
            with self._interruption.deferred():
                self.save(state=bool(every))

    def measure(self, stage: str) -> None:
        """Accuracy on the held-out problems, if it is not known; that of an earlier end of RL is not known now."""
        if any(row["stage"] == stage and (stage == "before" or row["step"] == self.steps) for row in self._rows):
            return
        self._progress.say(f"measuring held-out accuracy ({stage})")
        config = self._recipe.evaluation
        judged = self._controller.evaluate(config.max_new_tokens)
        row: dict[str, Any] = {"stage": stage, **accuracy_line(judged, self._beside), "step": self.steps}
        row |= self._pass_at(config)
        self._rows = [other for other in self._rows if stage == DURING or other["stage"] != stage] + [row]
        name = f"step-{self.steps:06d}" if stage == DURING else stage
        self._run.evaluation(name, [answer_row(each) for each in judged])
        self._run.log("eval", self.steps, row)
        self._run.update(rows=self._rows)
        lost = f", {row['ungradable']} ungradable and left out" if row["ungradable"] else ""
        parts = "".join(f", {key.partition('/')[2]} {row[key]:.1%}" for key in row if key.startswith("accuracy/"))
        self._progress.say(f"{stage}: {row['correct']} of {row['total'] - row['ungradable']} correct{lost}{parts}")

    def _pass_at(self, config: EvaluationConfig) -> dict[str, float]:
        """pass@k of samples, where the recipe asks for some."""
        if not config.samples:
            return {}
        sampling = SamplingParams(temperature=config.temperature, max_new_tokens=config.max_new_tokens)
        groups = self._controller.sample(sampling, config.samples)
        return pass_at_line(groups, config.pass_at, self._beside)

    def end(self, interruption: Interruption) -> None:
        """Save what the run has learned, if it has the time, and write down how it ended."""

        def save() -> None:
            self.save(state=True)
            self._actors.saved()

        ended = interruption.end(self.steps, save)
        self._run.update(ended=ended)
        self._progress.say(ended)

    def save(self, *, state: bool) -> None:
        """A checkpoint of who learns as they are; see `RunActors.save`."""
        if self._saved == self.steps:
            return
        self._saved = self.steps
        position = {key: value for key, value in asdict(self._at).items() if key != "steps"}
        said = self._said() | {"position": position, "rows": self._rows}
        best = bool(self._recipe.evaluation.every) and self._best_step() == self.steps
        self._actors.save(said, self._at, state=state, best=best)

    def _said(self) -> dict[str, Any]:
        """What every manifest says of the run."""
        return self._plan.manifest(self._run.id)
