"""Engines, models and verifiers that take time and compute nothing, for `dataplane.py`; each runs in a Ray process."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from lockstep.data.batch import Column
from lockstep.data.packing import PlannedRow
from lockstep.distributed.step_result import StepResult
from lockstep.rl.rollout.output_processor import OutputProcessor, RolloutRequest, Written
from lockstep.rl.rollout.protocol import Output, Request, Statistics, TokenOutput
from lockstep.rl.types import Completion, Submission
from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.workers.base import Worker
from lockstep.rl.workers.rollout_worker import EngineLoop, RolloutWorker

WORD = "word "


class Columns(Worker):
    """A rollout worker that hands in whole completions of random numbers, as many a call as a cluster would."""

    role = "rollout"

    def __init__(self, rank: int, tokens_per_second: float, together: int) -> None:
        super().__init__(rank)
        self._speed, self._together = tokens_per_second, together
        self._requests: list[RolloutRequest] = []
        self._random, self._version = np.random.default_rng(rank), 0

    def begin_update(self, version: int) -> None:
        self._version = version

    def end_update(self) -> None:
        pass

    def settle(self) -> Written:
        return Written()

    def drop(self) -> None:
        self._requests = []

    def work(self, requests: list[RolloutRequest], passes: int) -> Written:
        self._requests += requests
        ended, self._requests = self._requests[: self._together], self._requests[self._together :]
        completions = [self._completion(request) for request in ended]
        tokens = sum(len(each.tokens) for each in completions)
        time.sleep(tokens / self._speed)
        return Written(completions, tokens, tokens / self._speed)

    def _completion(self, request: RolloutRequest) -> Completion:
        length = request.sampling.max_new_tokens
        logp = -self._random.random(length, np.float32)
        return Completion(
            sample=request.number,
            tokens=Column(self._random.integers(0, 50_000, length), np.int32),
            logp=Column(logp, np.float32),
            text=WORD * (length * 4 // len(WORD)),
            finish_reason="length",
            weight_versions=Column(np.broadcast_to(self._version, length), np.int32),
            sampling_logp=Column(logp, np.float32),
        )


class SleepingEngine:
    """Implements `Engine`: a pass sleeps, and gives every running request one token more."""

    exceptions = frozenset({"exact"})

    def __init__(self, pass_seconds: float, sequences: int) -> None:
        self._pass, self._sequences = pass_seconds, sequences
        self._requests: dict[str | int, list[Any]] = {}
        self.weight_version = self._coming = self._drawn = 0
        self.longest = 1 << 20

    @property
    def statistics(self) -> Statistics:
        running = min(len(self._requests), self._sequences)
        return Statistics(running, len(self._requests) - running, 0, 0, 0, 0, self._drawn, 0)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def agree(self, number: int) -> int:
        return number

    def decode(self, tokens: list[int]) -> str:
        return WORD * len(tokens)

    def check(self, request: Request) -> None:
        pass

    def add(self, request: Request) -> None:
        length = int(np.random.default_rng([request.seed, request.sample]).integers(20, request.new))
        self._requests[request.key] = [request, length]

    def cancel(self, key: str | int) -> None:
        self._requests.pop(key, None)

    def holds(self, key: str | int) -> bool:
        return key in self._requests

    def step(self) -> list[Output]:
        time.sleep(self._pass)
        found: list[Output] = []
        for key in list(self._requests)[: self._sequences]:
            entry = self._requests[key]
            entry[1] -= 1
            found.append(TokenOutput(key, 7, -0.5, -0.5, self.weight_version, None if entry[1] else "stop"))
            if not entry[1]:
                del self._requests[key]
        self._drawn += len(found)
        return found

    def ready_for_update(self) -> bool:
        return True

    def begin_update(self, version: int) -> None:
        self._coming = version

    def take(self, shards: Sequence[Any]) -> None:
        pass

    def end_update(self) -> None:
        self.weight_version = self._coming

    def weights_digest(self) -> str:
        return ""

    def forget(self) -> None:
        pass

    def release(self, *, weights: bool = False) -> None:
        pass


class Asleep(RolloutWorker):
    """The real rollout worker over an engine that sleeps."""

    def __init__(self, rank: int, pass_seconds: float, sequences: int) -> None:
        Worker.__init__(self, rank)
        self._loop = EngineLoop(partial(SleepingEngine, pass_seconds, sequences))
        self._engine, self._speaks, self.computed = self._loop.engine, True, 0.0

    def _said(self, written: Written) -> Written:
        self.computed += written.seconds
        return written

    def seconds(self) -> float:
        """In which the engine computed so far, of what was handed in."""
        return self.computed


class Called(Asleep):
    """A worker whose engine runs inside of calls alone, and stands still until the driver makes the next one."""

    def __init__(self, rank: int, pass_seconds: float, sequences: int) -> None:
        super().__init__(rank, pass_seconds, sequences)
        self._processor = OutputProcessor(self._engine)

    def settle(self) -> Written:
        return Written()

    def drop(self) -> None:
        self._processor.drop()

    def work(self, requests: list[RolloutRequest], passes: int) -> Written:
        for request in requests:
            self._processor.add(request)
        for _ in range(passes):
            began = time.perf_counter()
            ended = self._processor.step()
            self.computed += time.perf_counter() - began
            if ended:
                return Written(ended)
        return Written()


class Model(Worker):
    """A rank of a model that learns: it assembles its rows and sleeps."""

    role = "policy"

    def __init__(self, rank: int, seconds: float) -> None:
        super().__init__(rank)
        self._seconds = seconds

    def enter_phase(self, optimizer: Any, temperature: float) -> None:
        pass

    def begin_phase(self, reference: Any = None) -> None:
        pass

    def update(self, step: int, rows: list[PlannedRow], objective: Any, learning_rate: float) -> StepResult:
        for row in rows:
            row.assembled()
        time.sleep(self._seconds)
        return StepResult({"loss": 0.0}, 1.0, {})

    def follow(self, step: int) -> None:
        pass

    def open_weights(self, size: int) -> int:
        return 0

    def close_weights(self) -> None:
        pass


class Verifier(Worker):
    """Says that every other completion is correct."""

    role = "verifier"

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self._even = False

    def grade(self, items: list[Submission]) -> list[Verdict]:
        found = []
        for _ in items:
            self._even = not self._even
            found.append(Verdict(Outcome.correct if self._even else Outcome.incorrect, ""))
        return found


class Sleeper(Worker):
    """Answers many calls at the same time, each after a while."""

    role = "sleeper"

    def nap(self, seconds: float) -> None:
        time.sleep(seconds)
