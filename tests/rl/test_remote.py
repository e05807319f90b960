"""Calls of workers: stubs name what is there, without loading it, and mypy refuses what a method does not take."""

import ctypes
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from lockstep.distributed.layout import Layout
from lockstep.model.training.config import OptimizerConfig, TrainerConfig
from lockstep.rl.remote import ENVIRONMENT, JEMALLOC, PASSED_ON, Processes, WorkerFailed, gather, start
from lockstep.rl.workers import stubs
from lockstep.rl.workers.worker_groups import ModelGroup
from tests.rl.conftest import Actors

STUBS = [each for each in vars(stubs).values() if isinstance(each, stubs.Stub)]
SETTINGS = """
[mypy]
mypy_path = {src}
ignore_missing_imports = True
[mypy-ray.*,lockstep.cluster.*]
follow_imports = skip
"""
CALLS = """
from lockstep.rl.remote import ActorHandle, Call, gather

class Adder:
    def add(self, a: int, b: int) -> int: ...
    async def later(self) -> str: ...

class Other:
    def add(self, a: int, b: int) -> int: ...

def ask(worker: ActorHandle[Adder]) -> None:
    total: list[int] = gather([worker.call(Adder.add, 1, b=2)])
    later: Call[str] = worker.call(Adder.later)
    worker.call(Adder.add, 1, "2")  # wrong
    worker.call(Adder.add, 1)  # wrong
    worker.call(Other.add, 1, 2)  # wrong
    words: list[str] = gather([worker.call(Adder.add, 1, 2)])  # wrong
"""


MEMORY = """
import resource
import psutil, torch
from lockstep.distributed.device import give_back

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for turn in range(20):
    if turn == 10:  # the heap has grown by then
        begun = faults()
    torch.ones(8 << 20)  # 32 MiB
again, held = faults() - begun, psutil.Process().memory_info().rss
give_back(torch.device("cpu"))
print(again, held - psutil.Process().memory_info().rss)
"""


def test_stubs_are_found() -> None:
    assert len(STUBS) == 5


@pytest.mark.parametrize("stub", STUBS, ids=[each.__name__ for each in STUBS])
def test_stubs_name_worker_classes(stub: stubs.Stub) -> None:
    found = getattr(import_module(stub.__module__), stub.__name__)
    assert isinstance(found, type)
    assert stub.pid.__name__ == found.pid.__name__


def test_naming_a_method_loads_no_torch() -> None:
    program = "import sys; import lockstep.rl.remote, lockstep.rl.workers.stubs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_mypy_checks_calls_against_the_methods_of_the_worker(tmp_path: Path) -> None:
    program, settings = tmp_path / "calls.py", tmp_path / "mypy.ini"
    program.write_text(CALLS.replace("...", "raise NotImplementedError"))
    settings.write_text(SETTINGS.format(src=Path(__file__).parents[2] / "src"))
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), "--cache-dir", str(tmp_path / "cache")]
    said = subprocess.run([*command, str(program)], capture_output=True, text=True, timeout=240).stdout
    refused = [line for line in range(1, 30) if f"calls.py:{line}: error" in said]
    assert refused == [n for n, line in enumerate(CALLS.splitlines(), 1) if line.endswith("# wrong")], said


def test_an_error_inside_a_worker_is_shown_in_its_own_words(actors: Actors, tmp_path: Path) -> None:
    policy = ModelGroup(Layout(), threads=1, trainer=TrainerConfig(row_tokens=64), role="late")
    try:
        with pytest.raises(WorkerFailed, match=r"(?s)late 0: .*BadCheckpoint.*nothing holds no checkpoint") as caught:
            gather(policy.start(tmp_path / "nothing", "float32", OptimizerConfig(), 1.0))
        assert "\x1b" not in str(caught.value)
    finally:
        policy.workers[0].end()


class Environment:
    """A worker that says what it finds in its environment."""

    def __init__(self, rank: int) -> None:
        self._at_start = os.environ.get("TOKEN_OF_TEST")

    def token(self) -> tuple[str | None, str]:
        """What it had at its start, and what its process was started with."""
        return self._at_start, Path("/proc/self/environ").read_text()

    def has_jemalloc(self) -> bool:
        """Whether its process allocates by jemalloc."""
        return hasattr(ctypes.CDLL(None), "mallctl")


def test_workers_allocate_by_jemalloc(actors: Actors) -> None:
    assert JEMALLOC.is_file(), "Ray's wheels for Linux have it"
    (worker,) = start(Environment, Processes("environment", [0], threads=1))
    try:
        assert gather([worker.call(Environment.has_jemalloc)]) == [True]
    finally:
        worker.end()


SMALL_BLOCKS = """
import torch

def held():
    return int(open("/proc/self/statm").read().split()[1]) << 12

large = torch.ones(1 << 26)  # 256 MiB
before = held()
del large
blocks = [torch.ones(3 << 17) for _ in range(100)]  # 1.5 MiB, less than a 64th of it
print(held() - before)
"""


def test_small_blocks_are_cut_from_large_ones_that_were_freed() -> None:
    program = [sys.executable, "-c", SMALL_BLOCKS]
    said = subprocess.run(program, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, check=True, text=True).stdout
    assert int(said) < 16 << 20


@pytest.mark.parametrize("preloaded", [True, False], ids=["jemalloc", "glibc"])
def test_workers_use_freed_memory_again_and_give_it_back(preloaded: bool) -> None:
    variables = {name: value for name, value in ENVIRONMENT.items() if preloaded or name != "LD_PRELOAD"}
    program = [sys.executable, "-c", MEMORY]
    said = subprocess.run(program, env=os.environ | variables, stdout=subprocess.PIPE, check=True, text=True).stdout
    faults, given_back = map(int, said.split())
    assert faults < (32 << 20) // 4096
    assert given_back > 31 << 20


def test_variables_of_the_driver_reach_workers_as_arguments(actors: Actors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSED_ON, "TOKEN_OF_TEST,SET_NOWHERE")
    monkeypatch.setenv("TOKEN_OF_TEST", "a-secret")
    workers = start(Environment, Processes("environment", [0], threads=1))
    monkeypatch.delenv(PASSED_ON)
    workers += start(Environment, Processes("environment", [0], threads=1, variables=("TOKEN_OF_TEST",)))
    try:
        found = gather([worker.call(Environment.token) for worker in workers])
    finally:
        for worker in workers:
            worker.end()
    assert [value for value, _ in found] == ["a-secret"] * 2
    assert not any("a-secret" in process for _, process in found)
