"""The first signal waits for the step, the second does not, later ones leave clean-up alone, and time runs out."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import pytest

from lockstep.cluster.run.interruption import (
    ALLOCATION_END,
    ALLOCATION_START,
    CLEAN_UP_S,
    JOB_START,
    OUT_OF_TIME,
    Interruption,
    OutOfTime,
    TooShort,
    deadline,
)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def interruption(said: list[str]) -> Iterator[Interruption]:
    with Interruption(60.0, said.append) as found:
        yield found


def take_step(interruption: Interruption, *parts: Callable[[], object]) -> None:
    """A step of a run, of these parts."""
    with interruption.deferred():
        for part in parts:
            part()


def went_on() -> None:
    pytest.fail("the step went on")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_for_the_end_of_the_step(
    number: signal.Signals, interruption: Interruption, said: list[str]
) -> None:
    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        take_step(interruption, lambda: signal.raise_signal(number), lambda: steps.append(1))
    assert steps == [1]
    assert said == [f"{number.name}: the run ends its step and saves, within 60 s; a second signal ends it at once"]
    assert interruption.may_save
    saves: list[int] = []
    assert interruption.end(7, lambda: saves.append(7)) == f"interrupted by {number.name} after step 7, which is saved"
    assert saves == [7]


def test_outside_of_a_step_the_first_signal_ends_the_run_and_it_saves(interruption: Interruption) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert interruption.end(0, lambda: None) == "interrupted by SIGTERM before its first step"
    assert interruption.end(1, lambda: None) == "interrupted by SIGTERM after step 1, which is saved"


def test_a_second_signal_ends_the_step_at_once_and_nothing_is_saved(interruption: Interruption) -> None:
    first, second = (partial(signal.raise_signal, number) for number in (signal.SIGTERM, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        take_step(interruption, first, second, went_on)
    assert not interruption.may_save
    assert interruption.end(3, went_on) == "interrupted by SIGTERM after step 3, which may not be saved"


def test_a_second_signal_ends_the_last_save(interruption: Interruption) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    ended = interruption.end(3, lambda: signal.raise_signal(signal.SIGTERM))
    assert ended == "interrupted by SIGTERM after step 3, which may not be saved"


def test_signals_after_that_leave_the_clean_up_alone(interruption: Interruption) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    for _ in range(3):
        signal.raise_signal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)


def test_time_runs_out(said: list[str]) -> None:
    with Interruption(0.05, said.append) as interruption:
        with pytest.raises(KeyboardInterrupt):
            take_step(interruption, partial(signal.raise_signal, signal.SIGTERM), signal.pause, went_on)
        assert not interruption.may_save


def test_without_time_the_first_signal_ends_the_step(said: list[str]) -> None:
    with Interruption(0.0, said.append) as interruption:
        with pytest.raises(KeyboardInterrupt):
            take_step(interruption, partial(signal.raise_signal, signal.SIGTERM), went_on)
        assert not interruption.may_save
        assert interruption.end(2, went_on).endswith("which may not be saved")
    assert said == []


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption(60.0, print), suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_deadline_ends_the_step_in_time_and_is_no_second_signal(said: list[str]) -> None:
    saves: list[int] = []

    def run() -> None:
        with Interruption(5.0, said.append, time.time() + 5.0 + CLEAN_UP_S + 0.1) as interruption:
            with pytest.raises(KeyboardInterrupt):
                take_step(interruption, signal.pause)
            assert interruption.cause == OUT_OF_TIME
            assert interruption.end(4, lambda: saves.append(4)) == "out of time after step 4, which is saved"
            raise KeyboardInterrupt

    with pytest.raises(OutOfTime):
        run()
    assert saves == [4]
    assert said == ["out of time: the run ends its step and saves, within 5 s; a second signal ends it at once"]


def test_a_signal_before_the_deadline_leaves_the_whole_grace_to_the_save(said: list[str]) -> None:
    with Interruption(60.0, said.append, time.time() + 60.0 + CLEAN_UP_S + 0.2) as interruption:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert interruption.end(4, lambda: time.sleep(0.4)) == "interrupted by SIGTERM after step 4, which is saved"


def test_the_clock_starts_with_the_job_then_the_allocation_then_the_process() -> None:
    assert deadline(None, 120, {}, began=50) is None
    assert deadline(1, 120, {}, began=50) == 3650
    assert deadline(1, 120, {ALLOCATION_START: "10"}, began=50) == 3610
    assert deadline(1, 120, {ALLOCATION_START: "10", JOB_START: "20.5"}, began=50) == 3620.5
    assert deadline(1, 120, {ALLOCATION_END: "3000"}, began=50) == 3000
    assert deadline(None, 120, {ALLOCATION_END: "3000"}, began=50) == 3000
    with pytest.raises(TooShort, match=r"max_hours=0\.04 is 144 s, and 150 s of them are kept"):
        deadline(0.04, 120, {}, began=50)
