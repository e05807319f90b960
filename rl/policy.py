"""The policy's processes: each is one rank of the trainer's world, and does what the controller asks of all ranks."""

from pathlib import Path
from typing import Any

import torch

from lockstep.data.batch import TokenBatch
from lockstep.data.loader import PretrainingConfig, PretrainingData
from lockstep.data.schedule import SampleSchedule
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.saver import CheckpointConfig, Saver
from lockstep.distributed.groups import host_meeting, join, meeting_at
from lockstep.distributed.layout import Layout
from lockstep.distributed.result import StepResult
from lockstep.distributed.trace import Trace
from lockstep.model.config import ModelConfig, describe
from lockstep.model.flops import peak_flops
from lockstep.model.formats.recast import Recast
from lockstep.model.loss import Objective
from lockstep.model.pretrain import Pretraining
from lockstep.model.recipes import OptimizerConfig, PretrainConfig, TrainerConfig, row_rules
from lockstep.model.train import DTYPES, Trainer, build
from lockstep.rl.sync import Held, Shard, messages_of, signed
from lockstep.rl.worker import Worker


class PolicyWorker(Worker):
    """One rank of the trainer's world."""

    role = "policy"

    def __init__(self, rank: int, layout: Layout, config: TrainerConfig) -> None:
        super().__init__(rank)
        self.layout, self.config = layout, config
        self.trace: Trace | None = None

    def host(self, address: str) -> int:
        """Host the ranks' meeting at this node's address; returns its port."""
        self._meeting = host_meeting(address)
        return self._meeting.port

    def start(
        self, address: str, port: int, checkpoint: Path, dtype: str, optimizer: OptimizerConfig, temperature: float
    ) -> None:
        """Join the world and fill this rank's part of the model."""
        groups = join(self.layout, rank=self.rank, meeting=meeting_at(address, port))
        source = manager.Checkpoint(checkpoint)
        self.model = ModelConfig(**source.manifest["model"])
        self.tokenizer_files = source.files
        stage = build(
            self.model, groups, DTYPES[dtype], Recast(source, self.model, dtype) if dtype == "float32" else source
        )
        self.trainer = Trainer(stage, groups, optimizer, temperature=temperature, config=self.config)
        self.reference: Any = None
        self.log.info("ready with %s", self.layout)

    def begin_phase(self, *, keep_reference: bool) -> None:
        """Forget the optimizer's moments; with `keep_reference`, remember the weights as they are now."""
        self.trainer.engine.forget()
        if keep_reference:
            with self.trainer.engine.whole_weights():
                here = Held(self.trainer.transformer)
            self.reference = build(self.model, self.trainer.groups, self.trainer.dtype, here)

    def update(self, step: int, rows: list[TokenBatch], objective: Objective, learning_rate: float) -> StepResult:
        """One gradient step from this data rank's rows, compared with the reference where one is kept."""
        self.step = step
        return self._ended(self.trainer.step(rows, objective, learning_rate, self.reference))

    def restore(self, checkpoint: Path) -> None:
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

    def messages(self, size: int) -> int:
        """How many messages of at most so many bytes the weights are that this rank owns."""
        with self.trainer.engine.whole_weights():
            return len(messages_of(self.trainer.transformer, size))

    def weights(self, number: int, size: int) -> list[Shard]:
        """One of these messages; empty behind the last."""
        with self.trainer.engine.whole_weights():
            messages = messages_of(self.trainer.transformer, size)
            return signed(messages[number]) if number < len(messages) else []

    def open_checkpoints(self, folder: Path, config: CheckpointConfig) -> None:
        """Be ready to save into a folder."""
        processes = self.layout.processes
        self.saver = Saver(folder, config, rank=self.rank, ranks=processes, barrier=torch.distributed.barrier)

    def save(self, step: int, manifest: dict[str, Any], state: bool, best: bool) -> None:
        """Begin to write this rank's part of a checkpoint, with the optimizer's state or without."""
        trainer = self.trainer
        said = describe(self.model, self.layout) | {"updates": trainer.engine.updates} | manifest
        wait = not self.saver.config.asynchronous
        self.saver.save(step, trainer.chunks(state=state), said, self.tokenizer_files, wait=wait, best=best)

    def saved(self) -> None:
        """Return when this rank's part of the last checkpoint is on disk."""
        self.saver.wait()
