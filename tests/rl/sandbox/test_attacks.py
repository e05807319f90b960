"""No attack is judged correct, hangs, leaves a process behind or touches anything outside."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from lockstep.rl.sandbox.isolation import NOTHING, Isolation, SandboxLimits
from lockstep.rl.verdict import Outcome
from lockstep.rl.verifiers.code_pool import CodePool
from tests.rl.sandbox.answer_attacks import (
    ANSWER_ATTACKS,
    COUNT,
    EACH,
    IMPORTED,
    LOOP,
    MATH,
    METHOD,
    NUMPY,
    PYTEST,
    STEERING,
)
from tests.rl.sandbox.attacks import ATTACKS as PROGRAM_ATTACKS
from tests.rl.sandbox.attacks import DOUBLE, ENDINGS, FORGERIES, NETWORK, SIGNALS, SUM, Attack

ATTACKS = [*PROGRAM_ATTACKS, *ANSWER_ATTACKS]
LIMITS = SandboxLimits(seconds=0.7, folder_bytes=1 << 22, output_bytes=1 << 20, memory_bytes=1 << 29)
WORKERS = 2
RIGHT = "def double(values):\n    return [2 * one for one in values]"
HONEST = [
    *((RIGHT, tests) for tests in (DOUBLE, LOOP, EACH, IMPORTED, PYTEST, NUMPY)),
    ("def double(value):\n    return 2 * value", MATH),
    ("def double(values):\n    return 2", COUNT),
    ("class Solution:\n    def double(self, values): return [2]", METHOD),
    ("print(sum(map(int, input().split())))", SUM),
]
SECCOMP = Isolation(namespaces=False, landlock=False)
LANDLOCK = Isolation(namespaces=False)


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file and a variable of the parent that no program may read."""
    monkeypatch.setenv("SANDBOX_SECRET", "the tests")
    path = tmp_path / "tests.py"
    path.write_text(DOUBLE.program)
    return path


@pytest.fixture
def port() -> Iterator[socket.socket]:
    """A server that nobody may reach."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


@pytest.fixture(autouse=True)
def files() -> Iterator[None]:
    """A process of many files, as one that trains is: what a sandbox inherits from it has high numbers."""
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(400)]
    yield
    for file in held:
        os.close(file)


def judge(attacks: list[Attack], uses: Isolation, secret: Path, port: socket.socket) -> list[str]:
    """What each attack got that was judged correct or ungradable, after all of it was seen to leave no trace."""
    begun, before = time.time(), state(secret)
    with CodePool(WORKERS, LIMITS, requires=NOTHING, uses=uses) as pool:
        assert pool.isolation == uses, "the kernel does not grant what this test is about"
        assert [verdict for verdict in pool.grade(HONEST) if verdict.outcome is not Outcome.correct] == []
        kept = zygotes(begun)
        places = dict(file=secret, port=port.getsockname()[1], parent=os.getpid())
        items = [(attack.completion(**places), attack.tests) for attack in attacks]
        started = time.monotonic()
        verdicts = pool.grade(items)
        assert time.monotonic() - started < len(attacks) * (3 * LIMITS.seconds + 1) / WORKERS + 10, "something hung"
        failed = [(a.name, v.reason) for a, v in zip(attacks, verdicts, strict=True) if v.outcome is Outcome.ungradable]
        assert zygotes(begun) == kept, f"a zygote died, or a process was left behind: {failed}"
        assert [verdict for verdict in pool.grade(HONEST) if verdict.outcome is not Outcome.correct] == []
    # The kernel kills what a killed process had started; it is gone when it has had its turn on a processor.
    assert all(gone(pid) for pid in zygotes(begun))
    assert state(secret) == before
    with pytest.raises(BlockingIOError):
        port.accept()
    return [
        f"{attack.name}: {verdict.outcome} {verdict.reason}"
        for attack, verdict in zip(attacks, verdicts, strict=True)
        if verdict.outcome is not Outcome.incorrect
    ]


def state(secret: Path) -> dict[str, object]:
    """What an attack could have changed: our descriptors, limits, priority, folder and files."""
    process = psutil.Process()
    return {
        "descriptors": process.num_fds(),
        "limits": process.rlimit(psutil.RLIMIT_NOFILE),
        "priority": process.nice(),
        "files": {path.name: path.read_text() for path in secret.parent.iterdir()},
        "folder": sorted(os.listdir()),
        "results": os.path.exists("/tmp/result.json"),
    }


def zygotes(begun: float) -> set[int]:
    """Processes of sandboxes with these limits, wherever in the tree, that were started since."""
    found, settings = set(), json.dumps(asdict(LIMITS))
    for process in psutil.process_iter(["pid", "cmdline", "create_time"]):
        line = " ".join(process.info["cmdline"] or [])
        if settings in line and process.info["create_time"] > begun - 1 and descends(process):
            found.add(process.info["pid"])
    return found


def gone(pid: int) -> bool:
    """Whether a process ends by itself in time."""
    with suppress(psutil.NoSuchProcess):
        return not psutil.wait_procs([psutil.Process(pid)], timeout=5)[1]
    return True


def descends(process: psutil.Process) -> bool:
    """Whether it is ours, or nobody's."""
    try:
        parents = [parent.pid for parent in process.parents()]
    except psutil.NoSuchProcess:
        return False
    return os.getpid() in parents or set(parents) <= {1}


def test_there_are_at_least_forty_attacks_of_different_names() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(names) == len(set(names)) >= 40


ELSEWHERE = """
from lockstep.rl.verifiers.code_pool import CodePool
from lockstep.rl.sandbox.isolation import NOTHING

with CodePool(1, requires=NOTHING, uses=NOTHING):
    print("ready", flush=True)
    input()
"""


def test_processes_of_pools_that_other_tests_killed_are_not_counted() -> None:
    begun = time.time()
    with subprocess.Popen([sys.executable, "-c", ELSEWHERE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        [zygote] = psutil.Process(other.pid).children()
        zygote.suspend()  # else it ends with its pool, sooner or later
        other.kill()
    try:
        assert zygotes(begun) == set()
    finally:
        zygote.kill()


def test_no_attack_is_judged_correct(secret: Path, port: socket.socket) -> None:
    assert judge(ATTACKS, Isolation(), secret, port) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("uses", [LANDLOCK, Isolation(landlock=False), Isolation(seccomp=False)], ids=str)
def test_any_two_walls_hold_alone(uses: Isolation, secret: Path, port: socket.socket) -> None:
    assert judge(ATTACKS, uses, secret, port) == []


@pytest.mark.exhaustive
def test_seccomp_alone_keeps_all_but_the_users_files(secret: Path, port: socket.socket) -> None:
    quick = [attack for attack in ATTACKS if attack.name in {**SIGNALS, **FORGERIES, **NETWORK, **ENDINGS, **STEERING}]
    assert judge(quick, SECCOMP, secret, port) == []
