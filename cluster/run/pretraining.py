"""The pretraining phase of a run: steps until the end, the held-out loss in between, speed in tokens and in FLOPs."""

import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.cluster.launch.plan import RunPlan
from lockstep.cluster.launch.preflight import CheckedRun
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.records.progress import Progress
from lockstep.cluster.records.run_folder import RunFolder
from lockstep.cluster.run.failures import RunFailed
from lockstep.cluster.run.interruption import Interruption
from lockstep.cluster.run.profiling import traced
from lockstep.cluster.run.rewinds import Rewinds
from lockstep.data.corpus.sample_schedule import Rewind, SampleSchedule
from lockstep.data.corpus.synthetic import random_text
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.distributed.step_result import StepResult
from lockstep.model.config import ModelConfig
from lockstep.model.formats.lockstep import write_checkpoint
from lockstep.model.formats.registry import ModelContents
from lockstep.model.training.config import PretrainConfig
from lockstep.model.training.flops import training_flops
from lockstep.rl.remote import Places, gather
from lockstep.rl.workers.process_watch import ProcessWatch
from lockstep.rl.workers.stubs import ModelWorker
from lockstep.rl.workers.worker_groups import ModelGroup


class Diverged(RunFailed):
    """A run that no longer learns; the sentence says since when, what is saved, and where the batch is."""


def run_pretraining(
    checked: CheckedRun,
    run: RunFolder,
    progress: Progress,
    traces: Path | None,
    last: Checkpoint | None,
    interruption: Interruption,
    places: Places = (),
) -> None:
    """Train, measure, save; a run that is interrupted saves first.

    Args:
        traces: a folder for traces of the first steps, where they are wanted.
        last: the checkpoint to go on from, where the run goes on.
        places: of the trainer's processes.

    Raises:
        Diverged: after `pretrain.give_up_after` steps in a row without a finite gradient, or at a spike too many.
    """
    plan, recipe, start = checked.plan, checked.plan.recipe, checked.start
    checkpoint = last.place if last else _first_checkpoint(recipe, start, progress)
    role = plan.policy
    progress.say(f"starting {plan.processes['policy']} workers with {role.layout}")
    policy = ModelGroup(role.layout, trainer=recipe.trainer, places=places)
    with ProcessWatch(lambda: policy.workers, recipe.recovery.stopped_after, progress.say):
        gather(policy.start(checkpoint, recipe.model.dtype, role.optimizer, role.temperature, recipe.model.numerics))
        policy.check_agreement()
        _train(plan, start.config, policy, run, progress, traces, last, interruption)


def _train(
    plan: RunPlan,
    model: ModelConfig,
    policy: ModelGroup,
    run: RunFolder,
    progress: Progress,
    traces: Path | None,
    last: Checkpoint | None,
    interruption: Interruption,
) -> None:
    """Train, measure, save, with ranks that have their weights."""
    recipe, config = plan.recipe, plan.recipe.pretrain
    assert config is not None
    data = config.training_data or random_text(
        recipe.folder / "random",
        vocabulary=model.vocabulary,
        context=model.context,
        samples_per_step=config.samples_per_step,
        seed=recipe.seed,
    )
    done, samples = _position(config, last)
    if last:
        progress.say(f"going on after step {done}, which {last.place} holds")
        manager.drop_after(plan.checkpoints, done)
        policy.call(ModelWorker.restore, last.place)
    policy.call(ModelWorker.open_text, config, data, recipe.seed, done, samples)
    policy.call(ModelWorker.open_checkpoints, plan.checkpoints, plan.checkpoint_config)
    flops, peak = training_flops(model, data.length), sum(policy.call(ModelWorker.peak_flops))
    progress.say(
        f"{model.parameters / 1e6:.1f}M parameters, {flops / 1e9:.3f} GFLOP a token (6 per weight in a product, and "
        f"6 · layers · width · length for attention); measured peak {peak / 1e9:.0f} GFLOP/s"
    )
    run.update(speed={"flops_per_token": flops, "peak_flops": peak})
    loop = _Loop(plan, config, policy, run, progress, flops / peak, done, samples)
    try:
        with traced(policy, traces, progress):
            loop.run(data.length * config.samples_per_step, interruption)
    except KeyboardInterrupt:
        loop.end(interruption)
        raise


