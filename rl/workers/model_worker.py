"""Processes of a model that learns or scores, the policy first of all: each is one rank of the model's world, and does
what the controller asks of all ranks."""

from pathlib import Path
from typing import Any, Literal

import torch

from lockstep.data.batch import Floats, Ints, TokenBatch
from lockstep.data.corpus.loader import PretrainingConfig, PretrainingData
from lockstep.data.corpus.sample_schedule import SampleSchedule
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.saver import CheckpointConfig, Saver
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.distributed.checkpoint.tensors import Source
from lockstep.distributed.device import give_back
from lockstep.distributed.groups import join, meeting_at
from lockstep.distributed.layout import Layout
from lockstep.distributed.pipeline import Stage
from lockstep.distributed.profiler import Trace
from lockstep.distributed.step_result import StepResult
from lockstep.model.config import Head, ModelConfig, Numerics, describe
from lockstep.model.formats.recast import Recast
from lockstep.model.loading import DTYPES, build, transformer_of
from lockstep.model.objectives.objective import Objective
from lockstep.model.state_dict import LocalWeights
from lockstep.model.training.config import OptimizerConfig, PretrainConfig, TrainerConfig, row_rules
from lockstep.model.training.flops import peak_flops
from lockstep.model.training.forward import score
from lockstep.model.training.pretraining import Pretraining
from lockstep.model.training.trainer import Trainer
from lockstep.rl.algorithms.config import ReferenceConfig
from lockstep.rl.algorithms.estimates import scores_of
from lockstep.rl.weight_sync.shards import Shard, messages_of, signed
from lockstep.rl.workers.rank import RankWorker
from lockstep.rl.workers.reference_model import ReferenceModel, Saved


