"""The phases of a run on problems: supervised steps, preferences, reinforcement, and held-out accuracy between them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lockstep.cluster.config import Recipe, RecipeError
from lockstep.cluster.convert import write_checkpoint
from lockstep.cluster.display import Progress
from lockstep.cluster.placement import Placement
from lockstep.cluster.records import RunFolder
from lockstep.cluster.roles import CriticConfig, ReferenceRoleConfig, ScorerConfig
from lockstep.cluster.sources import OpenModel, open_source
from lockstep.cluster.tracing import traced
from lockstep.data.problems import Split
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.place import Place
from lockstep.distributed.checkpoint.saver import CheckpointConfig
from lockstep.model.recipes import OptimizerConfig
from lockstep.rl.actors import Call, Environments, Model, Policy, Rollouts, Verifiers, gather, threads_for
from lockstep.rl.controller import Controller, StepRecord
from lockstep.rl.environments.transcript import turns
from lockstep.rl.learner import Models
from lockstep.rl.types import Scored
from lockstep.rl.verifiers.verdict import Outcome

Beside = CriticConfig | ScorerConfig | ReferenceRoleConfig
"""What a recipe says of a model beside the policy."""


@dataclass(frozen=True)
class Position:
    """Where a run is: which step of which phase its weights are of."""

    phase: str = "sft"
    phase_step: int = 0
    group: int = 0
    """Number of the next group of prompts of RL."""
    version: int = 0
    """Of the weights that rollout workers have."""
    steps: int = 0
    """Of all phases."""

    def done(self, phase: str) -> int:
        """Steps of a phase that have been taken, where it is the present one."""
        return self.phase_step if self.phase == phase else 0


def position_of(last: Checkpoint | None) -> Position:
    """What a checkpoint says of its place in a run; the beginning where there is none."""
    if last is None:
        return Position()
    return Position(**last.manifest["position"], steps=int(last.manifest["step"]))


def continued(recipe: Recipe) -> list[tuple[str, str, Any]]:
    """What must be as it was where a run goes on: its key in a manifest, its key in the recipe, and its value."""
    supervised, rl = recipe.supervised, recipe.rl
    return [
        ("optimizer", "optimizer.kind", _optimizer(recipe).kind),
        ("problems_per_step", "supervised.problems_per_step", supervised and supervised.problems_per_step),
        ("prompts_per_step", "rl.prompts_per_step", rl and rl.prompts_per_step),
        ("group_size", "rl.group_size", rl and rl.group_size),
    ]


def run_phases(
    recipe: Recipe,
    start: OpenModel,
    split: Split,
    run: RunFolder,
    progress: Progress,
    traces: Path | None,
    placement: Placement,
    last: Checkpoint | None,
) -> None:
    """All phases, or what is left of them after a checkpoint."""
    at = position_of(last)
    folder = recipe.folder / "model"
    if last is None:
        progress.say(f"converting {recipe.model.source} into {folder}")
        write_checkpoint(*start, folder)
    first = manager.find(folder.resolve())
    progress.say(f"starting {recipe.layout.processes} policy and {recipe.rollout.workers} rollout workers")
    policy, rollouts, verifiers, beside = _start_actors(recipe, last.place if last else first, split, placement)
    tokenizer = Tokenizer(Checkpoint(first).files)
    environments = _start_environments(recipe, tokenizer)
    controller = Controller(
        policy,
        rollouts,
        verifiers,
        tokenizer=tokenizer,
        task=recipe.task,
        split=split,
        seed=recipe.seed,
        reward=recipe.reward,
        models=beside,
        environments=environments,
    )
    if last:
        progress.say(f"going on after step {at.steps}, which {last.place} holds")
        policy.call("restore", last.place)
        inside = at.phase == "rl" and not beside.reference
        policy.call("resume_phase", _reference(recipe, first) if inside else None)
        controller.resume(at.version)
    phases = _Phases(recipe, controller, policy, run, progress, traces, at)
    phases.measure("before")
    if recipe.supervised and recipe.supervised.steps and at.phase == "sft":
        records = controller.supervised(recipe.supervised, at.done("sft"))
        phases.run("sft", recipe.supervised.steps, records)
        phases.measure("supervised")
    if recipe.preference and recipe.preference.steps:
        phases.run(recipe.preference.phase, recipe.preference.steps, controller.prefer(recipe.preference))
        if recipe.preference.judged:
            phases.save_reward_model(beside.reward)
        else:
            phases.measure("preferred")
    if recipe.rl and recipe.rl.steps:
        if (recipe.checkpoints.every or beside.reference) and at.phase == "sft" and phases.steps:
            policy.call("save_reference", phases.steps, _references(recipe))
        if beside.reference:
            temperature, numerics = _temperature(recipe), recipe.model.numerics
            kept = _reference(recipe, first)
            gather(beside.reference.start(kept, recipe.model.dtype, None, temperature, numerics))
        records = controller.reinforce(recipe.rl, at.done("rl"), at.group)
        phases.run("rl", recipe.rl.steps, records)
        phases.measure("after")
    phases.save()
    policy.call("saved")
    verifiers.close()
    if environments:
        environments.close()


def _references(recipe: Recipe) -> Place:
    """Where the weights that RL began with are kept, where those are not the run's first."""
    return recipe.saves / "reference"


