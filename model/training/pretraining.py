"""Pretraining steps on one rank: prefetched rows, snapshots and rewinds, the held-out loss."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.data.batch import TokenBatch
from lockstep.data.corpus.loader import PretrainingData
from lockstep.data.corpus.prefetch import Prefetch
from lockstep.data.corpus.sample_schedule import SampleSchedule
from lockstep.data.packing import RowRules
from lockstep.distributed.optimizer.snapshot import Snapshot
from lockstep.distributed.step_result import StepResult
from lockstep.model.objectives.token_loss import nll
from lockstep.model.training.config import PretrainConfig, RetainConfig
from lockstep.model.training.trainer import Trainer


class Pretraining:
    """One rank of a pretraining run."""

    def __init__(
        self,
        trainer: Trainer,
        config: PretrainConfig,
        data: PretrainingData,
        rules: RowRules,
        done: int = 0,
        samples: SampleSchedule | None = None,
        old: PretrainingData | None = None,
    ) -> None:
        """
        Args:
            done: the number of steps that the trainer has taken.
            old: what was learned before, for the Fisher information of `config.retain`.
            samples: the samples that each step reads, if the run was rewound before.
        """
        self._trainer, self._config, self._data, self._rules = trainer, config, data, rules
        self._rank = trainer.groups.data_rank
        self._samples = samples or config.schedule
        if config.retain and config.retain.anchors:
            if not done:
                self._remember(config.retain, old)
            trainer.hold(config.retain)
        self._ahead = self._read_from(done + 1)
        self._snapshot: Snapshot | None = None
        self._held_out = data.held_out_rows(rules, self._rank)

    def _remember(self, retain: RetainConfig, old: PretrainingData | None) -> None:
        """Take the weights for old ones, with their Fisher information over the first samples of old data."""
        samples = [range(n, n + 1) for n in range(retain.fisher_samples if old and retain.ewc else 0)]
        counts = [old.predictions(each) for each in samples] if old else []
        rows = (old.rows(each, self._rules, self._rank) for each in samples) if old else ()
        self._trainer.remember(zip(rows, counts, strict=True), sum(counts))

    def _read_from(self, step: int) -> Prefetch[list[TokenBatch]]:
        return Prefetch(self._rows, range(step, self._config.steps + 1))

    def _rows(self, step: int) -> list[TokenBatch]:
        return self._data.rows(self._samples.samples(step), self._rules, self._rank)

    def step(self, step: int) -> StepResult:
        """Take a step; steps are taken in order. A gradient that is not finite changes no weight."""
        config = self._config
        rate = config.optimizer.rate(step, config.steps)
        result = self._trainer.step(next(self._ahead), nll, rate, z_coefficient=config.z_coefficient)
        if not config.statistics_every or step % config.statistics_every:
            return result
        return replace(result, values=result.values | self._trainer.statistics(result))

    def keep_snapshot(self) -> None:
        """Take a snapshot of weights and optimizer, which replaces the previous one."""
        self._snapshot = None  # frees its memory first
        self._snapshot = self._trainer.engine.snapshot()

    def rewind(self, step: int, samples: SampleSchedule) -> None:
        """Restore the snapshot, which was taken after this step, and read later steps by another schedule."""
        assert self._snapshot is not None
        self._ahead.close()
        self._snapshot.restore()
        self._samples = samples
        self._ahead = self._read_from(step + 1)

    def held_out_loss(self) -> float | None:
        """Mean negative log-likelihood of the held-out tokens in nats, or None where nothing is held out."""
        return self._trainer.measure(self._held_out, nll)["loss"] if self._held_out else None

    def save_batch(self, path: Path, samples: range) -> None:
        """Write these samples as arrays of a .npz file, which `numpy.load` reads without pickle; rank 0 does."""
        if self._trainer.groups.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays: dict[str, Any] = self._data.batch(samples)
            np.savez(path, **arrays)

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._ahead.close()
