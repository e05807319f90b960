"""Which samples each step of a run reads: consecutive ranges, none of which is repeated after a rewind.

A rewind undoes steps, not samples: step numbers, and with them learning rates, begin again behind the snapshot,
while sample numbers go on behind the spike. PaLM did the same by hand (Chowdhery et al. 2022, section 5.1).
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rewind:
    """The steps after `snapshot`, up to and including `spike`, were undone; both are counted from 1."""

    snapshot: int
    spike: int


@dataclass(frozen=True)
class SampleSchedule:
    """The samples of each step: a function of the samples per step and of the rewinds so far, in order.

    A rewind goes to the last snapshot, so that none goes farther back than the one before it.
    """

    samples_per_step: int
    rewinds: tuple[Rewind, ...] = ()

    def samples(self, step: int) -> range:
        """Sample numbers of a step, which is counted from 1; for a step that was repeated, of its last repetition."""
        behind = sum(r.spike - r.snapshot for r in self.rewinds if r.snapshot < step)
        first = (step - 1 + behind) * self.samples_per_step
        return range(first, first + self.samples_per_step)

    def after(self, rewind: Rewind) -> "SampleSchedule":
        """The schedule of a run after another rewind."""
        assert rewind.snapshot < rewind.spike
        assert all(r.snapshot <= rewind.snapshot for r in self.rewinds)
        return replace(self, rewinds=(*self.rewinds, rewind))

    @property
    def left_out(self) -> tuple[range, ...]:
        """Samples of the undone steps, which the weights have not been trained on: a range for each rewind."""
        before = (replace(self, rewinds=self.rewinds[:i]) for i in range(len(self.rewinds)))
        return tuple(
            range(b.samples(r.snapshot + 1).start, b.samples(r.spike).stop)
            for b, r in zip(before, self.rewinds, strict=True)
        )