def _first_checkpoint(recipe: Recipe, start: ModelContents, progress: Progress) -> Path | Storage:
    folder = recipe.folder / "model"
    if folder.exists():  # of an attempt before
        return manager.find(folder.resolve())
    progress.say(f"writing the model of step 0 into {folder}")
    return write_checkpoint(start.source, start.config, start.files, folder).resolve()


def _position(config: PretrainConfig, last: Checkpoint | None) -> tuple[int, SampleSchedule]:
    """After which step the run is, and what it reads from there on."""
    if last is None:
        return 0, config.schedule
    rewinds = tuple(Rewind(snapshot, spike) for snapshot, spike in last.manifest["rewinds"])
    return int(last.manifest["step"]), replace(config.schedule, rewinds=rewinds)


class _Loop:
    """Steps and what is written down of them."""

    def __init__(
        self,
        plan: RunPlan,
        config: PretrainConfig,
        policy: ModelGroup,
        run: RunFolder,
        progress: Progress,
        cost: float,
        done: int,
        samples: SampleSchedule,
    ) -> None:
        """
        Args:
            cost: seconds that a token takes at the measured peak.
            done: the step that the weights are of.
        """
        self._plan, self._recipe, self._config, self._policy = plan, plan.recipe, config, policy
        self._run, self._progress, self._cost = run, progress, cost
        losses, self._held_out = (
            {m["step"]: m["loss"] for m in run.metrics() if m["phase"] == phase and m["step"] <= done}
            for phase in ("pretrain", "held_out")
        )
        self._rewinds = Rewinds(
            config.spikes, samples, policy, [losses.get(step, math.nan) for step in range(1, done + 1)]
        )
        self._done, self._saved = done, done or None
        self._spoilt = self._skipped = 0
        self._speeds: list[float] = []

    def run(self, tokens: int, interruption: Interruption) -> None:
        """All steps of so many tokens each; what ends the run waits for the end of a step."""
        config = self._config
        self._progress.begin("pretrain", config.steps)
        if not self._done:
            self.measure(0)
        while self._done < config.steps:
            with interruption.deferred():
                self._done = self._advance(self._done + 1, tokens)
        self.measure(config.steps)
        self.save(config.steps)
        self._policy.call(ModelWorker.saved)
        self._policy.call(ModelWorker.close_text)
        if self._speeds:
            speed = statistics.median(self._speeds)
            self._progress.say(f"median {speed:,.0f} tokens/s, {speed * self._cost:.1%} of the measured peak")

    def _advance(self, step: int, tokens: int) -> int:
        """Take a step and do what is due after it, or go back; returns the step that the weights are of then."""
        loss = self._step(step, tokens).values["loss"]
        if self._rewinds.is_spike(loss):
            return self._go_back(step, loss)
        self._check_gradients(step)
        self._rewinds.stand(loss)
        if step < self._config.steps:
            if _due(step, self._config.evaluate_every):
                self.measure(step)
            if _due(step, self._recipe.checkpoints.every):
                self.save(step)
        return step

    def _step(self, step: int, tokens: int) -> StepResult:
        began = time.perf_counter()
        result = self._policy.call(ModelWorker.pretrain, step)[0]
        seconds = time.perf_counter() - began
        finite = math.isfinite(result.grad_norm) and math.isfinite(result.values["loss"])
        self._spoilt = 0 if finite else self._spoilt + 1
        self._skipped += not finite
        self._speeds.append(tokens / seconds)
        metrics: dict[str, Any] = result.values | {
            "grad_norm": result.grad_norm,
            "learning_rate": self._config.optimizer.rate(step, self._config.steps),
            "tokens": step * tokens,
            "train_tokens_per_second": tokens / seconds,
            "mfu": tokens / seconds * self._cost,
            "skipped": self._skipped,
            "step_seconds": seconds,
            **self._rewinds.metrics(),
        }
        self._run.log("pretrain", step, metrics)
        self._progress.step("pretrain", step, metrics)
        return result

    def _check_gradients(self, step: int) -> None:
        """End a run whose gradients are no numbers any more."""
        if self._spoilt >= self._config.give_up_after:
            self.save(step)
            self._policy.call(ModelWorker.saved)
            batch = self._save_batch(step - self._spoilt + 1, step)
            raise Diverged(
                f"{self._spoilt} steps in a row, the last one {step}, had no finite loss and gradient: their updates "
                f"were left out, the weights before them are saved, and what they read is in {batch}"
            )

    def _go_back(self, step: int, loss: float) -> int:
        """Take steps back, from a spike to the last snapshot; returns its step."""
        spike, left = f"the loss of step {step}, {loss:.4g}, is a spike", self._rewinds.left
        batch = None if left else self._save_batch(step, step)
        back = self._rewinds.take_back(step)
        self._policy.call(ModelWorker.saved)
        manager.drop_after(self._plan.checkpoints, back)
        self._saved = None
        self._held_out = {measured: loss for measured, loss in self._held_out.items() if measured <= back}
        self._spoilt = 0
        if batch:
            self.save(back)
            self._policy.call(ModelWorker.saved)
            raise Diverged(
                f"{spike}, and the run went back as often as pretrain.spikes.rewinds allows: the weights of step "
                f"{back} are saved, and what step {step} read is in {batch}"
            )
        self._run.log("rewind", step, {"loss": loss, "back_to": back, **self._rewinds.metrics()})
        left_out = self._rewinds.samples.left_out[-1]
        self._progress.say(
            f"{spike}: back to step {back}, without samples {left_out.start} to {left_out.stop - 1}; {left - 1} more "
            f"such rewinds may follow"
        )
        return back

    def _save_batch(self, first: int, last: int) -> Path:
        """Write down what these steps read; returns the file."""
        file = self._recipe.folder / "batches" / f"step-{last:06d}.npz"
        samples = self._rewinds.samples
        read = range(samples.samples(first).start, samples.samples(last).stop)
        self._policy.call(ModelWorker.save_batch, file.resolve(), read)
        return file

    def end(self, interruption: Interruption) -> None:
        """Save what the run has learned, if it has the time, and write down how it ended."""

        def save() -> None:
            self.save(self._done)
            self._policy.call(ModelWorker.saved)

        ended = interruption.end(self._done, save)
        self._run.update(ended=ended)
        self._progress.say(ended)

    def measure(self, step: int) -> None:
        """The held-out loss, where documents are held out."""
        loss = self._policy.call(ModelWorker.held_out_loss)[0]
        if loss is not None:
            self._held_out[step] = loss
            self._run.log("held_out", step, {"loss": loss, "perplexity": math.exp(min(loss, 700.0))})
            self._progress.say(f"held-out loss after {step} steps: {loss:.4f} nats a token")

    def save(self, step: int) -> None:
        """A checkpoint of weights and optimizer as they are, which says what samples they have not learned from."""
        if step == self._saved:
            return
        self._saved = step
        samples = self._rewinds.samples
        said = {
            **self._plan.manifest(self._run.id),
            "left_out": [[r.start, r.stop] for r in samples.left_out],
            "rewinds": [[r.snapshot, r.spike] for r in samples.rewinds],
        }
        best = min(self._held_out, key=lambda measured: self._held_out[measured], default=None)
        self._policy.call(ModelWorker.save, step, said, True, step == best)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
