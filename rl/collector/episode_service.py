"""EpisodeService: environments answer the turns of rollouts, which then go on or have ended.

Where the environments' process dies, or hangs, another takes its place and episodes that it had begin again from their
prompts; one that loses its process twice is ungradable.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lockstep.rl.collector.supervisor import WATCH_S, Supervisor
from lockstep.rl.remote import Call, WorkerDied, gather
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.output_processor import RolloutRequest
from lockstep.rl.types import Rollout, answered
from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.workers.worker_groups import EnvironmentGroup

if TYPE_CHECKING:
    from lockstep.rl.environments.protocol import EnvironmentResponse


@dataclass(frozen=True)
class _Episode:
    """A rollout that waits for its environment's answer."""

    team: int
    request: RolloutRequest
    rollout: Rollout
    due: float
    """When the environment's process is given up."""


@dataclass(frozen=True)
class Continued:
    """A rollout that the model goes on with after an environment's answer."""

    request: RolloutRequest
    team: int
    """The team that has its keys and values."""


@dataclass(frozen=True)
class Ended:
    """A rollout whose episode has ended."""

    rollout: Rollout
    verdict: Verdict | None
    """The environment's own, where it has one."""


class EpisodeService:
    """Asks environments for the answers to turns."""

    def __init__(self, environments: EnvironmentGroup, supervisor: Supervisor, clock: Callable[[], float]) -> None:
        self._environments, self._supervisor, self._clock = environments, supervisor, clock
        self._playing: dict[Call[EnvironmentResponse], _Episode] = {}
        self._begun_again: set[int] = set()

    @property
    def calls(self) -> "Collection[Call[EnvironmentResponse]]":
        """Calls of the environments' process that have not been taken."""
        return self._playing.keys()

    def sampling(self, sampling: SamplingParams) -> SamplingParams:
        """Sampling parameters under which a completion stops at the end of its turn, too."""
        return sampling.model_copy(update={"stop": (*sampling.stop, *self._environments.config.stop)})

    def begin(self, team: int, request: RolloutRequest, rollout: Rollout) -> None:
        """Asks for the answer to a rollout's last turn, which this team wrote."""
        due = self._clock() + self._environments.patience
        call = self._environments.answer(rollout, request.sampling.max_new_tokens)
        self._playing[call] = _Episode(team, request, rollout, due)

    def patience(self) -> float | None:
        """Seconds until the first call is overdue; the environments' process is ended where one is."""
        worker = self._environments.worker
        dues = [episode.due for call, episode in self._playing.items() if call.actor is worker]
        if not dues:
            return WATCH_S if self._playing else None  # calls of a process that has ended fail by themselves
        left = min(dues) - self._clock()
        if left <= 0:
            worker.end()  # its calls end as those of any worker that died
        return max(left, WATCH_S)

    def take(self, call: "Call[EnvironmentResponse]") -> Continued | Ended:
        """What follows from a call that has ended; where the environments' process died, it is replaced."""
        episode = self._playing.pop(call)
        try:
            answer = gather([call])[0]
        except WorkerDied as death:
            if call.actor is self._environments.worker:
                self._supervisor.replace("environment", death, self._environments.replace)
            return self._again(episode, "its environment's process died, or hung, twice")
        if answer.is_lost:
            return self._again(episode, "its environment's process died, or hung, twice")
        self._supervisor.count_result("environment")
        if answer.tokens:
            begun = answered(episode.rollout.completion, answer.tokens)
            return Continued(replace(episode.request, begun=begun), episode.team)
        reason = answer.finish_reason or episode.rollout.finish_reason
        return Ended(replace(episode.rollout, final=answer.final, finish_reason=reason), answer.verdict)

    def _again(self, episode: _Episode, reason: str) -> Continued | Ended:
        """An episode that was lost, from its prompt once more; ungradable where it was lost before."""
        number = episode.rollout.sample
        if number in self._begun_again:
            return Ended(episode.rollout, Verdict(Outcome.ungradable, reason))
        self._begun_again.add(number)
        return Continued(replace(episode.request, begun=None), episode.team)

    def drop(self) -> None:
        """Closes all episodes."""
        self._playing, self._begun_again = {}, set()
        self._environments.drop()