def _reference(recipe: Recipe, first: Place) -> Place:
    """The weights that RL began with."""
    before = sum(phase.steps for phase in (recipe.supervised, recipe.preference) if phase)
    return manager.saved(_references(recipe))[before] if before else first


def processes(recipe: Recipe) -> dict[str, int]:
    """Processes of each role."""
    policy = {"policy": recipe.layout.processes}
    if recipe.pretrain:
        return policy
    roles = {"rollout": recipe.rollout.workers * recipe.rollout.tensor, "verifier": recipe.verifier.workers}
    return (
        policy | roles | {name: (beside.layout or recipe.layout).processes for name, beside in models(recipe).items()}
    )


def busy(recipe: Recipe) -> tuple[int, int]:
    """Processes that work while a rollout worker writes, and while the policy learns; those of models count as its own.

    Threads are shared out over so many: with more, the threads that wait take the time of those that work.
    """
    count = processes(recipe)
    writing, learning = count["rollout"], sum(count[name] for name in ("policy", *models(recipe)))
    if recipe.rl and recipe.rl.flow.mode != "synchronous":
        return writing + learning, writing + learning
    return writing, learning


def models(recipe: Recipe) -> dict[str, Beside]:
    """The models that a recipe has beside the policy."""
    found: dict[str, Beside] = {}
    if recipe.rl and "value" in recipe.rl.scores:
        found["critic"] = recipe.roles.critic
    if recipe.rl and recipe.rl.reference.kind != "none" and recipe.roles.reference.place == "apart":
        found["reference"] = recipe.roles.reference
    for name in ("reward", "teacher"):
        scorer: ScorerConfig = getattr(recipe.roles, name)
        if scorer.source or name in learned(recipe):
            found[name] = scorer
    return found


def learned(recipe: Recipe) -> set[str]:
    """The models that are trained by preferences, and not only asked."""
    return {"reward"} if recipe.preference and recipe.preference.judged else set()


def scorer_source(name: str, recipe: Recipe) -> OpenModel:
    """The model of a role that scores.

    Raises:
        ValueError: when it is not of the kind that the role needs.
    """
    source: str = getattr(recipe.roles, name).source
    found = open_source(source)
    wanted = "value" if name == "reward" else "vocabulary"
    if found[1].head != wanted and name not in learned(recipe):
        raise RecipeError(
            f"roles.{name}.source={source} has a {found[1].head} head, and that role needs a {wanted} head"
        )
    return found


def _start_actors(
    recipe: Recipe, checkpoint: Place, split: Split, placement: Placement
) -> tuple[Policy, Rollouts, Verifiers, Models]:
    writing, learning = busy(recipe)
    policy = Policy(recipe.layout, threads=threads_for(learning), trainer=recipe.trainer, places=placement.of("policy"))
    rollouts = Rollouts(recipe.rollout, threads=threads_for(writing), places=placement.of("rollout"))
    verifiers = Verifiers(recipe.verifier, recipe.task.grader, placement.of("verifier"))
    dtype, numerics = recipe.model.dtype, recipe.model.numerics
    calls = policy.start(checkpoint, dtype, _optimizer(recipe), _temperature(recipe), numerics)
    beside, more = _start_models(recipe, checkpoint, placement)
    gather(calls + more + rollouts.start(checkpoint, dtype, numerics) + verifiers.start(programs=split.has_programs))
    policy.call("open_checkpoints", recipe.saves, recipe.checkpoints)
    return policy, rollouts, verifiers, beside


def _start_environments(recipe: Recipe, tokenizer: Tokenizer) -> Environments | None:
    """What answers the policy's turns, where the recipe has it."""
    if recipe.environment.kind == "none":
        return None
    environments = Environments(recipe.environment, tokenizer.files, chat=recipe.task.chat)
    gather([environments.ready()])
    return environments


