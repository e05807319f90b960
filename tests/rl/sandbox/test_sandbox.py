"""A sandbox says how it isolates, refuses to start with less than is required, and its failure costs one item."""

import json
import os
import platform
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.data.tasks.code_tests import CodeTests
from lockstep.rl.sandbox.isolation import NOTHING, Isolation, SandboxError, SandboxLimits
from lockstep.rl.sandbox.seccomp import filter_program
from lockstep.rl.sandbox.wire import MalformedError, decode, encode
from lockstep.rl.sandbox.zygote import DEADLINE, STARVED, Allowance
from lockstep.rl.verdict import Outcome
from lockstep.rl.verifiers.code_pool import CodePool

TESTS = CodeTests("assert f(1) == 1", "f")
RIGHT = "def f(x): return x"
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
VALUES = st.recursive(
    PLAIN | st.complex_numbers(allow_nan=False) | st.fractions() | st.decimals(allow_nan=False),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(PLAIN, inner) | st.frozensets(PLAIN),
)


def test_isolation_is_one_line_and_says_what_it_lacks() -> None:
    some = Isolation(seccomp=False)
    assert str(some) == "code sandbox: namespaces on, seccomp OFF, landlock on"
    assert some.lacks(Isolation()) == ("seccomp",)
    assert some.lacks(NOTHING) == ()


def test_a_pool_refuses_to_start_with_less_than_is_required() -> None:
    with pytest.raises(SandboxError, match="without namespaces, which this pool requires"):
        CodePool(1, requires=Isolation(seccomp=False, landlock=False), uses=NOTHING)
    assert not [child for child in psutil.Process().children() if "sandbox.entrypoint" in " ".join(child.cmdline())]


def test_what_a_pool_says_stands_was_asked_for() -> None:
    with CodePool(1, requires=NOTHING, uses=NOTHING) as pool:
        assert pool.isolation == NOTHING
        assert [verdict.outcome for verdict in pool.grade([(RIGHT, TESTS)])] == [Outcome.correct]


def test_a_zygote_that_dies_costs_one_item_and_is_replaced() -> None:
    with CodePool(1, SandboxLimits(seconds=3), requires=NOTHING) as pool:
        assert pool.grade([(RIGHT, TESTS)])[0].outcome is Outcome.correct
        [zygote] = [each for each in psutil.Process().children() if "sandbox.entrypoint" in " ".join(each.cmdline())]
        below = zygote.children(recursive=True)
        os.kill(zygote.pid, signal.SIGKILL)
        assert not psutil.wait_procs(below, timeout=10)[1]  # one that is still dying may answer, and rightly
        first, *rest = pool.grade([(RIGHT, TESTS)] * 3)
        assert (first.outcome, first.reason) == (Outcome.ungradable, "the sandbox failed (exit code -9)")
        assert [verdict.outcome for verdict in rest] == [Outcome.correct] * 2


ODD_NAME = """
import ctypes, os, time
if os.fork() == 0:
    ctypes.CDLL(None).prctl(15, b'\\xff', 0, 0, 0)
    time.sleep(1000)
time.sleep(0.1)
"""


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os\nos.kill(os.getpid(), 40)", "the program was ended by signal 40 while it was loaded"),
        (ODD_NAME, ""),
    ],
    ids=["a signal without a name", "a name that is no text"],
)
def test_a_zygote_outlives_what_programs_can_do_without_isolation(program: str, reason: str) -> None:
    with CodePool(1, SandboxLimits(seconds=3), requires=NOTHING, uses=NOTHING) as pool:
        verdicts = pool.grade([(f"{program}\n{RIGHT}", TESTS), (RIGHT, TESTS)])
        assert [verdict.outcome for verdict in verdicts] == [
            Outcome.incorrect if reason else Outcome.correct,
            Outcome.correct,
        ]
        assert verdicts[0].reason == reason


def test_a_zygote_that_cannot_be_replaced_is_replaced_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with CodePool(1, requires=NOTHING, uses=NOTHING) as pool:
        [zygote] = [each for each in psutil.Process().children() if "sandbox.entrypoint" in " ".join(each.cmdline())]
        zygote.kill()
        assert pool.grade([(RIGHT, TESTS)])[0].outcome is Outcome.ungradable
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/bin/false")
            with pytest.raises(SandboxError, match=r"does not start \(exit code 1\)"):
                pool.grade([(RIGHT, TESTS)])
        assert pool.grade([(RIGHT, TESTS)])[0].outcome is Outcome.correct


def test_a_zygote_waits_for_its_children_where_its_parent_ignores_its_own() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with CodePool(1, requires=NOTHING, uses=NOTHING) as pool:
            assert pool.grade([(RIGHT, TESTS)])[0].outcome is Outcome.correct
    finally:
        signal.signal(signal.SIGCHLD, before)


SLOW = "import time\ndef f(x):\n    while time.process_time() < 0.3: pass\n    return x"


@contextmanager
def busy(processor: int, loops: int) -> Iterator[None]:
    """Loops on one processor, each in a session of its own: Linux shares processors out to sessions."""
    line = f"import os\nos.sched_setaffinity(0, [{processor}])\nwhile True: pass"
    working = [subprocess.Popen([sys.executable, "-S", "-c", line], start_new_session=True) for _ in range(loops)]
    try:
        yield
    finally:
        for process in working:
            process.kill()
            process.wait()