class ModelWorker(RankWorker):
    """One rank of the trainer's world."""

    def __init__(self, rank: int, role: str, layout: Layout, config: TrainerConfig) -> None:
        self.role = role
        super().__init__(rank)
        self.layout, self.config = layout, config
        self.trace: Trace | None = None

    def start(
        self,
        address: str,
        port: int,
        checkpoint: Path | Storage,
        dtype: str,
        optimizer: OptimizerConfig | None,
        temperature: float,
        numerics: Numerics = "fast",
        head: Head | None = None,
    ) -> None:
        """Join the world and fill this rank's part of the model.

        Args:
            optimizer: of a model that learns; one that only scores has none.
            head: in the place of the head that the checkpoint has.
        """
        groups = join(self.layout, rank=self.rank, meeting=meeting_at(address, port))
        source = manager.Checkpoint(checkpoint)
        self.model = ModelConfig(**source.manifest["model"])
        self.tokenizer_files = source.files
        weights = Recast(source, self.model, dtype) if dtype == "float32" else source
        self.stage = build(self.model, groups, DTYPES[dtype], weights, numerics, head=head)
        self.model = transformer_of(self.stage).model
        self.groups, self.temperature = groups, temperature
        if optimizer:
            self.trainer = Trainer(self.stage, groups, optimizer, temperature=temperature, config=self.config)
        self.reference: ReferenceModel | None = None
        self.log.info("ready with %s", self.layout)

    def begin_phase(self, reference: ReferenceConfig | None = None) -> None:
        """Forget the optimizer's moments; with a reference, remember the weights as they are now."""
        self.trainer.engine.forget()
        self.reference = None
        if reference and not reference.moves and self.trainer.is_base():
            self.reference = ReferenceModel(self.trainer.base, reference)
        elif reference:
            with self.trainer.engine.whole_weights():
                held = LocalWeights(self.trainer.transformer)
                self.reference = ReferenceModel(self._copy(held), reference)

    def resume_phase(self, reference: ReferenceConfig, weights: Path | Storage) -> None:
        """Go on with a reference, moments as they are.

        Args:
            weights: the checkpoint that it is; of one that moves, the policy's, which holds it, too.
        """
        source = manager.Checkpoint(weights)
        saved = Saved(source) if reference.moves else None
        self.reference = ReferenceModel(self._copy(saved or source), reference, saved)

    def _copy(self, source: Source) -> Stage:
        """A model like the policy."""
        return build(self.model, self.groups, self.trainer.dtype, source, self.trainer.transformer.numerics)

    def update(self, step: int, rows: list[TokenBatch], objective: Objective, learning_rate: float) -> StepResult:
        """One gradient step from this data rank's rows, compared with the reference where one is kept."""
        self.step = step
        stage = self.reference.stage if self.reference else None
        return self._ended(self.trainer.step(rows, objective, learning_rate, stage))

    def measure(self, rows: list[TokenBatch], objective: Objective) -> dict[str, float]:
        """What an objective reports over this data rank's rows and all others', without an update."""
        return self.trainer.measure(rows, objective)

    def follow(self, step: int) -> None:
        """Have the reference take note of the weights after a step, where it does."""
        if self.reference and self.reference.moves:
            with self.trainer.engine.whole_weights():
                self.reference.follow(self.trainer.transformer, step)

    def release(self) -> None:
        """Give memory that a step needed back to those who share this process's device."""
        give_back(next(self.stage.module.parameters()).device)

    def score(self, rows: list[TokenBatch], of: Literal["model", "reference"]) -> tuple[Ints, Floats]:
        """What this model, or its reference, says of the tokens of this data rank's rows; see `scores_of`."""
        stage = self.stage
        if of == "reference":
            assert self.reference
            stage = self.reference.stage
        scores = [each.numpy(force=True) for each in score(stage, self.groups, rows, self.temperature)]
        first = self.groups.tensor_rank == self.groups.context_rank == 0
        return scores_of(rows, scores if first else [])

    def restore(self, checkpoint: Path | Storage) -> None:
        """Take over the optimizer's state of the checkpoint that this rank started from."""
        self.trainer.restore(manager.Checkpoint(checkpoint))

    def open_text(
        self, config: PretrainConfig, data: PretrainingConfig, seed: int, done: int, samples: SampleSchedule
    ) -> None:
        """Open the text to train on, after so many steps, and begin to read ahead."""
        tokenizer = Tokenizer(self.tokenizer_files).digest if self.tokenizer_files else None
        text = PretrainingData(data, seed=seed, vocabulary=self.model.vocabulary, tokenizer=tokenizer)
        rules = row_rules(self.layout, self.config.row_tokens)
        self._pretraining = Pretraining(self.trainer, config, text, rules, done, samples)

    def pretrain(self, step: int) -> StepResult:
        """One gradient step on text."""
        self.step = step
        return self._ended(self._pretraining.step(step))

    def text(self, method: str, *args: Any) -> Any:
        """What a method of `Pretraining` returns."""
        return getattr(self._pretraining, method)(*args)

    def open_trace(self, folder: Path) -> None:
        """Trace the steps from here on; see `Trace`."""
        self.trace = Trace(folder / f"rank-{self.rank}.json")

    def close_trace(self) -> bool:
        """Whether there is a trace."""
        trace, self.trace = self.trace, None
        return trace is not None and trace.close()

    def _ended(self, result: StepResult) -> StepResult:
        """The result of a step, which ends here."""
        if self.trace:
            self.trace.step()
        return result

    def peak_flops(self) -> float:
        """Operations per second of this rank's matrix products, while the others measure theirs."""
        return peak_flops(self.trainer.dtype, next(self.trainer.transformer.parameters()).device)

    def open_weights(self, size: int) -> int:
        """Be ready to hand out weights; how many messages of at most so many bytes those are that this rank owns.

        With ZeRO-3 they are gathered here, once, and stay whole until `close_weights`.
        """
        self._whole = self.trainer.engine.whole_weights()
        self._whole.__enter__()
        self._messages = messages_of(self.trainer.transformer, size)
        return len(self._messages)

    def weights(self, number: int) -> list[Shard]:
        """One of these messages; empty behind the last."""
        return signed(self._messages[number]) if number < len(self._messages) else []

    def broadcast_weights(self) -> bool:
        """Send all messages to the rollout workers; whether they have come."""
        messages = (signed(message) for message in self._messages)
        return self.broadcasts.use(lambda links: links[0].send(messages))

    def close_weights(self) -> None:
        """All messages have been handed out."""
        self._messages = []
        self._whole.__exit__(None, None, None)

    def open_checkpoints(self, folder: Path | Storage, config: CheckpointConfig) -> None:
        """Be ready to save into a folder."""
        self.saver = self._saver(folder, config)
        self.trainer.engine.before_changes = self.saver.copied

    def _saver(self, folder: Path | Storage, config: CheckpointConfig) -> Saver:
        barrier = torch.distributed.barrier
        return Saver(folder, config, rank=self.rank, ranks=self.layout.processes, barrier=barrier)

    def save_reference(self, step: int, folder: Path | Storage) -> None:
        """Write this rank's part of the weights, for runs that go on with them as their reference."""
        saver = self._saver(folder, CheckpointConfig(keep_last=1))
        said = describe(self.model, self.layout)
        saver.save(step, self.trainer.chunks(state=False), said, self.tokenizer_files, wait=True)

    def save(self, step: int, manifest: dict[str, Any], state: bool, best: bool) -> None:
        """Begin to write this rank's part of a checkpoint, with or without the state of optimizer and reference."""
        trainer = self.trainer
        said = describe(self.model, self.layout) | {"updates": trainer.engine.updates} | manifest
        wait, chunks = not self.saver.config.asynchronous, trainer.chunks(state=state)
        if state and self.reference and self.reference.moves:
            chunks += self.reference.chunks()
        self.saver.save(step, chunks, said, self.tokenizer_files, wait=wait, best=best)

    def saved(self) -> None:
        """Return when this rank's part of the last checkpoint is on disk."""
        self.saver.wait()
