"""Groups of Ray actors as the controller sees them: the ranks of a model, rollout teams, verifiers, environments."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

from lockstep.data.batch import Floats, Ints, Sample
from lockstep.data.packing import PlannedRow, plan_for_ranks
from lockstep.distributed.checkpoint.manager import BadCheckpoint, Checkpoint
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.distributed.layout import Layout
from lockstep.distributed.step_result import StepResult
from lockstep.model.config import Head, ModelConfig, Numerics
from lockstep.model.training.config import OptimizerConfig, TrainerConfig, row_rules
from lockstep.rl.environments.config import EnvironmentConfig
from lockstep.rl.remote import GRACE_S, ActorHandle, Call, Places, Processes, gather, put, start
from lockstep.rl.types import Rollout
from lockstep.rl.verdict import Verdict
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.weight_sync.transfer import WeightTransfer
from lockstep.rl.workers.agreement import Loaded, check_agreement, digest_of, loaded, package_digest
from lockstep.rl.workers.stubs import EnvironmentWorker, ModelWorker, RankWorker, RolloutWorker, VerifierWorker

if TYPE_CHECKING:  # torch, which a verifier has no use for
    from lockstep.model.objectives.objective import Objective
    from lockstep.rl.algorithms.config import ReferenceConfig
    from lockstep.rl.environments.protocol import EnvironmentResponse
    from lockstep.rl.rollout.config import RolloutConfig

PASSES = 32
"""Forward passes that a rollout worker makes in one call at most, before it takes new requests."""


Params = ParamSpec("Params")
Result = TypeVar("Result")


class ModelGroup:
    """All ranks of one model: of the policy or a critic, which learn, or of a reward model or teacher, which score."""

    _model: ModelConfig | None = None
    """Known from `start` on."""

    def __init__(
        self,
        layout: Layout,
        *,
        trainer: TrainerConfig,
        threads: int | None = None,
        places: Places = (),
        role: str = "policy",
    ) -> None:
        package_digest()  # of the sources as they are when the ranks import them
        self.layout, self._config = layout, trainer
        processes = Processes(role, range(layout.processes), threads, places)
        self.workers = start(ModelWorker, processes, role, layout, trainer)

    def start(
        self,
        checkpoint: Path | Storage,
        dtype: str,
        optimizer: OptimizerConfig | None,
        temperature: float,
        numerics: Numerics = "fast",
        head: Head | None = None,
    ) -> list[Call[None]]:
        """Calls, to be gathered, that load a checkpoint on all ranks; without an optimizer the model only scores."""
        address, port = hosted(self.workers[0])
        given = checkpoint, dtype, optimizer, temperature, numerics, head
        self._settings = digest_of(self.layout, self._config, *given[1:])
        self._checkpoint = checkpoint
        with suppress(BadCheckpoint):  # which the ranks say in their own words
            self._model = ModelConfig(**Checkpoint(checkpoint).manifest["model"])
        return [w.call(ModelWorker.start, address, port, *given) for w in self.workers]

    def enter_phase(self, optimizer: OptimizerConfig, temperature: float = 1.0) -> None:
        """Sets what a phase trains with, whether it begins or is resumed; see `ModelWorker.enter_phase`."""
        self.call(ModelWorker.enter_phase, optimizer, temperature)

    def check_agreement(self) -> None:
        """Compares what the ranks loaded, and whether it is what this process sees; to be called before they are used.

        Raises:
            RanksDiffer: names ranks and hosts that differ, and what differs.
        """
        self._compare("model", self._checkpoint)

    def check_reference(self, weights: Path | Storage) -> None:
        """Compares what the ranks loaded as the reference beside their model; raises as `check_agreement` does."""
        self._compare("reference", weights)

    def _compare(self, what: Literal["model", "reference"], checkpoint: Path | Storage) -> None:
        _compare(self.workers, self.call(ModelWorker.loaded, what), self._settings, checkpoint)

    def begin_phase(self, reference: "ReferenceConfig | None" = None) -> None:
        """Resets the optimizer, and copies the weights into a reference; see `ModelWorker.begin_phase`."""
        self.call(ModelWorker.begin_phase, reference)

    def call(
        self, method: Callable[Concatenate[ModelWorker, Params], Result], *args: Params.args, **named: Params.kwargs
    ) -> list[Result]:
        """Calls a method of `ModelWorker` on every rank; returns the results by rank."""
        return gather([w.call(method, *args, **named) for w in self.workers])

    def update(
        self, step: int, samples: Sequence[Sample], objective: "Objective", learning_rate: float
    ) -> list[Call[StepResult]]:
        """Calls, to be gathered, that take one gradient step on a global batch; each rank's has a `StepResult`."""
        calls = zip(self.workers, self._shares(samples), strict=True)
        return [w.call(ModelWorker.update, step, rows, objective, learning_rate) for w, rows in calls]

    def measure(self, samples: Sequence[Sample], objective: "Objective") -> list[Call[dict[str, float]]]:
        """Calls, to be gathered, that return an objective's metrics over samples, without an update."""
        calls = zip(self.workers, self._shares(samples), strict=True)
        return [w.call(ModelWorker.measure, rows, objective) for w, rows in calls]

    def score(
        self, samples: Sequence[Sample], of: Literal["model", "reference"] = "model"
    ) -> list[Call[tuple[Ints, Floats]]]:
        """Calls, to be gathered, that score numbered samples; `estimates.columns` joins the parts that they return."""
        calls = zip(self.workers, self._shares(samples), strict=True)
        return [w.call(ModelWorker.score, rows, of) for w, rows in calls]

    def _shares(self, samples: Sequence[Sample]) -> list[list[PlannedRow]]:
        """References to the rows of each rank, which assembles them; the ranks of one model share theirs on a host."""
        rules = row_rules(self.layout, self._config.row_tokens, self._model)
        rows = [self._stored(rows) for rows in plan_for_ranks(samples, rules)]
        return [rows[self.layout.data_rank(rank)] for rank in range(len(self.workers))]

    def _stored(self, rows: list[PlannedRow]) -> list[PlannedRow]:
        return put(rows)


