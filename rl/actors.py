"""Actors, each with one job: policy workers learn, rollout workers write, verifier workers judge.

This is where Ray is. An actor loads the class that works in it, and what that imports, in its own process only; a group
of actors is what the controller sees. `gather` waits for all and fails with the first that fails, so that a dead worker
never leaves the others waiting unnoticed.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from lockstep.data.batch import Sample, rows_for_ranks
from lockstep.distributed.layout import Layout
from lockstep.distributed.result import StepResult
from lockstep.model.config import Numerics
from lockstep.model.recipes import OptimizerConfig, TrainerConfig, row_rules
from lockstep.rl.types import Prompt, Rollout
from lockstep.rl.verifiers.verdict import Verdict

if TYPE_CHECKING:  # torch, which a verifier has no use for
    from lockstep.model.loss import Objective
    from lockstep.rl.rollout.limits import RolloutLimits
    from lockstep.rl.rollout.sampling import SamplingConfig

ENVIRONMENT = {
    # torch gives large tensors back to the kernel after each operation and faults them in again; a heap that is kept
    # halves the time of everything that is bound by memory.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
    "KINETO_LOG_LEVEL": "99",  # the profiler would print when it starts and stops
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What worker processes are started with."""

GRACE_S = 3.0
"""After the first failure, how long others may take to be heard."""


class WorkerFailed(RuntimeError):
    """A worker raised or died; the message begins with which."""


@dataclass(frozen=True)
class Member:
    """An actor and its name in logs and errors."""

    name: str
    handle: Any

    def call(self, method: str, *args: Any, **named: Any) -> tuple["Member", Any]:
        """A call of a method of its worker, to be gathered."""
        return self, self.handle.call.remote(method, *args, **named)


def _start(kind: Any, role: str, count: int, threads: int, *args: Any) -> list[Member]:
    """Actors with this many threads each."""
    environment = {"env_vars": ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}}
    actors = [kind.options(runtime_env=environment).remote(rank, *args) for rank in range(count)]
    return [Member(f"{role} {rank}", handle) for rank, handle in enumerate(actors)]


class _Actor:
    """A process for a worker."""

    work: str
    """Module and class of the worker."""

    def __init__(self, rank: int, *args: Any) -> None:
        module, name = self.work.split(":")
        self._worker = getattr(import_module(module), name)(rank, *args)

    def call(self, method: str, *args: Any, **named: Any) -> Any:
        """What a method of the worker returns."""
        return getattr(self._worker, method)(*args, **named)

    def address(self) -> str:
        """Of this node."""
        return str(ray.util.get_node_ip_address())


@ray.remote(max_restarts=0, num_cpus=0)
class PolicyWorker(_Actor):
    """One rank of the trainer's world."""

    work = "lockstep.rl.policy:PolicyWorker"


@ray.remote(max_restarts=0, num_cpus=0)
class RolloutWorker(_Actor):
    """One tensor rank of a model that writes completions."""

    work = "lockstep.rl.rollout.worker:RolloutWorker"


@ray.remote(max_restarts=0, num_cpus=0)
class VerifierWorker(_Actor):
    """A pool of processes that judge answers."""

    work = "lockstep.rl.verifiers.worker:VerifierWorker"


def gather(calls: Sequence[tuple[Member, Any]]) -> list[Any]:
    """Results of (member, call) pairs in order, failing as soon as one of them fails.

    Raises:
        WorkerFailed: names the worker and carries its own error.
    """
    wait_for(calls)
    return [ray.get(call) for _, call in calls]


def wait_for(calls: Sequence[tuple[Member, Any]]) -> None:
    """As `gather`, but leaves the results where they are."""
    names = {call: member.name for member, call in calls}
    waiting = list(names)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, fetch_local=False)
        if all(_error(call) is None for call in done):
            continue
        # The peers of a worker that died fail, too, and may do so first: the death is the cause.
        more = ray.wait(waiting, num_returns=len(waiting), timeout=GRACE_S, fetch_local=False)[0] if waiting else []
        errors = {call: error for call in [*done, *more] if (error := _error(call)) is not None}
        cause = min(errors, key=lambda call: isinstance(errors[call], ray.exceptions.RayTaskError))
        died = "" if isinstance(errors[cause], ray.exceptions.RayTaskError) else " died"
        words = re.sub("\x1b\\[[0-9;]*m", "", str(errors[cause]))  # Ray colours them wherever they go
        raise WorkerFailed(f"{names[cause]}{died}: {words}") from errors[cause]


def _error(call: Any) -> Exception | None:
    try:
        ray.get(call)
    except ray.exceptions.RayError as error:
        return error
    return None


