"""Actors, each with one job: policy workers learn, rollout workers write, verifier workers judge.

A group of actors is what the controller sees.
"""

import os
from collections.abc import Sequence
from inspect import isawaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray

from lockstep.data.batch import Sample, TokenBatch, rows_for_ranks
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.distributed.layout import Layout
from lockstep.model.config import Head, Numerics
from lockstep.model.training.config import OptimizerConfig, TrainerConfig, row_rules
from lockstep.rl.environments.config import EnvironmentConfig
from lockstep.rl.remote import GRACE_S, Actor, ActorHandle, Call, Places, WorkerDied, gather, start
from lockstep.rl.types import Rollout
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.weight_sync.transfer import WeightTransfer

if TYPE_CHECKING:  # torch, which a verifier has no use for
    from lockstep.model.objectives.objective import Objective
    from lockstep.rl.algorithms.config import ReferenceConfig
    from lockstep.rl.rollout.config import RolloutConfig
    from lockstep.rl.verifiers.judge import GraderName

PASSES = 32
"""Forward passes of a rollout worker between two looks at what it has been asked for meanwhile."""


@ray.remote(max_restarts=0, num_cpus=0)
class ModelWorker(Actor):
    """One rank of the trainer's world."""

    work = "lockstep.rl.workers.model_worker:ModelWorker"


@ray.remote(max_restarts=0, num_cpus=0)
class RolloutWorker(Actor):
    """One tensor rank of a model that writes completions."""

    work = "lockstep.rl.workers.rollout_worker:RolloutWorker"


@ray.remote(max_restarts=0, num_cpus=0)
class VerifierWorker(Actor):
    """A judge of completions, with processes of its own."""

    work = "lockstep.rl.workers.verifier_worker:VerifierWorker"


@ray.remote(max_restarts=0, num_cpus=0)
class EnvironmentWorker(Actor):
    """Episodes of many rollouts; it takes calls while others wait."""

    work = "lockstep.rl.workers.environment_worker:EnvironmentWorker"

    async def call(self, method: str, *args: Any, **named: Any) -> Any:
        """What a method of the worker returns."""
        found = getattr(self._worker, method)(*args, **named)
        return await found if isawaitable(found) else found


class ModelGroup:
    """A model's world: the policy, or a critic, which learn, or a reward model or a teacher, which score."""

    def __init__(
        self, layout: Layout, *, threads: int, trainer: TrainerConfig, places: Places = (), role: str = "policy"
    ) -> None:
        self.layout, self._config = layout, trainer
        ranks = range(layout.processes)
        self.workers = start(ModelWorker, role, ranks, threads, role, layout, trainer, places=places)

    def start(
        self,
        checkpoint: Path | Storage,
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
        """See `ModelWorker.begin_phase`."""
        self.call("begin_phase", reference)

    def call(self, method: str, *args: Any) -> list[Any]:
        """What a method of `ModelWorker` returns on every rank."""
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


class RolloutGroup:
    """Teams of rollout workers: the tensor ranks of one model each, which make the same calls."""

    def __init__(self, limits: "RolloutConfig", *, threads: int, places: Places = ()) -> None:
        self._limits, self._threads, self._places = limits, threads, places
        self.teams = [self._team(number) for number in range(limits.workers)]
        self.version = 0
        self._delivery = WeightTransfer(limits)

    def start(self, checkpoint: Path | Storage, dtype: str, numerics: Numerics = "fast") -> list[Call]:
        """Calls that load the checkpoint, to be gathered."""
        self._given = checkpoint, dtype, self._limits, numerics
        return [call for team in self.teams for call in self._loading(team)]

    def resume(self, policy: ModelGroup, version: int) -> None:
        """Go on after so many versions, with the weights that the policy has."""
        self.version = version
        self._fill(policy, list(range(len(self.teams))))

    def receive(self, policy: ModelGroup) -> list[int]:
        """Give every team the next version of the weights; returns those that died meanwhile."""
        self.version += 1
        return self._fill(policy, list(range(len(self.teams))))

    def replace(self, number: int, policy: ModelGroup) -> None:
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

    def _team(self, number: int) -> list[ActorHandle]:
        size = self._limits.tensor
        ranks = range(number * size, (number + 1) * size)
        return start(RolloutWorker, "rollout", ranks, self._threads, places=self._places)

    def _loading(self, team: list[ActorHandle]) -> list[Call]:
        address = gather([(team[0], team[0].handle.address.remote())])[0]
        port = gather([team[0].call("host", address)])[0]
        return [member.call("start", rank, address, port, *self._given) for rank, member in enumerate(team)]

    def _fill(self, policy: ModelGroup, numbers: list[int]) -> list[int]:
        """Give teams the weights of the policy; returns those that died meanwhile."""
        alive = self._delivery.give(policy.workers, {n: self.teams[n] for n in numbers}, self.version)
        return [number for number in numbers if number not in alive]


class VerifierGroup:
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
        return self.workers[number].call("grade", [(r.judged, r.prompt.answer_key) for r in rollouts])

    def replace(self, number: int) -> None:
        """A new worker in the place of one that died."""
        self.workers[number].end()
        self.workers[number] = self._worker(number)

    def close(self) -> None:
        """End all grading processes."""
        gather([w.call("close") for w in self.workers])

    def _worker(self, number: int) -> ActorHandle:
        # One answer that takes until its deadline holds up one call, and the others go to the pool's other processes.
        given, at_once = (self._config, self._grader), self._config.processes + 1
        return start(VerifierWorker, "verifier", [number], 1, *given, places=self._places, together=at_once)[0]


class EnvironmentGroup:
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

    def _start(self) -> ActorHandle:
        return start(EnvironmentWorker, "environment", [0], 1, *self._given, together=self.TOGETHER)[0]


def threads_for(processes: int) -> int:
    """Threads of each of `processes` that work at the same time on this machine."""
    return max(1, (os.cpu_count() or 1) // processes)