def test_a_program_that_others_keep_from_a_processor_is_not_incorrect() -> None:
    processor = min(os.sched_getaffinity(0))
    with CodePool(1, SandboxLimits(seconds=0.7), requires=NOTHING) as pool:
        for process in psutil.Process().children(recursive=True):
            if "sandbox.entrypoint" in " ".join(process.cmdline()):
                process.cpu_affinity([processor])
        with busy(processor, loops=4):  # 0.3 s take 1.5
            (verdict,) = pool.grade([(SLOW, TESTS)])
        assert verdict.outcome is Outcome.correct or verdict.reason.startswith("in 10.0 s the machine had less than")
        (verdict,) = pool.grade([("import time\ntime.sleep(1000)", TESTS)])
        assert (verdict.outcome, verdict.reason) == (Outcome.incorrect, "deadline of 0.7 s passed")


def judged(share: float, stands_still: float = 0.0) -> tuple[str, float]:
    """How a run ends that would work for ever, and when, where it gets this share of a processor."""
    allowance, now = Allowance(2.0, 100.0), 100.0
    while True:
        now = allowance.end + stands_still
        if over := allowance.over(share * (now - 100.0), now):
            return over, now - 100.0


def test_time_is_charged_on_a_processor() -> None:
    assert judged(1.0) == (DEADLINE, 2.0)
    assert judged(4.0) == (DEADLINE, 2.0)
    assert judged(0.5)[0] == DEADLINE
    assert judged(0.5)[1] == pytest.approx(4.0, abs=0.1)
    assert judged(0.05) == (STARVED, 20.0)
    assert judged(0.0) == (DEADLINE, 2.0)
    assert judged(0.0, stands_still=1.5) == (STARVED, pytest.approx(20.0, abs=3.5))
    assert Allowance(2.0, 0.0).over(None, 2.0) == DEADLINE


def test_a_closed_pool_says_so() -> None:
    with CodePool(1, requires=NOTHING) as pool:
        pass
    with pytest.raises(SandboxError, match="this pool is closed"):
        pool.grade([(RIGHT, TESTS)])


@pytest.mark.parametrize("limit", [{"seconds": 0}, {"memory_bytes": 1}, {"threads": 0}])
def test_limits_that_nothing_could_run_in_are_refused(limit: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"SandboxLimits\.\w+ is \d: give"):
        SandboxLimits(**limit)


@settings(max_examples=30)
@given(VALUES)
def test_values_cross_as_they_are(value: object) -> None:
    crossed = decode(json.loads(json.dumps(encode(value, lambda _: None))), lambda _: None)
    assert crossed == value
    assert type(crossed) is type(value)


@pytest.mark.parametrize(
    "item",
    [{}, [], ["list", {}], ["eval", "1"], ["dict", [["list"]], [1]], ["int", "z"], ["Fraction", "1e9", 1], [["list"]]],
)
def test_what_is_no_value_is_refused(item: object) -> None:
    with pytest.raises(MalformedError):
        decode(item, lambda _: None)


def test_values_that_are_too_deep_or_cannot_cross_are_refused() -> None:
    deep: list[object] = []
    deep.append(deep)
    with pytest.raises(RecursionError, match="nested more than"):
        encode(deep, lambda _: None)
    with pytest.raises(TypeError, match="object cannot cross"):
        encode(object(), lambda _: None)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86_64")
@pytest.mark.parametrize(
    ("call", "arguments", "allowed"),
    [
        ("write", (1, 1, 0, 0), True),
        ("clone thread", (56, 0x10000, 0, 0), True),
        ("clone process", (56, 0x11, 0, 0), False),
        ("clone3", (435, 0, 0, 0), False),
        ("open to read", (257, 0, 0, os.O_RDONLY), True),
        ("open to write", (257, 0, 0, os.O_WRONLY), False),
        ("open to create", (257, 0, 0, os.O_CREAT), False),
        ("unlink", (87, 0, 0, 0), False),
        ("own limits", (302, 0, 0, 0), True),
        ("others' limits", (302, 7, 0, 0), False),
        ("stream pair", (53, 1, 0x80001, 0), True),
        ("datagram pair", (53, 1, 2, 0), False),
        ("duplicate", (72, 1, 1030, 0), True),
        ("set owner", (72, 1, 8, 0), False),
        ("kill", (62, 1, 9, 0), False),
        ("x32", (0x40000001, 1, 0, 0), False),
    ],
)
def test_the_filter_decides_as_it_says(call: str, arguments: tuple[int, int, int, int], allowed: bool) -> None:
    """An interpreter of the filter's five instructions, with the data that the kernel gives them."""
    program = filter_program(files=False)
    assert program is not None
    number, *values = arguments
    data = struct.pack("=IIQ6Q", number, 0xC000003E, 0, *values, 0, 0, 0)
    assert (run_filter(program, data) == 0x7FFF0000) is allowed
    foreign = struct.pack("=IIQ6Q", number, 0x40000003, 0, *values, 0, 0, 0)
    assert run_filter(program, foreign) == 0x80000000


def run_filter(program: bytes, data: bytes) -> int:
    instructions = list(struct.iter_unpack("=HBBI", program))
    place = register = 0
    while True:
        code, yes, no, value = instructions[place]
        place += 1
        match code:
            case 0x20:
                (register,) = struct.unpack_from("=I", data, value)
            case 0x54:
                register &= value
            case 0x15:
                place += yes if register == value else no
            case 0x45:
                place += yes if register & value else no
            case 0x06:
                return int(value)
