"""A grader that hangs, dies or raises costs its own item and nothing else, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import psutil
import pytest

from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.verifiers.answer_pool import AnswerPool, AnswerPoolError, Grader
from tests.cluster.cli_process import until

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.timeout(120)]

HOSTILE = '''
import atexit, ctypes, os, signal, subprocess, sys, time
from lockstep.rl.verdict import Outcome, Verdict

def obey(response: str, answer: str) -> Verdict:
    """Does what the response says, and grades it correct if that ends."""
    if answer == "unreadable":
        any(False for _ in iter(int, 1))
    match response:
        case "once" if not os.path.exists(answer): open(answer, "w").close(); os.kill(os.getpid(), signal.SIGKILL)
        case "sleep": time.sleep(1000)
        case "spin": any(False for _ in iter(int, 1))
        case "deaf": signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)
        case "exit": os._exit(3)
        case "sys.exit": sys.exit(4)
        case "late exit": atexit.register(time.sleep, 1000); sys.exit(5)
        case "segfault": ctypes.string_at(0)
        case "killed": os.kill(os.getpid(), signal.SIGKILL)
        case "recurse": obey(response, answer)
        case "raise": raise ValueError("no such luck")
        case "int": return 1
        case "offspring": subprocess.Popen(["sleep", answer]); time.sleep(1000)
        case "brief": time.sleep(0.3)
        case "print": print("noise", flush=True)
    return Verdict(Outcome.correct, extracted=response)

def tell(response: str, answer: str) -> Verdict:
    return Verdict(Outcome.correct, str(os.getpid()), " ".join(sys.modules))
'''
GOOD = ("good", "")


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Grader]]:
    """Graders by name, from a module that parent and children can import."""
    (tmp_path / "hostile_graders.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path)
    module = import_module("hostile_graders")
    yield lambda name: getattr(module, name)
    del sys.modules["hostile_graders"]


def running(mark: str) -> list[list[str]]:
    """Command lines of all processes of this machine that hold the mark."""
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [command for command in commands if mark in command]


def children() -> list[list[str]]:
    """The pool's processes that this process started: they carry its id as an argument."""
    return [
        command for command in running(str(os.getpid())) if any("verifiers.answer_pool" in word for word in command)
    ]


def until_dead(pid: int) -> None:
    """On a busy machine a killed process may go on for a moment."""
    while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


