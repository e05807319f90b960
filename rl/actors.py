"""Actors, each with one job: policy workers learn, rollout workers write, verifier workers judge.

This is where Ray is. An actor loads the class that works in it, and what that imports, in its own process only; a group
of actors is what the controller sees. `gather` waits for all and fails with the first that fails, so that a dead worker
never leaves the others waiting unnoticed.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import isawaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray

from lockstep.data.batch import Sample, TokenBatch, rows_for_ranks
from lockstep.distributed.checkpoint.place import Place
from lockstep.distributed.layout import Layout
from lockstep.model.config import Head, Numerics
from lockstep.model.recipes import OptimizerConfig, TrainerConfig, row_rules
from lockstep.rl.environments.config import EnvironmentConfig
from lockstep.rl.types import Rollout
from lockstep.rl.verifiers.recipes import VerifierConfig

if TYPE_CHECKING:  # torch, which a verifier has no use for
    from lockstep.model.loss import Objective
    from lockstep.rl.recipes import ReferenceConfig
    from lockstep.rl.rollout.limits import RolloutLimits
    from lockstep.rl.verifiers.judge import GraderName

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


PASSES = 32
"""Forward passes of a rollout worker between two looks at what it has been asked for meanwhile."""


class WorkerFailed(RuntimeError):
    """A worker raised or died; the message begins with which."""


class WorkerDied(WorkerFailed):
    """A worker's process ended."""


@dataclass(frozen=True)
class Member:
    """An actor and its name in logs and errors."""

    name: str
    handle: Any

    def call(self, method: str, *args: Any, **named: Any) -> "Call":
        """A call of a method of its worker, to be gathered."""
        return self, self.handle.call.remote(method, *args, **named)

    def end(self) -> None:
        """End its process, if that has not happened."""
        ray.kill(self.handle)


Call = tuple[Member, Any]
"""Who was asked, and where the answer will be."""


Places = Sequence[Mapping[str, Any]]
"""Ray's options of each process of a role; with none, processes run anywhere and reserve nothing."""


def _start(
    kind: Any, role: str, ranks: Iterable[int], threads: int, *args: Any, places: Places = (), together: int = 1
) -> list[Member]:
    """Actors with this many threads each, which work on so many calls at the same time."""
    environment = {"env_vars": ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}}
    started = []
    for rank in ranks:
        options = {"runtime_env": environment, "max_concurrency": together, **(places[rank] if places else {})}
        started.append(Member(f"{role} {rank}", kind.options(**options).remote(rank, *args)))
    return started


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
    """A judge of completions, with processes of its own."""

    work = "lockstep.rl.verifiers.worker:VerifierWorker"


@ray.remote(max_restarts=0, num_cpus=0)
class EnvironmentWorker(_Actor):
    """Episodes of many rollouts; it takes calls while others wait."""

    work = "lockstep.rl.environments.worker:EnvironmentWorker"

    async def call(self, method: str, *args: Any, **named: Any) -> Any:
        """What a method of the worker returns."""
        found = getattr(self._worker, method)(*args, **named)
        return await found if isawaitable(found) else found


def gather(calls: Sequence[Call]) -> list[Any]:
    """Results of calls in order, failing as soon as one of them fails.

    Raises:
        WorkerFailed: names the worker and carries its own error; `WorkerDied` where its process ended.
    """
    wait_for(calls)
    return [ray.get(call) for _, call in calls]


def any_of(calls: Sequence[Call], seconds: float | None = None) -> list[Call]:
    """Those that have ended, well or not; waits for the first, or so many seconds."""
    by_place = {call[1]: call for call in calls}
    ended = ray.wait(list(by_place), num_returns=1, timeout=seconds, fetch_local=False)[0]
    return [by_place[place] for place in ended]


def failed(call: Call) -> bool:
    """Whether a call that has ended did not end well."""
    return _error(call[1]) is not None


def wait_for(calls: Sequence[Call]) -> None:
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
        words = re.sub("\x1b\\[[0-9;]*m", "", str(errors[cause]))  # Ray colours them wherever they go
        if isinstance(errors[cause], ray.exceptions.RayTaskError):
            raise WorkerFailed(f"{names[cause]}: {words}") from errors[cause]
        raise WorkerDied(f"{names[cause]} died: {words}") from errors[cause]


def _error(call: Any) -> Exception | None:
    try:
        ray.get(call)
    except ray.exceptions.RayError as error:
        return error
    return None


