"""Samples come in order and once, whatever is taken back; steps keep their numbers."""

from hypothesis import given
from hypothesis import strategies as st

from lockstep.data.corpus.sample_schedule import Rewind, SampleSchedule


def test_without_rewinds_samples_follow_each_other() -> None:
    schedule = SampleSchedule(4)
    assert [schedule.samples(step) for step in (1, 2, 3)] == [range(0, 4), range(4, 8), range(8, 12)]
    assert schedule.left_out == ()


def test_after_a_rewind_steps_begin_again_and_samples_do_not() -> None:
    schedule = SampleSchedule(10).after(Rewind(2, 5))
    assert [schedule.samples(step).start for step in (1, 2, 3, 4)] == [0, 10, 50, 60]
    assert schedule.left_out == (range(20, 50),)
    again = schedule.after(Rewind(2, 3))
    assert [again.samples(step).start for step in (1, 2, 3, 4)] == [0, 10, 60, 70]
    assert again.left_out == (range(20, 50), range(50, 60))


@given(st.integers(1, 5), st.integers(1, 4), st.lists(st.booleans(), max_size=40))
def test_a_run_reads_every_sample_once_and_in_order(per_step: int, every: int, spikes: list[bool]) -> None:
    """Walk through a run: each step is a spike or is not, and every few steps there is a snapshot."""
    schedule, step, snapshot = SampleSchedule(per_step), 0, 0
    read: list[int] = []
    standing: dict[int, range] = {}
    for spike in spikes:
        step += 1
        standing[step] = schedule.samples(step)
        read += standing[step]
        if spike:
            schedule = schedule.after(Rewind(snapshot, step))
            standing = {s: samples for s, samples in standing.items() if s <= snapshot}
            step = snapshot
        elif step % every == 0:
            snapshot = step
    assert read == list(range(per_step * len(spikes)))
    assert list(standing) == list(range(1, step + 1))
    assert all(schedule.samples(s) == samples for s, samples in standing.items())
    kept = [n for samples in standing.values() for n in samples]
    left_out = [n for samples in schedule.left_out for n in samples]
    assert sorted(kept + left_out) == read
    assert schedule.samples(step + 1).start == len(read)