class RolloutGroup:
    """Teams of rollout workers; a team is the tensor-parallel ranks of one rollout engine."""

    def __init__(self, limits: "RolloutConfig", *, threads: int | None = None, places: Places = ()) -> None:
        self._limits, self._threads, self._places = limits, threads, places
        self.teams = [self._team(number) for number in range(limits.workers)]
        self.version = 0
        self._delivery = WeightTransfer(limits)

    def start(self, checkpoint: Path | Storage, dtype: str, numerics: Numerics = "fast") -> list[Call[None]]:
        """Calls, to be gathered, that load a checkpoint as weight version 0."""
        self._given = checkpoint, dtype, self._limits, numerics
        return [call for team in self.teams for call in self._loading(team)]

    def check_agreement(self) -> None:
        """Compares what the workers loaded; see `ModelGroup.check_agreement`."""
        checkpoint, *settings = self._given
        members = [member for team in self.teams for member in team]
        found = gather([member.call(RolloutWorker.loaded) for member in members])
        _compare(members, found, digest_of(*settings), checkpoint)

    def resume(self, policy: ModelGroup, version: int, absent: Container[int] = ()) -> list[int]:
        """Gives teams the weights that the policy has, as this version; see `receive`."""
        self.version = version
        return self.fill(policy, [number for number in range(len(self.teams)) if number not in absent])

    def receive(self, policy: ModelGroup, absent: Container[int] = ()) -> list[int]:
        """Gives teams the policy's weights as the next version.

        Args:
            absent: numbers of teams that died, and get none.

        Returns:
            The numbers of teams that died meanwhile.
        """
        return self.resume(policy, self.version + 1, absent)

    def replacing(self, number: int) -> Iterator[Sequence[Call[Any]]]:
        """Starts a team in the place of one that died.

        Yields:
            Calls that are to be gathered before it goes on: until the team has a place, and until it has its first
            weights. It lacks those of the policy then, which `fill` brings.
        """
        self.end(number)
        self.teams[number] = self._team(number)
        yield [member.place() for member in self.teams[number]]
        yield self._loading(self.teams[number])

    def fill(self, policy: ModelGroup, numbers: Sequence[int]) -> list[int]:
        """Gives teams the policy's weights as the current version; returns the numbers of those that died."""
        alive = self._delivery.give(policy.workers, {n: self.teams[n] for n in numbers}, self.version)
        return [number for number in numbers if number not in alive]

    def end(self, number: int) -> None:
        """Kills the processes of a team."""
        for member in self.teams[number]:
            member.end()

    def _team(self, number: int) -> list[ActorHandle[RolloutWorker]]:
        size = self._limits.tensor
        ranks = range(number * size, (number + 1) * size)
        processes = Processes("rollout", ranks, self._threads, self._places, python=self._limits.python)
        return start(RolloutWorker, processes)

    def _loading(self, team: list[ActorHandle[RolloutWorker]]) -> list[Call[None]]:
        address, port = hosted(team[0])
        return [member.call(RolloutWorker.start, rank, address, port, *self._given) for rank, member in enumerate(team)]


