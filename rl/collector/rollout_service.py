"""RolloutService: requests go to teams of rollout workers, and completions come back.

A team that dies is replaced when the policy rests, and what it had not handed in goes to the others meanwhile.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lockstep.rl.collector.supervisor import Supervisor
from lockstep.rl.remote import Call, WorkerDied, gather
from lockstep.rl.rollout.output_processor import RolloutRequest
from lockstep.rl.types import Completion
from lockstep.rl.workers.stubs import RolloutWorker
from lockstep.rl.workers.worker_groups import PASSES, ModelGroup, RolloutGroup


@dataclass
class _Team:
    """What a team of rollout workers has to do."""

    calls: Sequence[Call[list[Completion] | None]] = ()
    """The call that each of its ranks is in; none while it rests."""
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


class RolloutService:
    """Keeps teams busy with the requests that they were given."""

    def __init__(self, rollouts: RolloutGroup, policy: ModelGroup, supervisor: Supervisor) -> None:
        self._rollouts, self._policy, self._supervisor = rollouts, policy, supervisor
        self._teams = [_Team() for _ in rollouts.teams]
        self._lost: list[int] = []

    @property
    def version(self) -> int:
        """Version of the weights that completions are written with."""
        return self._rollouts.version

    @property
    def calls(self) -> list[Call[list[Completion] | None]]:
        """One call of each team that is busy."""
        return [team.calls[0] for team in self._teams if team.calls]

    @property
    def has_work(self) -> bool:
        """Whether a living team has requests whose completions it has not handed in."""
        return any(team.unwritten and number not in self._lost for number, team in enumerate(self._teams))

    def assign(self, requests: Sequence[RolloutRequest], number: int | None = None) -> None:
        """Gives requests to the team of this number, if it lives, or to the one that has the least to do."""
        living = [team for number, team in enumerate(self._teams) if number not in self._lost]
        team = min(living or self._teams, key=lambda team: len(team.unwritten))
        if number is not None and number not in self._lost:
            team = self._teams[number]
        team.waiting += requests
        team.unwritten |= {request.number: request for request in requests}

    def advance(self) -> None:
        """Has teams that rest and have something to do go on writing."""
        for number, team in enumerate(self._teams):
            if team.unwritten and not team.calls and number not in self._lost:
                requests, team.waiting = team.waiting, []
                members = self._rollouts.teams[number]
                team.calls = [member.call(RolloutWorker.work, requests, PASSES) for member in members]

    def tell(self, method: Callable[[RolloutWorker], list[Completion] | None]) -> None:
        """Calls a method of all living teams, which rest."""
        for number, members in enumerate(self._rollouts.teams):
            if number not in self._lost:
                self._teams[number].calls = [member.call(method) for member in members]

    def take(self, call: Call[list[Completion] | None]) -> list[Finished]:
        """What a team's call that has ended brought; nothing where the team died."""
        number = next(n for n, team in enumerate(self._teams) if team.calls and team.calls[0] == call)
        team = self._teams[number]
        calls, team.calls = team.calls, ()
        try:
            completions = gather(calls)[0]
        except WorkerDied as death:
            self._supervisor.count_death(f"rollout {number}", death)
            self._lose(number)
            return []
        if completions:
            self._supervisor.count_result(f"rollout {number}")
        return [Finished(number, team.unwritten.pop(each.sample), each) for each in completions or ()]

    def receive(self) -> None:
        """Gives all teams, which rest, the next version of the policy's weights."""
        for number in self._rollouts.receive(self._policy):
            if number not in self._lost:
                self._lose(number)

    def resume(self, version: int) -> None:
        """Gives all teams the weights that the policy has, as this version."""
        self._rollouts.resume(self._policy, version)

    def revive(self) -> None:
        """Replaces teams that died; the policy rests, and has the weights that completions are written with."""
        while self._lost:
            self._supervisor.replace(lambda: self._rollouts.replace(self._lost[-1], self._policy))
            self._lost.pop()

    def drop(self) -> None:
        """Forgets all requests."""
        for team in self._teams:
            team.waiting, team.unwritten = [], {}

    def _lose(self, number: int) -> None:
        """Gives what a team that died had not handed in to others, or to the one that replaces it."""
        self._lost.append(number)
        team = self._teams[number]
        requests, team.unwritten, team.waiting = list(team.unwritten.values()), {}, []
        if requests:
            self.assign(requests)
