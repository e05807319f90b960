"""Pretraining on one rank: the rows of each step, made ahead of time, and the held-out loss."""

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from lockstep.data.batch import RowRules, TokenBatch
from lockstep.data.loader import PretrainingConfig, PretrainingData
from lockstep.data.prefetch import Prefetch
from lockstep.data.synthetic import write_random_store
from lockstep.distributed.engine import StepResult
from lockstep.model.config import ModelConfig
from lockstep.model.loss import nll
from lockstep.model.train import OptimizerConfig, Trainer


class PretrainConfig(BaseModel):
    """Training from text, as much as there is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=0)
    samples_per_step: int = Field(32, ge=1, description="samples of data.length tokens in a global batch")
    optimizer: OptimizerConfig = OptimizerConfig()
    z_coefficient: float = Field(0.0, ge=0, description="of the loss that keeps logits small; PaLM took 1e-4")
    evaluate_every: int = Field(0, ge=0, description="steps between measurements of the held-out loss; 0 for the end")
    give_up_after: int = Field(3, ge=1, description="steps in a row without a finite gradient that end the run")
    data: PretrainingConfig | None = Field(None, description="what to read; random documents when it is not there")

    def samples(self, step: int) -> range:
        """Numbers of the samples of a step, counted from 1."""
        return range((step - 1) * self.samples_per_step, step * self.samples_per_step)


def random_data(store: Path, model: ModelConfig, config: PretrainConfig, seed: int) -> PretrainingConfig:
    """Random documents for a recipe that names none: eight steps' worth, then they come again."""
    length = min(32, model.context)
    tokens = max(4096, 8 * config.samples_per_step * length)
    write_random_store(store, vocabulary=model.vocabulary, tokens=tokens, seed=seed, mean_length=length // 2)
    return PretrainingConfig.model_validate({"blend": [{"path": str(store)}], "length": length, "held_out": 0.05})


class Pretraining:
    """One rank's share of a run."""

    def __init__(self, trainer: Trainer, config: PretrainConfig, data: PretrainingData, rules: RowRules) -> None:
        self._trainer, self._config, self._data, self._rules = trainer, config, data, rules
        self._rank = trainer.groups.data_rank
        self._ahead = Prefetch(self._rows, range(1, config.steps + 1))
        self._held_out = data.held_out_rows(rules, self._rank)

    def _rows(self, step: int) -> list[TokenBatch]:
        return self._data.rows(self._config.samples(step), self._rules, self._rank)

    def step(self, step: int) -> StepResult:
        """The next update; steps are taken in order. A gradient that is not finite changes nothing."""
        rate = self._config.optimizer.rate(step, self._config.steps)
        return self._trainer.step(next(self._ahead), nll, rate, z_coefficient=self._config.z_coefficient)

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