def _start_models(recipe: Recipe, checkpoint: Place, placement: Placement) -> tuple[Models, list[Call]]:
    """The models beside the policy, and calls that load them, to be gathered; the reference loads when RL begins."""
    started: dict[str, Model] = {}
    calls: list[Call] = []
    dtype, numerics = recipe.model.dtype, recipe.model.numerics
    threads = threads_for(busy(recipe)[1])
    for name, config in models(recipe).items():
        layout = config.layout or recipe.layout
        model = Model(layout, threads=threads, trainer=recipe.trainer, places=placement.of(name), role=name)
        if isinstance(config, CriticConfig):
            calls += model.start(checkpoint, dtype, config.optimizer, 1.0, numerics, "value")
        elif isinstance(config, ScorerConfig):
            begun: Path | Place = checkpoint
            if config.source:
                begun = write_checkpoint(*scorer_source(name, recipe), recipe.folder / name).resolve()
            learns = recipe.preference.optimizer if recipe.preference and name in learned(recipe) else None
            temperature = _temperature(recipe) if name == "teacher" else 1.0
            calls += model.start(begun, dtype, learns, temperature, numerics, "value" if learns else None)
        started[name] = model
    return Models(**started, critic_optimizer=recipe.roles.critic.optimizer), calls


def _temperature(recipe: Recipe) -> float:
    """That rollouts are drawn with."""
    return (recipe.rl.sampling.temperature if recipe.rl else 1.0) or 1.0


def _optimizer(recipe: Recipe) -> OptimizerConfig:
    phase = recipe.rl or (None if learned(recipe) else recipe.preference) or recipe.supervised
    return phase.optimizer if phase else OptimizerConfig()


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
        at: Position,
    ) -> None:
        self._recipe, self._controller, self._policy = recipe, controller, policy
        self._run, self._progress, self._traces = run, progress, traces
        self._at = at
        self._rows = [row for row in run.summary().get("rows") or [] if row["step"] <= at.steps]
        self._saved: int | None = at.steps or None

    @property
    def steps(self) -> int:
        """Taken so far, of all phases."""
        return self._at.steps

    def run(self, name: str, total: int, records: Iterator[StepRecord]) -> None:
        """One phase, a record a step."""
        self._progress.begin(name, total)
        with traced(self._policy, self._traces and self._traces / name, self._progress):
            for record in records:
                self._record(name, record)

    def _record(self, name: str, record: StepRecord) -> None:
        version = int(record.metrics.get("weight_version", self._at.version))
        self._at = Position(name, record.step, record.position, version, self.steps + 1)
        self._run.log(name, record.step, record.metrics)
        if record.scored:
            self._run.rollouts(record.step, [_rollout_row(record.step, i, s) for i, s in enumerate(record.scored)])
        self._progress.step(name, record.step, record.metrics)
        every = self._recipe.checkpoints.every
        if every and self.steps % every == 0:
            self.save()

    def measure(self, stage: str) -> None:
        """Greedy accuracy on the held-out problems, if it is not known."""
        if any(row["stage"] == stage for row in self._rows):
            return
        self._progress.say(f"measuring held-out accuracy ({stage})")
        scored = self._controller.evaluate(self._recipe.evaluation.max_new_tokens)
        row = _evaluation(stage, self.steps, scored)
        self._rows.append(row)
        self._run.evaluation(stage, [_answer_row(s) for s in scored])
        self._run.log("eval", self.steps, row)
        self._run.update(rows=self._rows)
        self._progress.say(f"{stage}: {row['correct']} of {row['total']} correct")

    def save_reward_model(self, model: Model | None) -> None:
        """A checkpoint of the reward model, which `roles.reward.source` of another recipe may name."""
        assert model
        model.call("open_checkpoints", self._recipe.saves / "reward", CheckpointConfig())
        said = {"name": self._recipe.name, "seed": self._recipe.seed}
        model.call("save", self.steps, said, False, False)
        model.call("saved")

    def save(self) -> None:
        """A checkpoint of the policy as it is."""
        if self._saved == self.steps:
            return
        self._saved = self.steps
        said = {key: value for key, _, value in continued(self._recipe)}
        position = {key: value for key, value in asdict(self._at).items() if key != "steps"}
        said |= {"name": self._recipe.name, "seed": self._recipe.seed, "position": position}
        state = bool(self._recipe.checkpoints.every)  # a run that saves its end only does not go on
        self._policy.call("save", self.steps, said, state, False)


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
        "reward": scored.reward,
        "weight_version": rollout.weight_version,
        "weight_versions": list(rollout.weight_versions),
        "finish_reason": rollout.finish_reason,
        "prompt_tokens": len(rollout.prompt.tokens),
        "completion_tokens": len(rollout.tokens),
        "turns": turns(rollout),
        "advantage": scored.advantage,
    }
