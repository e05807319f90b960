"""EpisodeService: environments answer the turns of rollouts, which then go on or have ended; some speak first.

An episode goes to the process that has the fewest, and stays there. Where a process dies, or hangs, another takes its
place while the others go on, and episodes that it had begin again from their prompts, in whichever process has the
fewest then; one that loses its process twice is ungradable.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lockstep.rl.collector.supervisor import WATCH_S, LostWorkers, Supervisor
from lockstep.rl.remote import Call, WorkerDied, any_of, gather
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.output_processor import RolloutRequest
from lockstep.rl.types import NO_NUMBERS, NO_TOKENS, Completion, Prompt, Rollout, answered, turns
from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.workers.worker_groups import EnvironmentGroup

if TYPE_CHECKING:
    from lockstep.rl.environments.protocol import EnvironmentResponse


@dataclass(frozen=True)
class _Episode:
    """A rollout that waits for its environment's answer, or, without tokens, for its first observation."""

    team: int
    request: RolloutRequest
    rollout: Rollout


@dataclass(frozen=True)
class _Asked:
    """An episode whose answer a process has been asked for."""

    episode: _Episode
    worker: int
    due: float
    """When the process is given up."""


@dataclass(frozen=True)
class Continued:
    """A rollout that the model goes on with, or begins, after an environment's answer."""

    request: RolloutRequest
    team: int
    """The team that has its keys and values, or that of its group."""


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
        self.speak_first = environments.speaks_first
        """Whether environments have a first observation, so that episodes begin with `begin`."""
        self._lost = LostWorkers("environment", len(environments.workers), environments.replacing, supervisor)
        self._playing: dict[Call[EnvironmentResponse], _Asked] = {}
        self._waiting: list[_Episode] = []
        self._episodes: list[set[int]] = [set() for _ in environments.workers]
        """Samples whose episodes each process has."""
        self._begun_again: set[int] = set()

    @property
    def calls(self) -> "Collection[Call[EnvironmentResponse]]":
        """Calls of the environments' processes that have not been taken, the oldest first."""
        return self._playing.keys()

    @property
    def has_work(self) -> bool:
        """Whether a rollout waits for an answer."""
        return bool(self._playing or self._waiting)

    @property
    def coming(self) -> Counter[int]:
        """Requests that wait for a first observation, by team."""
        episodes = [*(asked.episode for asked in self._playing.values()), *self._waiting]
        return Counter(episode.team for episode in episodes if not episode.rollout.tokens)

    def sampling(self, sampling: SamplingParams) -> SamplingParams:
        """Sampling parameters under which a completion stops at the end of its turn, too."""
        return sampling.model_copy(update={"stop": (*sampling.stop, *self._environments.config.stop)})

    def begin(self, team: int, requests: Sequence[RolloutRequest], prompt: Prompt) -> None:
        """Asks for first observations, behind which this team is going to write."""
        for request in requests:
            nothing = Completion(request.number, NO_TOKENS, NO_NUMBERS, "", "stop", NO_TOKENS, final="")
            self._ask(_Episode(team, request, nothing.with_prompt(prompt)))

    def answer(self, team: int, request: RolloutRequest, rollout: Rollout) -> Continued | Ended | None:
        """Asks for the answer to a rollout's last turn, which this team wrote.

        Returns:
            None; or what follows at once, where the process that had the episode has died since its last turn.
        """
        episode = _Episode(team, request, rollout)
        if (turns(rollout) > 1 or self.speak_first) and self._home(rollout.sample) is None:
            return self._again(episode)
        self._ask(episode)
        return None

    def _ask(self, episode: _Episode) -> None:
        """Asks the process that has an episode, or the one that has the fewest; it waits where none is left."""
        number = self._home(episode.rollout.sample)
        if number is None:
            if not self._lost.living:
                self._waiting.append(episode)
                return
            number = min(self._lost.living, key=lambda number: len(self._episodes[number]))
            self._episodes[number].add(episode.rollout.sample)
        due, rollout, request = self._clock() + self._environments.patience, episode.rollout, episode.request
        most = request.sampling.max_new_tokens
        if rollout.tokens:
            call = self._environments.answer(number, rollout, most)
        else:
            call = self._environments.begin(number, rollout, request.seed, most)
        self._playing[call] = _Asked(episode, number, due)

    def _home(self, sample: int) -> int | None:
        """The process that has the episode of a sample."""
        return next((number for number, samples in enumerate(self._episodes) if sample in samples), None)

    def patience(self) -> float | None:
        """Seconds until there is something to do though no call has ended; None for none.

        A process that has owed an answer for too long is ended.
        """
        left = self._seconds_left()
        if left is None:  # calls of processes that have ended fail by themselves
            return WATCH_S if self._playing or self._lost else None
        return WATCH_S if self._lost else max(left, WATCH_S)

    def _seconds_left(self) -> float | None:
        """Seconds until the oldest call of a present process is overdue; a process is ended where it is."""
        for call, asked in self._playing.items():
            if call.actor is self._environments.workers[asked.worker] and asked.worker not in self._lost:
                left = asked.due - self._clock()
                if left <= 0:
                    call.actor.end()  # its calls end as those of any worker that died
                return left
        return None

    def take(self, call: "Call[EnvironmentResponse]") -> Continued | Ended | None:
        """What follows from a call that has ended; where the environment's process died, it is going to be replaced.

        Raises:
            WorkerFailed: when it died too often.
        """
        asked = self._playing.pop(call)
        episode, rollout = asked.episode, asked.episode.rollout
        try:
            answer = gather([call])[0]
        except WorkerDied as death:
            self._lose(asked.worker, call, death)
            return self._again(episode)
        if answer.is_lost:
            return self._again(episode)
        self._supervisor.count_result(f"environment {asked.worker}")
        if answer.tokens:
            begun = answered(rollout.completion, answer.tokens)
            return Continued(replace(episode.request, begun=begun), episode.team)
        self._episodes[asked.worker].discard(rollout.sample)
        reason = answer.finish_reason or rollout.finish_reason
        return Ended(replace(rollout, final=answer.final, finish_reason=reason), answer.verdict)

    def _lose(self, number: int, call: Call[Any], death: WorkerDied) -> None:
        """Has a process replaced that died in a call, unless that is under way, and forgets the episodes it had."""
        if call.actor is self._environments.workers[number] and number not in self._lost:
            self._lost.add(number, death)
            self._episodes[number] = set()

    def _again(self, episode: _Episode) -> Continued | Ended | None:
        """An episode that was lost, from its prompt once more; ungradable where it was lost before.

        Returns:
            None, where its environment is asked for the first observation again.
        """
        number = episode.rollout.sample
        for samples in self._episodes:
            samples.discard(number)
        if number in self._begun_again:
            reason = "its environment's process died, or hung, twice"
            return Ended(episode.rollout, Verdict(Outcome.ungradable, reason))
        self._begun_again.add(number)
        request = replace(episode.request, begun=None)
        if not self.speak_first:
            return Continued(request, episode.team)
        self.begin(episode.team, [request], episode.rollout.prompt)
        return None

    def end(self, sample: int) -> None:
        """Closes the episode of a rollout that does not go on."""
        number = self._home(sample)
        if number is not None:
            self._episodes[number].discard(sample)
            self._environments.end(number, sample)

    def replace(self) -> None:
        """Goes on replacing processes that died, as far as that takes no waiting.

        Raises:
            WorkerFailed: when one died too often, or none is left and none finds a place.
        """
        self._lost.proceed()
        if self._waiting and self._lost.living:
            waiting, self._waiting = self._waiting, []
            for episode in waiting:
                self._ask(episode)

    def drop(self) -> None:
        """Closes all episodes; a process that does not is ended, and going to be replaced."""
        self._playing, self._waiting, self._begun_again = {}, [], set()
        self._episodes = [set() for _ in self._episodes]
        closing = {self._environments.drop(number): number for number in self._lost.living}
        due, waiting = self._clock() + self._environments.patience, list(closing)
        while waiting and (left := due - self._clock()) > 0:
            ended = any_of(waiting, left)
            waiting = [call for call in waiting if call not in ended]
        for call in waiting:
            call.actor.end()
        for call, number in closing.items():
            try:
                gather([call])
            except WorkerDied as death:
                self._lose(number, call, death)
