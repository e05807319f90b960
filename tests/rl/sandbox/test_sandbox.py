"""A sandbox says how it isolates, refuses to start with less than is required, and its failure costs one item."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.data.tasks.code_tests import CodeTests
from lockstep.rl.sandbox.harness.standard_streams import Observation
from lockstep.rl.sandbox.isolation import NOTHING, Isolation, SandboxError, SandboxLimits
from lockstep.rl.sandbox.sandbox import Sandbox
from lockstep.rl.sandbox.wire import MalformedError, decode, encode
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


def test_an_item_that_cannot_be_sent_costs_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with CodePool(1, SandboxLimits(seconds=3), requires=NOTHING) as pool:
        assert pool.grade([(RIGHT, TESTS)])[0].outcome is Outcome.correct
        before = set(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patches:
            patches.setattr(os, "memfd_create", full)
            assert pool.grade([(RIGHT, TESTS)])[0].reason == "the sandbox failed ([Errno 24] Too many open files)"
            with pytest.raises(SandboxError, match="Too many open files"):
                pool.run(RIGHT)
        assert set(os.listdir("/proc/self/fd")) == before
        zygotes = psutil.Process().children()
        assert pool.grade([(RIGHT, TESTS)])[0].outcome is Outcome.correct
        assert psutil.Process().children() == zygotes


OPEN_DESCRIPTORS = """
import os
for number in range(4096):
    try: os.fstat(number)
    except OSError: continue
    print(number)
"""


@pytest.mark.parametrize("uses", [Isolation(), NOTHING], ids=["isolated", "as it is"])
def test_a_program_has_no_descriptor_of_its_zygote_however_many_files_the_pool_has(uses: Isolation) -> None:
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(400)]
    try:
        with CodePool(1, SandboxLimits(seconds=3), requires=NOTHING, uses=uses) as pool:
            assert pool.run(OPEN_DESCRIPTORS) == Observation("0\n1\n2\n")
    finally:
        for file in files:
            os.close(file)


@pytest.mark.parametrize(
    ("files", "copies", "said"),
    [(2, 1, "an item came with 2 of its 3 files"), (3, 2, "before the verdict of the one in work")],
)
def test_a_zygote_says_what_a_pool_did_wrong(
    files: int, copies: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    sandbox = Sandbox(SandboxLimits(seconds=3), NOTHING)
    sandbox.await_ready()
    with open(os.devnull, "r+b") as nothing:
        for _ in range(copies):
            socket.send_fds(sandbox._control, [b"item"], [nothing.fileno()] * files)
        sandbox._control.shutdown(socket.SHUT_WR)
    assert sandbox.kill(20) == 1
    assert said in capfd.readouterr().err


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


def test_a_zygote_that_cannot_be_replaced_leaves_its_items_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with CodePool(2, requires=NOTHING, uses=NOTHING) as pool:
        one, other = (each for each in psutil.Process().children() if "sandbox.entrypoint" in " ".join(each.cmdline()))
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/bin/false")
            one.kill()
            lost = pool.grade([(RIGHT, TESTS)] * 8)  # the dead one costs an item, whoever gets it
            assert sorted(verdict.outcome for verdict in lost) == [Outcome.correct] * 7 + [Outcome.ungradable]
            other.kill()
            assert pool.grade([(RIGHT, TESTS)])[0].outcome is Outcome.ungradable
            with pytest.raises(SandboxError, match="does not start"):
                pool.grade([(RIGHT, TESTS)] * 6)
            broken.setattr(sys, "executable", "/nowhere/python")
            with pytest.raises(SandboxError, match=r"does not start: .*No such file"):
                pool.grade([(RIGHT, TESTS)])
        assert {verdict.outcome for verdict in pool.grade([(RIGHT, TESTS)] * 6)} == {Outcome.correct}


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


TESTS_OF_THEIR_OWN_TIME = """
import time
time.sleep(1.2)
assert f(1) == 1
while time.process_time() < 1.0: pass
assert f(2) == 2
"""


def test_what_tests_do_is_not_charged_to_the_program() -> None:
    with CodePool(1, SandboxLimits(seconds=0.5), requires=NOTHING) as pool:
        [verdict] = pool.grade([(RIGHT, CodeTests(TESTS_OF_THEIR_OWN_TIME, "f"))])
    assert (verdict.outcome, verdict.reason) == (Outcome.correct, "")


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


LONG_RANGE, LARGE = range(1 << 60), Decimal("1e999999")


def test_what_only_tests_may_pass_stays_with_a_program() -> None:
    deep: list[object] = []
    for _ in range(200):
        deep = [deep]
    for value in (LONG_RANGE, LARGE, deep):
        assert decode(encode(value, lambda _: None, trusted=True), lambda _: None, trusted=True) == value
        with pytest.raises(MalformedError):
            decode(encode(value, lambda _: None, trusted=True), lambda _: None)
    assert encode([LONG_RANGE, LARGE], lambda _: 7) == ["list", ["object", 7], ["object", 7]]
    for short in (range(5), range(1 << 60, 0, -(1 << 50)), Decimal("-1e-99")):
        assert decode(encode(short, lambda _: None), lambda _: None) == short


def test_arrays_and_scalars_of_numpy_cross() -> None:
    for array in (
        np.arange(6).reshape(2, 3)[:, ::2],
        np.array([]),
        np.array(["é", "ab"]),
        np.array([True]),
        np.eye(2) * 1j,
    ):
        crossed = decode(json.loads(json.dumps(encode(array, lambda _: None))), lambda _: None)
        assert type(crossed) is np.ndarray
        assert (crossed.dtype, crossed.shape, crossed.tolist()) == (array.dtype, array.shape, array.tolist())
        crossed[...] = 0  # it can be written
    for scalar, plain in ((np.int64(3), 3), (np.float32(0.5), 0.5), (np.bool_(True), True), (np.str_("a"), "a")):
        crossed = decode(encode([scalar], lambda _: None), lambda _: None)
        assert crossed == [plain]
        assert type(crossed[0]) is type(plain)
    assert encode(np.array([object()]), lambda _: 7) == ["object", 7]


@pytest.mark.parametrize(
    "item",
    [
        ["ndarray", "O", [1], "00" * 8],
        ["ndarray", "<i8", [2], "00" * 8],
        ["ndarray", "V8", [1], "00" * 8],
        ["ndarray", 1],
        {},
        [],
        ["list", {}],
        ["eval", "1"],
        ["dict", [["list"]], [1]],
        ["int", "z"],
        ["Fraction", "1e9", 1],
        [["list"]],
    ],
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
