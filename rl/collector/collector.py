"""The side of rollouts: groups are asked for by their numbers, written and judged at the same time, and handed out.

Nothing here runs by itself: whoever waits, for a group or for a call of a learner, keeps rollout workers and verifiers
busy meanwhile. A worker whose process dies is replaced, and what it had not handed in is asked for again; what it had
handed in is kept, so that nothing is lost and nothing comes twice.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lockstep.rl.remote import Call, WorkerDied, any_of, failed, gather
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.output_processor import RolloutRequest
from lockstep.rl.types import Completion, Judged, Prompt, Rollout, answered
from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.workers.worker_groups import PASSES, EnvironmentGroup, ModelGroup, RolloutGroup, VerifierGroup

if TYPE_CHECKING:
    from lockstep.rl.environments.protocol import EnvironmentResponse

WATCH_S = 1.0
"""Between two looks at the policy while completions are written."""

DEATHS = 3
"""How often a worker may die before anything came of its work."""


@dataclass
class _Team:
    """What a team of rollout workers has to do."""

    calls: list[Call] = field(default_factory=list)
    """That its ranks are in; none while it rests."""
    waiting: list[RolloutRequest] = field(default_factory=list)
    """Orders that it is told of with the next call."""
    unwritten: dict[int, RolloutRequest] = field(default_factory=dict)
    """Orders that it has not handed in, those that wait included."""


@dataclass(frozen=True)
class _Episode:
    """A rollout whose environment has the word."""

    call: Call
    team: int
    """That wrote it, and has its keys and values."""
    order: RolloutRequest
    rollout: Rollout
    due: float
    """When the environment's process is given up."""