class Model:
    """A model's world: the policy, or a critic, which learn, or a reward model or a teacher, which score."""

    def __init__(
        self, layout: Layout, *, threads: int, trainer: TrainerConfig, places: Places = (), role: str = "policy"
    ) -> None:
        self.layout, self._config = layout, trainer
        ranks = range(layout.processes)
        self.workers = _start(PolicyWorker, role, ranks, threads, role, layout, trainer, places=places)

    def start(
        self,
        checkpoint: Path | Place,
        dtype: str,
        optimizer: OptimizerConfig | None,
        temperature: float,
        numerics: Numerics = "fast",
        head: Head | None = None,
    ) -> list[Call]:
        """Calls that load the checkpoint, to be gathered; without an optimizer the model only scores."""
        host = self.workers[0]
        address = gather([(host, host.handle.address.remote())])[0]
        port = gather([host.call("host", address)])[0]
        given = checkpoint, dtype, optimizer, temperature, numerics, head
        return [w.call("start", address, port, *given) for w in self.workers]

    def begin_phase(self, reference: "ReferenceConfig | None" = None) -> None:
        """See `PolicyWorker.begin_phase`."""
        self.call("begin_phase", reference)

    def call(self, method: str, *args: Any) -> list[Any]:
        """What a method of `PolicyWorker` returns on every rank."""
        return gather([w.call(method, *args) for w in self.workers])

    def update(self, step: int, samples: Sequence[Sample], objective: "Objective", learning_rate: float) -> list[Call]:
        """Calls that take one gradient step on a global batch, each with a `StepResult`, to be gathered."""
        calls = zip(self.workers, self._shares(samples), strict=True)
        return [w.call("update", step, rows, objective, learning_rate) for w, rows in calls]

    def measure(self, samples: Sequence[Sample], objective: "Objective") -> list[Call]:
        """Calls that say what an objective reports over samples, without an update, to be gathered."""
        return [w.call("measure", rows, objective) for w, rows in zip(self.workers, self._shares(samples), strict=True)]

    def score(self, samples: Sequence[Sample], of: Literal["model", "reference"] = "model") -> list[Call]:
        """Calls that score numbered samples, each with a part of what `scoring.columns` joins, to be gathered."""
        return [w.call("score", rows, of) for w, rows in zip(self.workers, self._shares(samples), strict=True)]

    def _shares(self, samples: Sequence[Sample]) -> list[list[TokenBatch]]:
        """Each rank's rows."""
        rows = rows_for_ranks(samples, row_rules(self.layout, self._config.row_tokens))
        return [rows[self.layout.data_rank(rank)] for rank in range(len(self.workers))]


class Policy(Model):
    """The world of the model that writes."""

    def weights(self, bucket_mib: float) -> Iterator[list[Any]]:
        """References to the weights, a message of each rank at a time; what was asked for before may then be freed.

        The next message is made while the last one is being taken.
        """
        count = max(self.call("open_weights", int(bucket_mib * 2**20)))
        coming = self._message(0)
        for number in range(count):
            calls = coming
            wait_for(calls)
            coming = self._message(number + 1)
            yield [call for _, call in calls]
        wait_for(coming)
        self.call("close_weights")

    def _message(self, number: int) -> list[Call]:
        return [w.call("weights", number) for w in self.workers]