def test_mathematics_in_order() -> None:
    pairs = [(rf"\boxed{{{n}}}", str(n - n % 3 // 2)) for n in range(20)]
    pairs += [(r"\boxed{\sqrt8}", r"2\sqrt2"), ("4", "???")]
    with AnswerPool(2, 20.0) as pool:
        verdicts = pool.grade(pairs)
        assert pool.grade([]) == []
    assert [verdict.reward for verdict in verdicts] == [float(n % 3 != 2) for n in range(20)] + [1.0, None]


ENDS = [
    ("exit", "incorrect", "grader died with exit code 3"),
    ("sys.exit", "incorrect", "grader died with exit code 4"),
    ("late exit", "incorrect", "grader died with exit code 5"),
    ("segfault", "incorrect", "grader died with exit code -11"),
    ("killed", "incorrect", "grader died with exit code -9"),
    ("spin", "incorrect", "deadline of 0.3 s passed"),
    ("recurse", "incorrect", "grader raised RecursionError"),
    ("raise", "incorrect", "grader raised ValueError: no such luck"),
    ("sleep", "ungradable", "nothing heard in 3.0 s"),
    ("deaf", "ungradable", "nothing heard in 3.0 s"),
    ("offspring", "ungradable", "nothing heard in 3.0 s"),
    ("int", "ungradable", "grader returned int, not a Verdict"),
]


def test_what_a_completion_does_to_its_grader_is_incorrect_and_touches_no_neighbour(
    hostile: Callable[[str], Grader],
) -> None:
    nap = f"1000.{os.getpid()}"
    with AnswerPool(2, 0.3, hostile("obey")) as pool:
        verdicts = pool.grade([pair for name, _, _ in ENDS for pair in (GOOD, (name, nap), GOOD)])
    for place, (name, outcome, reason) in enumerate(ENDS):
        before, item, after = verdicts[3 * place : 3 * place + 3]
        assert before == after == Verdict(Outcome.correct, extracted="good"), name
        assert item.outcome == outcome, name
        assert item.reason.startswith(reason)
    assert children() == running(nap) == []


def test_a_reference_that_no_grader_gets_through_is_ungradable(hostile: Callable[[str], Grader]) -> None:
    with AnswerPool(1, 0.3, hostile("obey")) as pool:
        verdicts = pool.grade([("good", "unreadable"), ("spin", "unreadable"), GOOD])
    assert [verdict.reward for verdict in verdicts] == [None, None, 1.0]


def test_a_child_that_somebody_kills_in_mid_work_costs_nothing(
    hostile: Callable[[str], Grader], tmp_path: Path
) -> None:
    with AnswerPool(1, 5.0, hostile("obey")) as pool:
        assert pool.grade([("once", str(tmp_path / "killed"))])[0].reward == 1.0
    assert (tmp_path / "killed").exists()


def test_only_processor_time_counts(hostile: Callable[[str], Grader]) -> None:
    with AnswerPool(1, 0.1, hostile("obey")) as pool:
        assert {verdict.reward for verdict in pool.grade([("brief", "")] * 3)} == {1.0}


def test_waiting_in_the_queue_does_not_count(hostile: Callable[[str], Grader]) -> None:
    with AnswerPool(1, 1.0, hostile("obey")) as pool:
        assert {verdict.reward for verdict in pool.grade([("brief", "")] * 5)} == {1.0}


def test_children_work_at_the_same_time(hostile: Callable[[str], Grader]) -> None:
    with AnswerPool(4, 5.0, hostile("obey")) as pool:
        pool.grade([("brief", "")] * 4)
        start = time.monotonic()
        pool.grade([("brief", "")] * 8)
    assert time.monotonic() - start < 8 * 0.3


def test_children_are_light_and_outlive_the_thread_that_made_the_pool(hostile: Callable[[str], Grader]) -> None:
    with ThreadPoolExecutor(1) as brief_thread:
        pool = brief_thread.submit(AnswerPool, 1, 5.0, hostile("tell")).result()
        first = brief_thread.submit(pool.grade, [GOOD]).result()[0]
    time.sleep(0.2)
    with pool:
        second = pool.grade([GOOD])[0]
    assert first.reason == second.reason
    assert second.extracted is not None
    assert {"torch", "ray", "numpy", "megatron", "deepspeed"}.isdisjoint(second.extracted.split())


def test_a_child_killed_while_idle_is_replaced_and_costs_no_item(hostile: Callable[[str], Grader]) -> None:
    with AnswerPool(1, 5.0, hostile("tell")) as pool:
        first = pool.grade([GOOD])[0].reason
        os.kill(int(first), signal.SIGKILL)
        until_dead(int(first))
        verdict = pool.grade([GOOD])[0]
    assert verdict.reward == 1.0
    assert verdict.reason != first


def test_close_leaves_no_process_and_may_be_repeated(hostile: Callable[[str], Grader]) -> None:
    with AnswerPool(3, 5.0, hostile("obey")) as pool:
        until(lambda: len(children()) == 3, 30)  # a process that has begun has its arguments a moment later
        pool.close()
        pool.close()
        assert children() == []
        with pytest.raises(AnswerPoolError, match="closed"):
            pool.grade([GOOD])


def test_close_while_grading_ends_the_batch_within_a_deadline(hostile: Callable[[str], Grader]) -> None:
    pool = AnswerPool(1, 0.1, hostile("obey"))
    with ThreadPoolExecutor(1) as other:
        batch = other.submit(pool.grade, [("sleep", "")] * 50)
        time.sleep(0.5)
        pool.close()
        with pytest.raises(AnswerPoolError, match="closed while"):
            batch.result()
    assert children() == []


def test_threads_share_a_pool(hostile: Callable[[str], Grader]) -> None:
    with AnswerPool(2, 5.0, hostile("obey")) as pool, ThreadPoolExecutor(4) as callers:
        batches = list(callers.map(lambda n: pool.grade([(f"{n}.{i}", "") for i in range(20)]), range(4)))
    assert [[v.extracted for v in batch] for batch in batches] == [[f"{n}.{i}" for i in range(20)] for n in range(4)]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_children_die_with_a_parent_that_is_killed_in_mid_work(how: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "hostile_graders.py").write_text(HOSTILE)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from hostile_graders import obey\nfrom lockstep.rl.verifiers.answer_pool import AnswerPool\n"
        "pool = AnswerPool(2, 1000.0, obey)\npool.grade([('good', '')] * 4)\n"
        "print('ready', flush=True)\npool.grade([('sleep', '')])"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        orphans = psutil.Process(parent.pid).children()
        assert len(orphans) == 2
        parent.send_signal(how)
    _, alive = psutil.wait_procs(orphans, timeout=5)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []


def test_a_grader_that_children_cannot_import_is_an_error_not_a_verdict(
    hostile: Callable[[str], Grader], tmp_path: Path
) -> None:
    (tmp_path / "hostile_graders.py").unlink()
    with AnswerPool(1, 1.0, hostile("obey")) as pool, pytest.raises(AnswerPoolError, match="cannot import"):
        pool.grade([GOOD])
    assert children() == []


@pytest.mark.parametrize(("workers", "deadline"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_impossible_pools_are_refused(workers: int, deadline: float) -> None:
    with pytest.raises(ValueError, match="workers >= 1"):
        AnswerPool(workers, deadline)


def test_no_signal_handler_and_no_main_thread_is_needed(hostile: Callable[[str], Grader]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGCHLD, signal.SIGINT)]
    rewards: list[float | None] = []

    def work() -> None:
        with AnswerPool(1, 0.6, hostile("obey")) as pool:
            rewards.extend(verdict.reward for verdict in pool.grade([("spin", ""), GOOD, ("print", "")]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert rewards == [0.0, 1.0, 1.0]
    assert [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGCHLD, signal.SIGINT)] == before
