"""Which samples each step of a run learns from: consecutive ranges, none of which comes a second time after a rewind.

A rewind takes steps back, not samples: step numbers, and with them learning rates, begin again behind the snapshot,
while sample numbers go on behind the spike. PaLM did the same by hand (Chowdhery et al. 2022, section 5.1).
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rewind:
    """Steps after `snapshot`, up to and with `spike`, were taken back; both are counted from 1."""

    snapshot: int
    spike: int


@dataclass(frozen=True)
class SampleSchedule:
    """Samples by step: a function of how many make a step and of the rewinds so far, in the order in which they came.

    A rewind goes to the last snapshot, so that none goes farther back than the one before it.
    """

    samples_per_step: int
    rewinds: tuple[Rewind, ...] = ()

    def samples(self, step: int) -> range:
        """Numbers of the samples of a step, counted from 1; for a step that was taken back, of its last repetition."""
        behind = sum(r.spike - r.snapshot for r in self.rewinds if r.snapshot < step)
        first = (step - 1 + behind) * self.samples_per_step
        return range(first, first + self.samples_per_step)

    def after(self, rewind: Rewind) -> "SampleSchedule":
        """The schedule that a run goes on with."""
        assert rewind.snapshot < rewind.spike
        assert all(r.snapshot <= rewind.snapshot for r in self.rewinds)
        return replace(self, rewinds=(*self.rewinds, rewind))

    @property
    def left_out(self) -> tuple[range, ...]:
        """Samples that were seen and have left no trace in the weights, a range for each rewind."""
        before = (replace(self, rewinds=self.rewinds[:i]) for i in range(len(self.rewinds)))
        return tuple(
            range(b.samples(r.snapshot + 1).start, b.samples(r.spike).stop)
            for b, r in zip(before, self.rewinds, strict=True)
        )