class Policy:
    """The trainer's world."""

    def __init__(self, layout: Layout, *, threads: int, trainer: TrainerConfig) -> None:
        self.layout, self._config = layout, trainer
        self.workers = _start(PolicyWorker, "policy", layout.processes, threads, layout, trainer)

    def start(
        self,
        checkpoint: Path,
        dtype: str,
        optimizer: OptimizerConfig,
        temperature: float,
        numerics: Numerics = "fast",
    ) -> list[tuple[Member, Any]]:
        """Calls that load the checkpoint, to be gathered."""
        host = self.workers[0]
        address = gather([(host, host.handle.address.remote())])[0]
        port = gather([host.call("host", address)])[0]
        given = checkpoint, dtype, optimizer, temperature, numerics
        return [w.call("start", address, port, *given) for w in self.workers]

    def begin_phase(self, *, keep_reference: bool) -> None:
        """See `PolicyWorker.begin_phase`."""
        gather([w.call("begin_phase", keep_reference=keep_reference) for w in self.workers])

    def call(self, method: str, *args: Any) -> list[Any]:
        """What a method of `PolicyWorker` returns on every rank."""
        return gather([w.call(method, *args) for w in self.workers])

    def update(self, step: int, samples: Sequence[Sample], objective: "Objective", learning_rate: float) -> StepResult:
        """One gradient step on a global batch."""
        layout = self.layout
        rows = rows_for_ranks(samples, row_rules(layout, self._config.row_tokens))
        calls = [
            w.call("update", step, rows[layout.data_rank(rank)], objective, learning_rate)
            for rank, w in enumerate(self.workers)
        ]
        return gather(calls)[0]

    def weights(self, bucket_mib: float) -> Iterator[list[Any]]:
        """References to the weights, a message of each rank at a time; what was asked for before may then be freed."""
        size = int(bucket_mib * 2**20)
        for number in range(max(self.call("messages", size))):
            calls = [w.call("weights", number, size) for w in self.workers]
            wait_for(calls)
            yield [call for _, call in calls]


class Rollouts:
    """Rollout workers that share the prompts; each is a group of processes, one for each tensor rank of its model."""

    def __init__(self, limits: "RolloutLimits", *, threads: int) -> None:
        self._limits = limits
        self.workers = _start(RolloutWorker, "rollout", limits.workers * limits.tensor, threads)
        self.version = 0

    def start(self, checkpoint: Path, dtype: str, numerics: Numerics = "fast") -> list[tuple[Member, Any]]:
        """Calls that load the checkpoint, to be gathered."""
        calls = []
        for group in self._groups():
            address = gather([(group[0], group[0].handle.address.remote())])[0]
            port = gather([group[0].call("host", address)])[0]
            given = address, port, checkpoint, dtype, self._limits, numerics
            calls += [w.call("start", i, *given) for i, w in enumerate(group)]
        return calls

    def receive(self, policy: Policy) -> None:
        """Give every worker the next version of the weights, message by message."""
        self.version += 1
        gather([w.call("begin_update", self.version) for w in self.workers])
        for message in policy.weights(self._limits.bucket_mib):
            gather([w.call("take", *message) for w in self.workers])
        gather([w.call("end_update") for w in self.workers])

    def _groups(self) -> list[list[Member]]:
        """The tensor ranks of each worker."""
        size = self._limits.tensor
        return [self.workers[i : i + size] for i in range(0, len(self.workers), size)]

    def generate(self, prompts: Sequence[Prompt], sampling: "SamplingConfig", samples: int, seed: int) -> list[Rollout]:
        """Completions of all prompts, in the order of (prompt, sample)."""
        groups = self._groups()
        shares = [(group, list(prompts[i :: len(groups)])) for i, group in enumerate(groups)]
        calls = [w.call("generate", own, sampling, samples, seed) for group, own in shares if own for w in group]
        found = [rollout for part in gather(calls)[:: self._limits.tensor] for rollout in part]
        order = {p.index: i for i, p in enumerate(prompts)}
        return sorted(found, key=lambda r: (order[r.prompt.index], r.sample))


class Verifiers:
    """Verifier workers that share the answers."""

    def __init__(self, workers: int, processes: int, deadline_s: float) -> None:
        self.workers = _start(VerifierWorker, "verifier", workers, 1, processes, deadline_s)

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts on (response, answer) pairs, in order."""
        count = len(self.workers)
        calls = [w.call("grade", list(pairs[i::count])) for i, w in enumerate(self.workers)]
        verdicts: list[Any] = [None] * len(pairs)
        for i, part in enumerate(gather(calls)):
            verdicts[i::count] = part
        return verdicts

    def close(self) -> None:
        """End all grading processes."""
        gather([w.call("close") for w in self.workers])


def threads_for(processes: int) -> int:
    """Threads of each of `processes` that work at the same time on this machine."""
    return max(1, (os.cpu_count() or 1) // processes)
