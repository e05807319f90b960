"""Rewinds of a run: which losses stand, where its last snapshot is, and what it reads after steps were taken back."""

from collections.abc import Sequence

from lockstep.data.corpus.sample_schedule import Rewind, SampleSchedule
from lockstep.model.training.loss_spikes import SpikeConfig, is_spike
from lockstep.rl.workers.worker_groups import ModelGroup


class Rewinds:
    """Keeps snapshots in the trainer's ranks and goes back to them; without a configuration it sees no spikes."""

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
        """How many spikes the run may still go back behind."""
        return self._config.rewinds - len(self.samples.rewinds) if self._config else 0

    def is_spike(self, loss: float) -> bool:
        """Whether the loss of the next step is a spike beside those that stand."""
        return self._config is not None and is_spike(loss, self._losses, self._config)

    def _keep_snapshot(self) -> None:
        """Remember weights and optimizer as they are."""
        self._snapshot = len(self._losses)
        if self._config:
            self._policy.call("text", "keep_snapshot")

    def stand(self, loss: float) -> None:
        """Count a step among those that stand."""
        self._losses.append(loss)
        if self._config and len(self._losses) % self._config.snapshot_every == 0:
            self._keep_snapshot()

    def take_back(self, step: int) -> int:
        """Go back from a spike to the last snapshot, and on with samples after the spike's; returns its step."""
        self.samples = self.samples.after(Rewind(self._snapshot, step))
        self._policy.call("text", "rewind", self._snapshot, self.samples)
        del self._losses[self._snapshot :]
        return self._snapshot

    def metrics(self) -> dict[str, int]:
        """How often the run went back, and how many samples it left out; nothing where it does not look for spikes."""
        if not self._config:
            return {}
        return {"rewinds": len(self.samples.rewinds), "samples_left_out": sum(map(len, self.samples.left_out))}