class VerifierGroup:
    """Verifier workers, each with grading processes of its own."""

    def __init__(
        self,
        config: VerifierConfig,
        places: Places = (),
        reward_functions: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """
        Args:
            reward_functions: names of the user's functions that are computed of each completion, by task and term.
        """
        self._config, self.places = config, places
        self.reward_functions = dict(reward_functions or {})
        self.workers = [self._worker(number) for number in range(config.workers)]

    def start(self, graders: Sequence[str] = ("answer",)) -> list[Call[None]]:
        """Calls, to be gathered, that start graders; others start when needed, see `lockstep.rl.verifiers.judge`."""
        return [w.call(VerifierWorker.start, graders) for w in self.workers]

    def check_agreement(self) -> None:
        """Compares the package that the workers run; see `ModelGroup.check_agreement`."""
        _compare(self.workers, gather([w.call(VerifierWorker.loaded) for w in self.workers]))

    def judge(self, number: int, rollouts: Sequence[Rollout], known: Verdict | None = None) -> Call[list[Verdict]]:
        """A call of this worker that grades completions; returns verdicts in order.

        Args:
            known: the verdict of their environment, which reward functions are then added to.
        """
        return self.workers[number].call(VerifierWorker.grade, [r.submission(known) for r in rollouts])

    def replacing(self, number: int) -> Iterator[Sequence[Call[Any]]]:
        """Starts a worker in the place of one that died; yields calls to be gathered before it judges."""
        self.workers[number].end()
        self.workers[number] = self._worker(number)
        yield [self.workers[number].place()]

    def close(self) -> None:
        """Ends all grading processes."""
        gather([w.call(VerifierWorker.close) for w in self.workers])

    def _worker(self, number: int) -> ActorHandle[VerifierWorker]:
        # One answer that takes until its deadline holds up one call, and the others go to the pool's other processes.
        judge = self._config.llm_judge
        together = self._config.processes + 1 + (judge.concurrent if judge else 0)
        keys = (judge.api_key_env,) if judge else ()
        processes = Processes("verifier", [number], 1, self.places, together, variables=keys)
        return start(VerifierWorker, processes, self._config, self.reward_functions)[0]


class EnvironmentGroup:
    """Processes that play the environments' side of rollouts, each that of the episodes that began in it."""

    TOGETHER = 4096
    """Calls that a process works on at the same time."""

    def __init__(
        self,
        config: EnvironmentConfig,
        files: dict[str, str],
        *,
        chat: bool,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        places: Places = (),
    ) -> None:
        """
        Args:
            files: contents of the policy's tokenizer files, by name.
            chat: whether prompts are in the tokenizer's chat template.
            chat_template_kwargs: variables of that template.
        """
        self._given, self.config, self.places = (config, files, chat, chat_template_kwargs), config, places
        self.workers = [self._worker(number) for number in range(config.workers)]

    @property
    def patience(self) -> float:
        """Seconds within which a process that keeps its deadlines answers a call."""
        return 2 * self.config.deadline + 2 * GRACE_S

    def ready(self) -> list[Call[int]]:
        """Calls, to be gathered, that end when episodes can begin."""
        return [w.call(EnvironmentWorker.pid) for w in self.workers]

    def check_agreement(self) -> None:
        """Compares the package that the processes run; see `ModelGroup.check_agreement`."""
        _compare(self.workers, gather([w.call(EnvironmentWorker.loaded) for w in self.workers]))

    @cached_property
    def speaks_first(self) -> bool:
        """Whether environments have a first observation, which the model reads before its first turn."""
        return gather([self.workers[0].call(EnvironmentWorker.speaks_first)])[0]

    def begin(self, number: int, rollout: Rollout, seed: int, most: int) -> "Call[EnvironmentResponse]":
        """A call of this worker that opens a rollout's environment, for its first observation."""
        return self.workers[number].call(EnvironmentWorker.begin, rollout, seed, most)

    def answer(self, number: int, rollout: Rollout, most: int) -> "Call[EnvironmentResponse]":
        """A call of this worker that steps a rollout's environment with its last turn."""
        return self.workers[number].call(EnvironmentWorker.answer, replace(rollout, experts=None), most)

    def replacing(self, number: int) -> Iterator[Sequence[Call[Any]]]:
        """Starts a process in the place of one that died or hangs; yields calls to be gathered before it is asked."""
        self.workers[number].end()
        self.workers[number] = worker = self._worker(number)
        yield [worker.place()]
        yield [worker.call(EnvironmentWorker.pid)]

    def end(self, number: int, sample: int) -> Call[None]:
        """A call of this worker that closes an episode."""
        return self.workers[number].call(EnvironmentWorker.end, sample)

    def drop(self, number: int) -> Call[None]:
        """A call of this worker that closes all its episodes."""
        return self.workers[number].call(EnvironmentWorker.drop)

    def close(self) -> None:
        """Closes all episodes and what they share."""
        gather([w.call(EnvironmentWorker.close) for w in self.workers])

    def _worker(self, number: int) -> ActorHandle[EnvironmentWorker]:
        processes = Processes("environment", [number], 1, self.places, together=self.TOGETHER, event_loop=True)
        return start(EnvironmentWorker, processes, *self._given)[0]


def _compare(
    workers: Sequence[ActorHandle[Any]],
    found: Sequence[Loaded],
    settings: str = "",
    checkpoint: Path | Storage | None = None,
) -> None:
    """Compares what workers loaded with each other, and with what this process gave them and sees."""
    here = loaded(settings, digest_of(Checkpoint(checkpoint).manifest) if checkpoint else "")
    parties = [("the driver", here), *zip((w.name for w in workers), found, strict=True)]
    check_agreement(parties, str(checkpoint))


def hosted(host: ActorHandle[RankWorker]) -> tuple[str, int]:
    """Address and port of a TCPStore that the first rank of a world hosts for the others to meet at."""
    address = gather([host.address()])[0]
    return address, gather([host.call(RankWorker.host, address)])[0]