class Rollouts:
    """Teams of rollout workers: the tensor ranks of one model each, which make the same calls."""

    def __init__(self, limits: "RolloutLimits", *, threads: int, places: Places = ()) -> None:
        self._limits, self._threads, self._places = limits, threads, places
        self.teams = [self._team(number) for number in range(limits.workers)]
        self.version = 0

    def start(self, checkpoint: Path | Place, dtype: str, numerics: Numerics = "fast") -> list[Call]:
        """Calls that load the checkpoint, to be gathered."""
        self._given = checkpoint, dtype, self._limits, numerics
        return [call for team in self.teams for call in self._loading(team)]

    def resume(self, policy: Policy, version: int) -> None:
        """Go on after so many versions, with the weights that the policy has."""
        self.version = version
        self._fill(policy, list(range(len(self.teams))))

    def receive(self, policy: Policy) -> list[int]:
        """Give every team the next version of the weights; returns those that died meanwhile."""
        self.version += 1
        return self._fill(policy, list(range(len(self.teams))))

    def replace(self, number: int, policy: Policy) -> None:
        """A new team in the place of one that died, with the weights that the others have.

        Raises:
            WorkerDied: when the new one dies, too.
        """
        self.end(number)
        self.teams[number] = self._team(number)
        gather(self._loading(self.teams[number]))
        if self._fill(policy, [number]):
            raise WorkerDied(f"rollout {number} died again while it received weights of version {self.version}")

    def end(self, number: int) -> None:
        """End the processes of a team."""
        for member in self.teams[number]:
            member.end()

    def _team(self, number: int) -> list[Member]:
        size = self._limits.tensor
        ranks = range(number * size, (number + 1) * size)
        return _start(RolloutWorker, "rollout", ranks, self._threads, places=self._places)

    def _loading(self, team: list[Member]) -> list[Call]:
        address = gather([(team[0], team[0].handle.address.remote())])[0]
        port = gather([team[0].call("host", address)])[0]
        return [member.call("start", rank, address, port, *self._given) for rank, member in enumerate(team)]

    def _fill(self, policy: Policy, numbers: list[int]) -> list[int]:
        """Give teams the weights of the policy, message by message; returns those that died meanwhile."""
        alive = self._told(numbers, "begin_update", self.version)
        for message in policy.weights(self._limits.bucket_mib):
            alive = self._told(alive, "take", *message)
        alive = self._told(alive, "end_update")
        return [number for number in numbers if number not in alive]

    def _told(self, numbers: list[int], method: str, *args: Any) -> list[int]:
        """Have teams do something; returns those that are still alive then."""
        calls = {number: [w.call(method, *args) for w in self.teams[number]] for number in numbers}
        return [number for number in numbers if _lives(calls[number])]


def _lives(calls: Sequence[Call]) -> bool:
    """Whether who was called is alive when all calls have ended."""
    try:
        gather(calls)
    except WorkerDied:
        return False
    return True


class Verifiers:
    """Verifier workers, each a judge with processes of its own."""

    def __init__(self, config: VerifierConfig, grader: "GraderName" = "answer", places: Places = ()) -> None:
        """
        Args:
            grader: of problems without tests.
        """
        self._config, self._grader, self._places = config, grader, places
        self.workers = [self._worker(number) for number in range(config.workers)]

    def start(self, *, programs: bool) -> list[Call]:
        """Calls that start the verifiers of programs, or those of answers, to be gathered; others start when needed."""
        return [w.call("start", programs) for w in self.workers]

    def judge(self, number: int, rollouts: Sequence[Rollout]) -> Call:
        """A call of a worker for verdicts on completions, in order."""
        return self.workers[number].call("grade", [(r.judged, r.prompt) for r in rollouts])

    def replace(self, number: int) -> None:
        """A new worker in the place of one that died."""
        self.workers[number].end()
        self.workers[number] = self._worker(number)

    def close(self) -> None:
        """End all grading processes."""
        gather([w.call("close") for w in self.workers])

    def _worker(self, number: int) -> Member:
        # One answer that takes until its deadline holds up one call, and the others go to the pool's other processes.
        given, at_once = (self._config, self._grader), self._config.processes + 1
        return _start(VerifierWorker, "verifier", [number], 1, *given, places=self._places, together=at_once)[0]


class Environments:
    """A process of environments, which answer the turns of rollouts."""

    TOGETHER = 4096
    """Calls at the same time; others wait for their turn."""

    def __init__(self, config: EnvironmentConfig, files: dict[str, str], *, chat: bool) -> None:
        """
        Args:
            files: of the policy's tokenizer.
            chat: whether prompts are in its chat template.
        """
        self._given, self.config = (config, files, chat), config
        self.worker = self._start()

    @property
    def patience(self) -> float:
        """Seconds after which a process that keeps its deadlines has answered a call."""
        return 2 * self.config.deadline + 2 * GRACE_S

    def ready(self) -> Call:
        """A call that ends when episodes can begin, to be gathered."""
        return self.worker.call("pid")

    def answer(self, rollout: Rollout, most: int) -> Call:
        """A call for what follows a rollout's last turn: see `EnvironmentWorker.answer`."""
        return self.worker.call("answer", rollout, most)

    def replace(self) -> None:
        """A new process in the place of one that died or hangs."""
        self.worker.end()
        self.worker = self._start()
        gather([self.ready()])

    def drop(self) -> None:
        """Close all episodes."""
        gather([self.worker.call("drop")])

    def close(self) -> None:
        """Close all episodes, and what they share."""
        gather([self.worker.call("close")])

    def _start(self) -> Member:
        return _start(EnvironmentWorker, "environment", [0], 1, *self._given, together=self.TOGETHER)[0]


def threads_for(processes: int) -> int:
    """Threads of each of `processes` that work at the same time on this machine."""
    return max(1, (os.cpu_count() or 1) // processes)
