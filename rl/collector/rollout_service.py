"""RolloutService: requests go to teams of rollout workers, and completions come back.

A team's engine writes what it was asked for without waiting for anybody; a call of it only fetches what has ended.
What a team that dies had not handed in goes to the others, which go on without it for as long as there is no place for
another one. That gets the policy's weights when the policy rests. A completion that an engine cannot compute is asked
for once more, and handed over with its error then.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from lockstep.rl.collector.supervisor import FAILURES, LostWorkers, Supervisor
from lockstep.rl.remote import Call, WorkerDied, gather
from lockstep.rl.rollout.output_processor import CompletionFailed, RolloutRequest, Written
from lockstep.rl.types import Completion
from lockstep.rl.workers.stubs import RolloutWorker
from lockstep.rl.workers.worker_groups import PASSES, ModelGroup, RolloutGroup

NOTHING: Mapping[int, int] = MappingProxyType({})


@dataclass
class _Team:
    """What a team of rollout workers has to do."""

    calls: Sequence[Call[Written | None]] = ()
    """The call that each of its ranks is in; none while it rests, or goes on writing by itself."""
    waiting: list[RolloutRequest] = field(default_factory=list)
    """Requests that it is told of with the next call."""
    unwritten: dict[int, RolloutRequest] = field(default_factory=dict)
    """Requests whose completions it has not handed in, those that wait included."""


@dataclass(frozen=True)
class Finished:
    """A completion that a team has handed in."""

    team: int
    request: RolloutRequest
    completion: Completion


class Throughput:
    """Tokens that teams wrote, those on trial among them, and the seconds in which their engines computed."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._since = clock, clock()
        self._tokens, self._seconds = defaultdict[int, int](int), defaultdict[int, float](float)
        self._rate, self._proposed, self._accepted = 0.0, 0, 0

    def note(self, team: int, written: Written) -> None:
        """Adds what a team wrote, and the seconds of its engine."""
        self._tokens[team] += written.tokens
        self._seconds[team] += written.seconds
        self._proposed += written.proposed
        self._accepted += written.accepted

    def take(self, teams: int) -> dict[str, float]:
        """Tokens per second that teams write together, and the share of the time in which they did.

        All are of what has come since the last call. The rate is the sum of each team's over its own seconds; where
        none wrote anything it is as before. Where tokens were computed on trial, also the share of them that was drawn.

        Args:
            teams: how many there are.
        """
        rates = [self._tokens[team] / seconds for team, seconds in self._seconds.items() if seconds]
        self._rate = sum(rates) or self._rate
        now = self._clock()
        share = sum(self._seconds.values()) / max(now - self._since, 1e-9) / max(teams, 1)
        found = {"rollout_tokens_per_second": self._rate, "rollout_busy": share}
        if self._proposed:
            found["rollout_accepted"] = self._accepted / self._proposed
        self._since, self._proposed, self._accepted = now, 0, 0
        self._tokens.clear()
        self._seconds.clear()
        return found


