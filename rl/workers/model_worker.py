"""ModelWorker: one rank of a model that is trained or scores tokens: policy, critic, reward model, reference, teacher.

The controller makes the same calls on all ranks of a model.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch

from lockstep.data.batch import Floats, Ints, TokenBatch
from lockstep.data.corpus.loader import PretrainingConfig, PretrainingData
from lockstep.data.corpus.sample_schedule import SampleSchedule
from lockstep.data.packing import PlannedRow
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.saver import CheckpointConfig, Saver
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.distributed.checkpoint.tensors import Source
from lockstep.distributed.device import give_back
from lockstep.distributed.layout import Layout
from lockstep.distributed.pipeline import Stage
from lockstep.distributed.profiler import Trace
from lockstep.distributed.step_result import StepResult
from lockstep.distributed.world.groups import Groups, join
from lockstep.distributed.world.meeting import meeting_at
from lockstep.model.config import Head, ModelConfig, Numerics, describe
from lockstep.model.formats.recast import Recast
from lockstep.model.loading import DTYPES, build, transformer_of
from lockstep.model.objectives.objective import Objective
from lockstep.model.state_dict import LocalWeights, slice_digests
from lockstep.model.training.config import OptimizerConfig, PretrainConfig, TrainerConfig, row_rules
from lockstep.model.training.flops import peak_flops
from lockstep.model.training.forward import score
from lockstep.model.training.pretraining import Pretraining
from lockstep.model.training.trainer import Trainer
from lockstep.rl.algorithms.config import ReferenceConfig
from lockstep.rl.algorithms.estimates import scores_of
from lockstep.rl.weight_sync.protocol import Shard
from lockstep.rl.weight_sync.shards import Part, messages_of, signed
from lockstep.rl.workers.agreement import Loaded, digest_of, loaded
from lockstep.rl.workers.rank import RankWorker
from lockstep.rl.workers.reference_model import ReferenceModel, Saved

Holding = Literal["model", "reference"]
"""The models that a rank may hold."""


class ModelWorker(RankWorker):
    """One rank of a model in any layout, with its trainer, checkpoints and reference model."""

    def __init__(self, rank: int, role: str, layout: Layout, config: TrainerConfig) -> None:
        self.role = role
        super().__init__(rank)
        self.layout, self.config = layout, config
        self.trace: Trace | None = None
        self._session = ExitStack()
        self._messages: list[list[Part]] = []
        self._loaded: dict[str, Loaded] = {}

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
        """Joins the model's process groups and loads this rank's part of a checkpoint.

        Args:
            optimizer: of a model that learns; None for one that only scores.
            temperature: that logits are divided by.
            head: replaces the head that the checkpoint has.
        """
        self._settings = digest_of(self.layout, self.config, dtype, optimizer, temperature, numerics, head)
        groups = self._joined(address, port)
        source = manager.Checkpoint(checkpoint)
        self.model = ModelConfig(**source.manifest["model"])
        self.tokenizer_files = source.files
        weights = Recast(source, self.model, dtype) if dtype == "float32" else source
        self.stage = build(self.model, groups, DTYPES[dtype], weights, numerics, head=head)
        self.model = transformer_of(self.stage).model
        self.groups, self.temperature = groups, temperature
        self._note_loaded("model", source, self.stage)
        if optimizer:
            self.trainer = Trainer(self.stage, groups, optimizer, temperature=temperature, config=self.config)
        self.reference: ReferenceModel | None = None
        self.log.info("ready with %s", self.layout)

    def _joined(self, address: str, port: int) -> Groups:
        return join(self.layout, rank=self.rank, meeting=meeting_at(address, port))

    def enter_phase(self, optimizer: OptimizerConfig, temperature: float) -> None:
        """Sets the optimizer's hyperparameters and the temperature of a phase, also of one that is resumed."""
        self.temperature = temperature
        self.trainer.enter_phase(optimizer, temperature)

    def begin_phase(self, reference: ReferenceConfig | None = None) -> None:
        """Resets the optimizer's moments; with a reference, copies the weights as they are now into it."""
        self.trainer.engine.forget()
        self.reference = None
        if reference and not reference.moves and self.trainer.is_base():
            self.reference = ReferenceModel(self.trainer.base, reference)
        elif reference:
            with self.trainer.engine.whole_weights():
                held = LocalWeights(self.trainer.transformer)
                self.reference = ReferenceModel(self._copy(held), reference)

    def resume_phase(self, reference: ReferenceConfig, weights: Path | Storage) -> None:
        """Loads the reference model of a resumed phase; the optimizer's moments stay as they are.

        Args:
            weights: the reference's checkpoint; that of the policy, which holds it too, for a reference that moves.
        """
        source = manager.Checkpoint(weights)
        saved = Saved(source) if reference.moves else None
        self.reference = ReferenceModel(self._copy(saved or source), reference, saved)
        self._note_loaded("reference", source, self.reference.stage)

    def _note_loaded(self, what: Holding, source: manager.Checkpoint, stage: Stage) -> None:
        """Keep digests of weights as they were loaded, before ZeRO splits them."""
        manifest, slices = digest_of(source.manifest), slice_digests(transformer_of(stage))
        self._loaded[what] = loaded(self._settings, manifest, slices)

    def loaded(self, what: Holding = "model") -> Loaded:
        """What this rank loaded as its model, or as the reference beside it."""
        return self._loaded[what]

    def _copy(self, source: Source) -> Stage:
        """A model in the policy's layout with the weights of a source."""
        return build(self.model, self.groups, self.trainer.dtype, source, self.trainer.transformer.numerics)

    def update(self, step: int, rows: list[PlannedRow], objective: Objective, learning_rate: float) -> StepResult:
        """One gradient step on this data rank's rows, which the reference scores, too, where there is one."""
        self.step = step
        stage = self.reference.stage if self.reference else None
        return self._ended(self.trainer.step(_assembled(rows), objective, learning_rate, stage))

    def measure(self, rows: list[PlannedRow], objective: Objective) -> dict[str, float]:
        """Metrics of an objective over the rows of all data ranks, without an update."""
        return self.trainer.measure(_assembled(rows), objective)

    def follow(self, step: int) -> None:
        """Updates a reference model that moves with the weights after a step."""
        if self.reference and self.reference.moves:
            with self.trainer.engine.whole_weights():
                self.reference.follow(self.trainer.transformer, step)

    def release(self) -> None:
        """Frees cached memory of the last step for other processes on the same device."""
        give_back(next(self.stage.module.parameters()).device)

    def score(self, rows: list[PlannedRow], of: Holding) -> tuple[Ints, Floats]:
        """Scores the tokens of this data rank's rows with this model or its reference; see `scores_of`."""
        stage = self.stage
        if of == "reference":
            assert self.reference
            stage = self.reference.stage
        batches = _assembled(rows)
        scores = [each.numpy(force=True) for each in score(stage, self.groups, batches, self.temperature)]
        first = self.groups.tensor_rank == self.groups.context_rank == 0
        return scores_of(batches, scores if first else [])

    def restore(self, checkpoint: Path | Storage) -> None:
        """Loads the optimizer's state from the checkpoint that this rank started from."""
        self.trainer.restore(manager.Checkpoint(checkpoint))

    def open_text(
        self, config: PretrainConfig, data: PretrainingConfig, seed: int, done: int, samples: SampleSchedule
    ) -> None:
        """Opens the pretraining data after so many steps, and begins to read ahead.

        Args:
            done: steps that have been taken before.
            samples: which samples each step reads.
        """
        tokenizer = Tokenizer(self.tokenizer_files).digest if self.tokenizer_files else None

        def opened(data: PretrainingConfig) -> PretrainingData:
            return PretrainingData(data, seed=seed, vocabulary=self.model.vocabulary, tokenizer=tokenizer)

        rules, old = row_rules(self.layout, self.config.row_tokens, self.model), config.old_data
        self._pretraining = Pretraining(
            self.trainer, config, opened(data), rules, done, samples, opened(old) if old else None
        )

    def pretrain(self, step: int) -> StepResult:
        """One gradient step on pretraining data; steps come in order."""
        self.step = step
        return self._ended(self._pretraining.step(step))

    def held_out_loss(self) -> float | None:
        """Mean loss over the held-out text in nats a token; see `Pretraining.held_out_loss`."""
        return self._pretraining.held_out_loss()

    def keep_snapshot(self) -> None:
        """Copies weights and optimizer state into host memory; see `Pretraining.keep_snapshot`."""
        self._pretraining.keep_snapshot()

    def rewind(self, step: int, samples: SampleSchedule) -> None:
        """Goes back to the last snapshot; see `Pretraining.rewind`."""
        self._pretraining.rewind(step, samples)

    def save_batch(self, path: Path, samples: range) -> None:
        """Writes samples into a .npz file; see `Pretraining.save_batch`."""
        self._pretraining.save_batch(path, samples)

    def close_text(self) -> None:
        """Ends the thread that reads ahead."""
        self._pretraining.close()

    def open_trace(self, folder: Path) -> None:
        """Starts a torch.profiler trace of the next steps; see `Trace`."""
        self.trace = Trace(folder / f"rank-{self.rank}.json")

    def close_trace(self) -> bool:
        """Ends the trace; returns whether one was written."""
        trace, self.trace = self.trace, None
        return trace is not None and trace.close()

    def _ended(self, result: StepResult) -> StepResult:
        """Tells the trace that a step has ended; returns its result."""
        if self.trace:
            self.trace.step()
        return result

    def peak_flops(self) -> float:
        """Measures this rank's matrix products in FLOP/s; all ranks measure at the same time."""
        return peak_flops(self.trainer.dtype, next(self.trainer.transformer.parameters()).device)

    def open_weights(self, size: int) -> int:
        """Packs the weights that this rank owns into messages of at most `size` bytes; returns how many there are.

        With ZeRO-3 they are gathered here, once, and stay whole until `close_weights`.
        """
        self._session.enter_context(self.trainer.engine.whole_weights())
        self._messages = messages_of(self.trainer.transformer, size)
        return len(self._messages)

    def weights(self, number: int) -> list[Shard]:
        """The message of this number, from 0; empty after the last one."""
        return signed(self._messages[number]) if number < len(self._messages) else []

    def broadcast_weights(self) -> bool:
        """Broadcasts all messages to the rollout workers; returns whether all have come."""
        messages = (signed(message) for message in self._messages)
        return self.broadcasts.use(lambda links: links[0].send(messages))

    def close_weights(self) -> None:
        """Drops the messages and splits the weights again under ZeRO-3; does nothing where no weights are open."""
        self._messages = []
        self._session.close()

    def open_checkpoints(self, folder: Path | Storage, config: CheckpointConfig) -> None:
        """Prepares to save checkpoints into a folder."""
        self.saver = self._saver(folder, config)
        self.trainer.engine.before_changes = self.saver.copied

    def _saver(self, folder: Path | Storage, config: CheckpointConfig) -> Saver:
        barrier = torch.distributed.barrier
        return Saver(folder, config, rank=self.rank, ranks=self.layout.processes, barrier=barrier)

    def save_reference(self, step: int, folder: Path | Storage) -> None:
        """Writes this rank's part of the weights as the checkpoint that a resumed run takes its reference from."""
        saver = self._saver(folder, CheckpointConfig(keep_last=1))
        said = describe(self.model, self.layout)
        saver.save(step, self.trainer.chunks(state=False), said, self.tokenizer_files, wait=True)

    def save(self, step: int, manifest: dict[str, Any], state: bool, best: bool) -> None:
        """Begins to write this rank's part of a checkpoint, with or without the state of optimizer and reference."""
        trainer = self.trainer
        said = describe(self.model, self.layout) | {"updates": trainer.engine.updates} | manifest
        wait, chunks = not self.saver.config.asynchronous, trainer.chunks(state=state)
        if state and self.reference and self.reference.moves:
            chunks += self.reference.chunks()
        self.saver.save(step, chunks, said, self.tokenizer_files, wait=wait, best=best)

    def saved(self) -> None:
        """Waits until this rank's part of the last checkpoint is on disk."""
        self.saver.wait()


def _assembled(rows: list[PlannedRow]) -> list[TokenBatch]:
    return [row.assembled() for row in rows]