class Collector:
    """Rollout workers and verifiers at work on groups of completions."""

    def __init__(
        self,
        policy: ModelGroup,
        rollouts: RolloutGroup,
        verifiers: VerifierGroup,
        clock: Callable[[], float] = time.monotonic,
        environments: EnvironmentGroup | None = None,
    ) -> None:
        self._clock, self._seen = clock, clock()
        self._policy, self._rollouts, self._verifiers = policy, rollouts, verifiers
        self._teams = [_Team() for _ in rollouts.teams]
        self._lost: list[int] = []
        self._judging: dict[Any, tuple[int, Call, list[Rollout]]] = {}
        self._environments = environments
        self._playing: dict[Any, _Episode] = {}
        self._groups: dict[int, list[Judged | None]] = {}
        self._prompts: dict[int, Prompt] = {}
        self._places: dict[int, tuple[int, int]] = {}
        self._deaths: Counter[str] = Counter()
        self._replaced = 0

    @property
    def version(self) -> int:
        """Of the weights that completions are written with."""
        return self._rollouts.version

    def metrics(self) -> dict[str, float]:
        """Version of the weights, and how many workers died and were replaced so far."""
        return {"weight_version": float(self.version), "replaced_workers": float(self._replaced)}

    def ask(self, prompts: Mapping[int, Prompt], sampling: SamplingParams, samples: int, seed: int) -> None:
        """Ask for groups of so many completions each, by their numbers.

        Sample s of group g has the number g · samples + s; what is drawn depends on (seed, that number, position) only.
        A group is written by the team that has the least to do, so that its prompt is computed once.
        """
        if self._environments:
            sampling = sampling.model_copy(update={"stop": (*sampling.stop, *self._environments.config.stop)})
        for group, prompt in prompts.items():
            numbers = range(group * samples, (group + 1) * samples)
            self._groups[group], self._prompts[group] = [None] * samples, prompt
            self._places |= {number: (group, sample) for sample, number in enumerate(numbers)}
            self._assign([RolloutRequest(number, prompt.tokens, sampling, seed) for number in numbers])

    def take(self, group: int) -> list[Judged]:
        """The completions of a group with their verdicts, when they are there; the policy rests meanwhile.

        Raises:
            WorkerFailed: when a rank of the policy has died, or a worker has again and again.
        """
        while None in self._groups[group]:
            self._revive()
            self._watch()
            self._await_any()
        del self._prompts[group]
        return [judged for judged in self._groups.pop(group) if judged is not None]

    def gather(self, calls: Sequence[Call]) -> list[Any]:
        """Results of a learner's calls, in order; writing and judging go on meanwhile.

        Raises:
            WorkerFailed: see `calls.gather`.
        """
        waiting = list(calls)
        while waiting:
            ended = self._await_any(waiting)
            if any(map(failed, ended)):
                break
            waiting = [call for call in waiting if call not in ended]
        return gather(calls)

    def renew(self, *, finish: bool = False) -> None:
        """Give the workers the next weights; completions that are being written go on under them, or finish before."""
        if finish:
            self._finish()
        self._rest()
        self._tell("settle")
        self._rest()
        for number in self._rollouts.receive(self._policy):
            if number not in self._lost:
                self._lose(number)
        self._revive()

    def resume(self, version: int) -> None:
        """Give the workers the weights that the policy has, as this version."""
        self._rollouts.resume(self._policy, version)

    def release(self) -> None:
        """Have the workers give memory back, that of the weights included, which `renew` or `resume` bring again."""
        self._rest()
        self._tell("release")
        self._rest()

    def drop(self) -> None:
        """Forget all that was asked for, and what workers have computed.

        What they find in their caches changes the last bits of fast numerics, and a run that goes on has empty ones.
        """
        self._rest()
        self._tell("drop")
        self._rest()
        for team in self._teams:
            team.waiting, team.unwritten = [], {}
        self._groups, self._prompts, self._places, self._judging, self._playing = {}, {}, {}, {}, {}
        if self._environments:
            self._environments.drop()

    def _tell(self, method: str) -> None:
        """Have all living teams, which rest, do something."""
        for number, members in enumerate(self._rollouts.teams):
            if number not in self._lost:
                self._teams[number].calls = [member.call(method) for member in members]

    def _assign(self, orders: Sequence[RolloutRequest], number: int | None = None) -> None:
        """Give orders to the team of this number, if it lives, or to the one that has the least to do."""
        living = [team for number, team in enumerate(self._teams) if number not in self._lost]
        team = min(living or self._teams, key=lambda team: len(team.unwritten))
        if number is not None and number not in self._lost:
            team = self._teams[number]
        team.waiting += orders
        team.unwritten |= {order.number: order for order in orders}

    def _finish(self) -> None:
        """Have what living workers were asked for written, under the weights that they have."""
        while self._playing or any(team.unwritten and n not in self._lost for n, team in enumerate(self._teams)):
            self._await_any()

    def _watch(self) -> None:
        """Be sure that the policy is alive, which nobody else asks while completions are written."""
        if self._clock() - self._seen > WATCH_S:
            self._policy.call("pid")
            self._seen = self._clock()

    def _rest(self) -> None:
        """Wait until no team is in a call."""
        while any(team.calls for team in self._teams):
            self._await_any(write=False)

    def _await_any(self, others: Sequence[Call] = (), *, write: bool = True) -> list[Call]:
        """Wait for one event at least and do what follows from it; returns those of other calls that have ended."""
        if write:
            self._write()
        writing = {team.calls[0][1]: number for number, team in enumerate(self._teams) if team.calls}
        calls = [self._teams[number].calls[0] for number in writing.values()]
        judging = [call for _, call, _ in self._judging.values()]
        playing = [episode.call for episode in self._playing.values()]
        found = []
        for call in any_of([*calls, *judging, *playing, *others], self._patience()):
            if call[1] in writing:
                self._take_written(writing[call[1]])
            elif call[1] in self._playing:
                self._take_answer(self._playing.pop(call[1]))
            elif call[1] in self._judging:
                self._take_verdicts(*self._judging.pop(call[1]))
            else:
                found.append(call)
        return found

    def _write(self) -> None:
        """Have teams that rest and have something to do go on."""
        for number, team in enumerate(self._teams):
            if team.unwritten and not team.calls and number not in self._lost:
                orders, team.waiting = team.waiting, []
                team.calls = [member.call("work", orders, PASSES) for member in self._rollouts.teams[number]]

    def _take_written(self, number: int) -> None:
        team = self._teams[number]
        calls, team.calls = team.calls, []
        try:
            completions: list[Completion] = gather(calls)[0]
        except WorkerDied as death:
            self._bury(f"rollout {number}", death)
            self._lose(number)
            return
        if completions:
            self._deaths.pop(f"rollout {number}", None)
            orders = [team.unwritten.pop(each.sample) for each in completions]
            rollouts = [each.with_prompt(self._prompts[self._places[each.sample][0]]) for each in completions]
            if not self._environments:
                self._judge(rollouts)
                return
            due = self._clock() + self._environments.patience
            for order, rollout in zip(orders, rollouts, strict=True):
                call = self._environments.answer(rollout, order.sampling.max_new_tokens)
                self._playing[call[1]] = _Episode(call, number, order, rollout, due)

    def _patience(self) -> float | None:
        """Seconds until an environment's call is overdue; its process is replaced where one is."""
        if not self._playing or not self._environments:
            return None
        left = min(episode.due for episode in self._playing.values()) - self._clock()
        if left <= 0:
            self._environments.worker.end()  # its calls end as those of any worker that died
        return max(left, WATCH_S)

    def _take_answer(self, episode: _Episode) -> None:
        assert self._environments
        try:
            answer: EnvironmentResponse = gather([episode.call])[0]
        except WorkerDied as death:
            if episode.call[0] is self._environments.worker:
                self._bury("environment", death)
                self._environments.replace()
                self._replaced += 1
            self._score(episode.rollout, Verdict(Outcome.ungradable, "its environment's process died, or hung"))
            return
        self._deaths.pop("environment", None)
        if answer.tokens:
            begun = answered(episode.rollout.completion, answer.tokens)
            self._assign([replace(episode.order, begun=begun)], episode.team)
            return
        reason = answer.finish_reason or episode.rollout.finish_reason
        rollout = replace(episode.rollout, final=answer.final, finish_reason=reason)
        if answer.verdict is None:
            self._judge([rollout])
        else:
            self._score(rollout, answer.verdict)

    def _judge(self, rollouts: list[Rollout]) -> None:
        """Have completions judged by the verifier that has the least to do."""
        load = Counter(dict.fromkeys(range(len(self._verifiers.workers)), 0))
        load.update(number for number, _, _ in self._judging.values())
        worker = min(load, key=lambda number: load[number])
        call = self._verifiers.judge(worker, rollouts)
        self._judging[call[1]] = worker, call, rollouts

    def _take_verdicts(self, worker: int, call: Call, rollouts: list[Rollout]) -> None:
        try:
            verdicts = gather([call])[0]
        except WorkerDied as death:
            if call[0] is self._verifiers.workers[worker]:  # not one that has been replaced
                self._bury(f"verifier {worker}", death)
                self._verifiers.replace(worker)
                self._replaced += 1
            self._judge(rollouts)
            return
        self._deaths.pop(f"verifier {worker}", None)
        for rollout, verdict in zip(rollouts, verdicts, strict=True):
            self._score(rollout, verdict)

    def _score(self, rollout: Rollout, verdict: Verdict) -> None:
        group, sample = self._places.pop(rollout.sample)
        self._groups[group][sample] = Judged(rollout, verdict)

    def _lose(self, number: int) -> None:
        """What a team that died had not handed in goes to others, or to the one that replaces it."""
        self._lost.append(number)
        team = self._teams[number]
        orders, team.unwritten, team.waiting = list(team.unwritten.values()), {}, []
        if orders:
            self._assign(orders)

    def _revive(self) -> None:
        """Replace teams that died; the policy rests, and has the weights that completions are written with."""
        while self._lost:
            self._rollouts.replace(self._lost[-1], self._policy)
            self._lost.pop()
            self._replaced += 1

    def _bury(self, worker: str, death: WorkerDied) -> None:
        """Count a death.

        Raises:
            WorkerDied: when the worker dies again and again.
        """
        self._deaths[worker] += 1
        if self._deaths[worker] > DEATHS:
            raise death
