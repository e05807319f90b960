"""Rewinds behind loss spikes: snapshots, the losses since, and the samples that are skipped afterwards."""

from collections.abc import Sequence

from lockstep.data.corpus.sample_schedule import Rewind, SampleSchedule
from lockstep.model.training.loss_spikes import SpikeConfig, is_spike
from lockstep.rl.workers.stubs import ModelWorker
from lockstep.rl.workers.worker_groups import ModelGroup


class Rewinds:
    """Takes snapshots on the trainer's ranks and rewinds to them; without a configuration it sees no spikes."""

    def __init__(
        self, config: SpikeConfig | None, samples: SampleSchedule, policy: ModelGroup, losses: Sequence[float] = ()
    ) -> None:
        """
        Args:
            losses: of the steps that stand already.
        """
        self.samples = samples
        """What each step reads."""
        self._config, self._policy = config, policy
        self._losses = list(losses)
        self._keep_snapshot()

    @property
    def left(self) -> int:
        """How many more rewinds are allowed."""
        return self._config.rewinds - len(self.samples.rewinds) if self._config else 0

    def is_spike(self, loss: float) -> bool:
        """Whether the loss of the next step is a spike compared with those before."""
        return self._config is not None and is_spike(loss, self._losses, self._config)

    def _keep_snapshot(self) -> None:
        """Remember weights and optimizer as they are."""
        self._snapshot = len(self._losses)
        if self._config:
            self._policy.call(ModelWorker.keep_snapshot)

    def stand(self, loss: float) -> None:
        """Accept a step's loss; takes a snapshot where one is due."""
        self._losses.append(loss)
        if self._config and len(self._losses) % self._config.snapshot_every == 0:
            self._keep_snapshot()

    def take_back(self, step: int) -> int:
        """Rewind from a spike to the last snapshot and skip samples up to the spike; returns the snapshot's step."""
        self.samples = self.samples.after(Rewind(self._snapshot, step))
        self._policy.call(ModelWorker.rewind, self._snapshot, self.samples)
        del self._losses[self._snapshot :]
        return self._snapshot

    def metrics(self) -> dict[str, int]:
        """Counts of rewinds and of skipped samples; empty without a configuration."""
        if not self._config:
            return {}
        return {"rewinds": len(self.samples.rewinds), "samples_left_out": sum(map(len, self.samples.left_out))}
