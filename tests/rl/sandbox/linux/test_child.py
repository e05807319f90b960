"""A child's seconds on a processor, and those that it waited for one."""

import os
import time

import pytest

from lockstep.rl.sandbox.linux.child import Child, open_processes


@pytest.fixture
def processes() -> int:
    opened = open_processes()
    if opened is None:
        pytest.skip("this kernel does not tell how long threads wait")
    return opened


def forked(life: str, processes: int | None) -> Child:
    pid = os.fork()
    if pid == 0:
        try:
            exec(life)
        finally:
            os._exit(3)
    return Child(pid, processes)


def test_a_child_that_sleeps_neither_works_nor_waits_and_its_end_is_told(processes: int) -> None:
    child = forked("import time\ntime.sleep(1000)", processes)
    begun = time.monotonic()
    while time.monotonic() < begun + 0.2:
        pass
    waited = child.waited()
    assert waited is not None
    assert child.used() + waited < 0.2
    os.kill(child.pid, 9)
    assert child.await_end() == "was ended by SIGKILL"
    assert forked("1 / 0", None).await_end() == "ended with exit code 3"


def test_children_that_share_a_processor_wait_for_it(processes: int) -> None:
    spin = f"import os\nos.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}])\nwhile True: pass"
    children = [forked(spin, processes) for _ in range(3)]
    try:
        begun = time.monotonic()
        while (waits := [child.waited() or 0.0 for child in children]) and sum(waits) < 0.3:
            assert time.monotonic() < begun + 20, waits
    finally:
        for child in children:
            child.kill()
    os.close(processes)


def test_a_child_whose_kernel_does_not_tell_says_so() -> None:
    child = forked("import time\ntime.sleep(1000)", None)
    assert child.waited() is None
    child.kill()