class RolloutService:
    """Keeps teams busy with the requests that they were given."""

    def __init__(self, rollouts: RolloutGroup, policy: ModelGroup, supervisor: Supervisor) -> None:
        self._rollouts, self._policy, self._supervisor = rollouts, policy, supervisor
        self._teams = [_Team() for _ in rollouts.teams]
        self._lost = LostWorkers("rollout", len(rollouts.teams), rollouts.replacing, supervisor)
        self._throughput = Throughput(supervisor.clock)
        self._failed: set[int] = set()
        self._failures = 0

    @property
    def version(self) -> int:
        """Version of the weights that completions are written with."""
        return self._rollouts.version

    @property
    def calls(self) -> list[Call[Written | None]]:
        """One call of each team that is busy."""
        return [team.calls[0] for team in self._teams if team.calls]

    def metrics(self) -> dict[str, float]:
        """Version of the weights, teams that are there, and what `Throughput` says of them since the last time."""
        teams = len(self._lost.living)
        return {
            "weight_version": float(self.version),
            "rollout_teams": float(teams),
            **self._throughput.take(teams),
        }

    @property
    def is_short(self) -> bool:
        """Whether a team is being replaced."""
        return bool(self._lost)

    @property
    def has_work(self) -> bool:
        """Whether a living team has requests whose completions it has not handed in."""
        return any(team.unwritten and number not in self._lost for number, team in enumerate(self._teams))

    def assign(self, requests: Sequence[RolloutRequest], number: int | None = None) -> None:
        """Gives requests to the team of this number, if it lives, or to the one that has the least to do."""
        team = self._teams[self.least_busy() if number is None or number in self._lost else number]
        team.waiting += requests
        team.unwritten |= {request.number: request for request in requests}

    def least_busy(self, coming: Mapping[int, int] = NOTHING) -> int:
        """The number of the living team that has the least to do.

        Args:
            coming: requests that it will be given later, by its number.
        """
        numbers = self._lost.living or range(len(self._teams))
        return min(numbers, key=lambda number: len(self._teams[number].unwritten) + coming.get(number, 0))

    def advance(self) -> None:
        """Has teams that rest and have something to do go on writing."""
        for number, team in enumerate(self._teams):
            if team.unwritten and not team.calls and number not in self._lost:
                requests, team.waiting = team.waiting, []
                members = self._rollouts.teams[number]
                team.calls = [member.call(RolloutWorker.work, requests, PASSES) for member in members]

    def tell(self, method: Callable[[RolloutWorker], Written | None]) -> None:
        """Calls a method of all living teams, which rest."""
        for number, members in enumerate(self._rollouts.teams):
            if number not in self._lost:
                self._teams[number].calls = [member.call(method) for member in members]

    def take(self, call: Call[Written | None]) -> list[Finished]:
        """What a team's call that has ended brought; nothing where the team died.

        Raises:
            CompletionFailed: when engines compute nothing but failures.
        """
        number = next(n for n, team in enumerate(self._teams) if team.calls and team.calls[0] == call)
        team = self._teams[number]
        calls, team.calls = team.calls, ()
        try:
            written = gather(calls)[0]
        except WorkerDied as death:
            self._lose(number, death)
            return []
        if not written:
            return []
        self._throughput.note(number, written)
        if written.completions:
            self._supervisor.count_result(f"rollout {number}")
        if any(not each.error for each in written.completions):
            self._failures = 0
        finished = [Finished(number, team.unwritten.pop(each.sample), each) for each in written.completions]
        return [each for each in finished if not each.completion.error or self._gives_up(each)]

    def _gives_up(self, failed: Finished) -> bool:
        """Whether a completion that an engine could not compute has been asked for again; otherwise it is now."""
        number, error = failed.request.number, failed.completion.error
        if number not in self._failed:
            self._failed.add(number)
            self.assign([failed.request])
            return False
        self._failures += 1
        if self._failures > FAILURES:
            raise CompletionFailed(f"completion {number} cannot be written, nor can those before it: {error}")
        return True

    def receive(self) -> None:
        """Gives all living teams, which rest, the next version of the policy's weights."""
        self._lose_all(self._rollouts.receive(self._policy, self._lost))

    def resume(self, version: int) -> None:
        """Gives all living teams the weights that the policy has, as this version."""
        self._lose_all(self._rollouts.resume(self._policy, version, self._lost))

    def replace(self) -> None:
        """Goes on replacing teams that died, as far as that takes no waiting.

        Raises:
            WorkerFailed: when a team died too often, or none is left and none finds a place.
        """
        self._lost.proceed(restore=False)

    def revive(self) -> None:
        """Gives teams that replace others the policy's weights; it rests, and has those of the current version.

        Raises:
            WorkerFailed: as `replace`.
        """
        self.replace()
        ready = self._lost.ready
        died = self._rollouts.fill(self._policy, ready) if ready else []
        for number in ready:
            if number in died:
                self._lost.fail(number, self._death(number))
            else:
                self._lost.restore(number)

    def drop(self) -> None:
        """Forgets all requests."""
        self._failed = set()
        for team in self._teams:
            team.waiting, team.unwritten = [], {}

    def _death(self, number: int) -> WorkerDied:
        return WorkerDied(f"rollout {number} died while it received weights of version {self.version}")

    def _lose_all(self, numbers: Sequence[int]) -> None:
        """Replaces teams that died while they received weights."""
        for number in numbers:
            self._lose(number, self._death(number))

    def _lose(self, number: int, death: WorkerDied) -> None:
        """Gives what a team that died had not handed in to others, or to the one that replaces it."""
        self._lost.add(number, death)
        team = self._teams[number]
        requests, team.unwritten, team.waiting = list(team.unwritten.values()), {}, []
        if requests:
            self.assign(requests)
