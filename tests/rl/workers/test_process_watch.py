"""A worker whose process is stopped for too long is ended and named; one that works or waits never is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from lockstep.rl.remote import WorkerDied, gather
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.workers.process_watch import ProcessState, ProcessWatch, StoppedProcesses, end_stopped, process_state
from lockstep.rl.workers.stubs import VerifierWorker
from lockstep.rl.workers.worker_groups import VerifierGroup
from tests.cluster.cli_process import until
from tests.rl.conftest import Actors

HOLDS_THE_LOCK = "import re; print(flush=True); re.match(r'(a+)+$', 'a' * 40 + 'b')"
"""Hours of work in one call of C code, during which no other thread of the interpreter runs."""


def test_time_counts_while_a_process_is_stopped_and_does_not_run_in_between() -> None:
    stopped, running = ProcessState("T", 7), ProcessState("R", 7)
    seen = StoppedProcesses()
    assert seen.seconds(10.0, {"a": stopped, "b": running, "c": None}) == {"a": 0.0}
    assert seen.seconds(14.0, {"a": stopped, "b": stopped}) == {"a": 4.0, "b": 0.0}
    assert seen.seconds(15.0, {"a": ProcessState("T", 8), "b": stopped}) == {"a": 0.0, "b": 1.0}
    assert seen.seconds(16.0, {"a": ProcessState("t", 8), "b": ProcessState("D", 7)}) == {}


@pytest.mark.parametrize(("program", "letters"), [(HOLDS_THE_LOCK, "R"), ("print(flush=True); input()", "S")])
def test_a_process_that_works_or_waits_is_not_stopped(program: str, letters: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdin
    try:
        process.stdout.readline()
        until(lambda: letter(process.pid) in letters, 10)
        assert not end_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        until(lambda: letter(process.pid) == "T", 10)
        assert end_stopped(process.pid)
        assert process.wait(10) == -signal.SIGKILL
        assert process_state(process.pid) is None
    finally:
        process.kill()
        process.stdout.close()
        process.stdin.close()


def letter(pid: int) -> str:
    state = process_state(pid)
    return state.letter if state else ""


@pytest.fixture
def watched(actors: Actors) -> tuple[VerifierGroup, Callable[[], int]]:
    """Two verifiers, and how to stop the first."""
    group = VerifierGroup(VerifierConfig(workers=2))
    _, pid = gather([worker.place() for worker in group.workers])[0]  # other calls may be answered before this one

    def stop() -> int:
        os.kill(pid, signal.SIGSTOP)
        return pid

    return group, stop


def test_a_stopped_worker_counts_as_dead_and_is_named(watched: tuple[VerifierGroup, Callable[[], int]]) -> None:
    group, stop = watched
    said: list[str] = []

    def ask() -> None:
        with ProcessWatch(lambda: group.workers, 1.0, said.append):
            gather([worker.call(VerifierWorker.loaded) for worker in group.workers])

    pid, began = stop(), time.monotonic()
    with pytest.raises(WorkerDied, match=r"^verifier 0 died: its process \d+ was stopped by a signal for \d+ s"):
        ask()
    assert time.monotonic() - began > 1
    until(lambda: process_state(pid) is None, 30)  # a kernel ends what is killed when it gets to it
    assert len(said) == 1
    assert said[0].startswith(f"verifier 0 counts as dead: its process {pid} was stopped by a signal for ")
    with pytest.raises(WorkerDied, match="verifier 1"):  # all are ended where one has died
        gather([group.workers[1].call(VerifierWorker.pid)])


def test_a_short_stall_changes_nothing(watched: tuple[VerifierGroup, Callable[[], int]]) -> None:
    group, stop = watched
    said: list[str] = []
    with ProcessWatch(lambda: group.workers, 30.0, said.append):
        pid = stop()
        call = group.workers[0].call(VerifierWorker.pid)
        time.sleep(1)
        os.kill(pid, signal.SIGCONT)
        assert gather([call]) == [pid]
    assert said == []
    for worker in group.workers:
        worker.end()
