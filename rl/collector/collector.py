"""Collector: judged groups of completions, which are asked for by their numbers and taken when they are whole.

Nothing here runs by itself: whoever waits, for a group or for a call of a learner, keeps rollout workers, environments
and verifiers busy meanwhile. A worker whose process dies is replaced, and what it had not handed in is asked for again;
what it had handed in is kept, so that nothing is lost and nothing comes twice.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from lockstep.rl.collector.episode_service import Continued, Ended, EpisodeService
from lockstep.rl.collector.group_buffer import GroupBuffer
from lockstep.rl.collector.judge_service import JudgeService
from lockstep.rl.collector.rollout_service import Finished, RolloutService
from lockstep.rl.collector.supervisor import WATCH_S, Supervisor
from lockstep.rl.remote import Call, any_of, failed, gather
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.output_processor import RolloutRequest, Written
from lockstep.rl.types import Judged, Prompt, Rollout
from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.workers.stubs import ModelWorker, RolloutWorker
from lockstep.rl.workers.worker_groups import EnvironmentGroup, ModelGroup, RolloutGroup, VerifierGroup

Result = TypeVar("Result")
BESIDE = 1 << 32
"""Number of the first group that is no part of a batch."""


class Collector:
    """Waits for one event at a time, of rollout workers, environments or verifiers, and does what follows from it."""

    def __init__(
        self,
        policy: ModelGroup,
        rollouts: RolloutGroup,
        verifiers: VerifierGroup,
        clock: Callable[[], float] = time.monotonic,
        environments: EnvironmentGroup | None = None,
    ) -> None:
        self._supervisor = Supervisor(partial(policy.call, ModelWorker.pid), clock)
        self._rollouts = RolloutService(rollouts, policy, self._supervisor)
        self._judges = JudgeService(verifiers, self._supervisor)
        self._episodes = EpisodeService(environments, self._supervisor, clock) if environments else None
        self._buffer = GroupBuffer()

    @property
    def version(self) -> int:
        """Version of the weights that completions are written with."""
        return self._rollouts.version

    def metrics(self) -> dict[str, float]:
        """Those of `RolloutService`, and how many workers died and were replaced so far."""
        return self._rollouts.metrics() | {"replaced_workers": float(self._supervisor.replaced)}

    def ask(self, prompts: Mapping[int, Prompt], sampling: SamplingParams, samples: int, seed: int) -> None:
        """Asks for groups of so many completions each, by their numbers.

        Sample s of group g has the number g · samples + s; what is drawn depends on (seed, that number, position) only.
        A group is written by the team that has the least to do, so that its prompt is computed once. Where environments
        speak first, they are asked before.
        """
        if self._episodes:
            sampling = self._episodes.sampling(sampling)
        first = self._episodes if self._episodes and self._episodes.speak_first else None
        coming = first.coming if first else Counter[int]()
        for group, prompt in prompts.items():
            numbers, stopped = self._buffer.open(group, prompt, samples), _stopped(sampling, prompt)
            requests = [RolloutRequest(number, prompt.tokens, stopped, seed) for number in numbers]
            team = self._rollouts.least_busy(coming)
            if first:
                first.begin(team, requests, prompt)
                coming[team] += samples
            else:
                self._rollouts.assign(requests, team)
        self._rollouts.advance()

    def answer(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, samples: int, seed: int
    ) -> list[list[Judged]]:
        """Judged groups of completions beside those that were asked for before, which go on.

        The groups have numbers of their own, from `BESIDE` on. Where nothing is being written in the end, workers
        forget what they have computed, so that what comes then has the bits that it has without this.

        Raises:
            WorkerFailed: as `take`.
        """
        numbers = range(BESIDE, BESIDE + len(prompts))
        self.ask(dict(zip(numbers, prompts, strict=True)), sampling, samples, seed)
        found = [self.take(number) for number in numbers]
        if not self._rollouts.has_work:
            self._rest()
            self._tell(RolloutWorker.drop)
        return found

    def take(self, group: int) -> list[Judged]:
        """The completions of a group with their verdicts, when all have come; the policy rests meanwhile.

        Raises:
            WorkerFailed: when a rank of the policy has died, or a worker has again and again.
        """
        while not self._buffer.is_whole(group):
            self._rollouts.revive()
            self._supervisor.watch()
            self._await_any()
        return self._buffer.take(group)

    def gather(self, calls: Sequence[Call[Result]], /) -> list[Result]:
        """Results of a learner's calls, in order; writing and judging go on meanwhile.

        Raises:
            WorkerFailed: see `remote.gather`.
        """
        waiting = list(calls)
        while waiting:
            ended = self._await_any(waiting)
            if any(map(failed, ended)):
                break
            waiting = [call for call in waiting if call not in ended]
        return gather(calls)

    def renew(self, *, finish: bool = False) -> None:
        """Gives the workers the next weights; completions that are being written go on under them, or finish before."""
        if finish:
            self._finish()
        self._rest()
        self._tell(RolloutWorker.settle)
        self._rollouts.receive()
        self._rollouts.revive()
        self._rollouts.advance()

    def resume(self, version: int) -> None:
        """Gives the workers the weights that the policy has, as this version."""
        self._rollouts.resume(version)

    def release(self) -> None:
        """Has the workers give memory back, that of the weights included, which `renew` or `resume` bring again."""
        self._rest()
        self._tell(RolloutWorker.release)

    def drop(self) -> None:
        """Forgets all that was asked for, and what workers have computed.

        What they find in their caches changes the last bits of fast numerics, and a run that goes on has empty ones.
        """
        self._rest()
        self._tell(RolloutWorker.drop)
        self._rollouts.drop()
        self._judges.drop()
        self._buffer.clear()
        if self._episodes:
            self._episodes.drop()

    def _tell(self, method: Callable[[RolloutWorker], Written | None]) -> None:
        """Calls a method of all teams, which rest, and waits until they rest again."""
        self._rollouts.tell(method)
        self._rest()

    def _finish(self) -> None:
        """Has all that living teams were asked for written, under the weights that they have."""
        while self._rollouts.has_work or (self._episodes and self._episodes.has_work):
            self._await_any()

    def _rest(self) -> None:
        """Waits until no team is in a call."""
        while self._rollouts.calls:
            self._await_any(write=False)

    def _await_any(self, others: Sequence[Call[Any]] = (), *, write: bool = True) -> list[Call[Any]]:
        """Waits for one event at least and does what follows; returns those of the other calls that have ended."""
        self._rollouts.replace()
        self._judges.replace()
        if self._episodes:
            self._episodes.replace()
        if write:
            self._rollouts.advance()
        writing, judging = self._rollouts.calls, self._judges.calls
        playing = self._episodes.calls if self._episodes else ()
        found = []
        for call in any_of([*writing, *judging, *playing, *others], self._patience()):
            if call in writing:
                self._after_writing(self._rollouts.take(call))
            elif self._episodes and call in playing:
                self._after_answer(self._episodes.take(call))
            elif call in judging:
                for rollout, verdict in self._judges.take(call):
                    self._buffer.put(Judged(rollout, verdict))
            else:
                found.append(call)
        return found

    def _patience(self) -> float | None:
        """Seconds after which there is something to do though no call has ended; None for none."""
        if self._rollouts.is_short or self._judges.is_short:
            return WATCH_S
        return self._episodes.patience() if self._episodes else None

    def _after_writing(self, finished: Sequence[Finished]) -> None:
        """Asks environments for their answers to completions, or verifiers for their verdicts."""
        whole = list[Rollout]()
        for each in finished:
            rollout = each.completion.with_prompt(self._buffer.prompt_of(each.completion.sample))
            if rollout.error:
                self._give_up(rollout)
            elif self._episodes:
                self._after_answer(self._episodes.answer(each.team, each.request, rollout))
            else:
                whole.append(rollout)
        if whole:
            self._judges.judge(whole)

    def _give_up(self, rollout: Rollout) -> None:
        """Counts a rollout that an engine could not compute as ungradable."""
        if self._episodes:
            self._episodes.end(rollout.sample)
        reason = f"it could not be written, twice: {rollout.error}"
        self._buffer.put(Judged(rollout, Verdict(Outcome.ungradable, reason)))

    def _after_answer(self, answer: Continued | Ended | None) -> None:
        """Has a rollout go on, or judged where its environment has no verdict; None where that is to come."""
        if answer is None:
            return
        if isinstance(answer, Continued):
            self._rollouts.assign([answer.request], answer.team)
        elif answer.verdict is None or self._judges.adds_terms:
            self._judges.judge([answer.rollout], answer.verdict)
        else:
            self._buffer.put(Judged(answer.rollout, answer.verdict))


def _stopped(sampling: SamplingParams, prompt: Prompt) -> SamplingParams:
    """Sampling whose completions also end where those of a prompt's task and of its chat template do."""
    ends = {"stop": (*sampling.stop, *prompt.stop), "stop_tokens": (*sampling.stop_tokens, *prompt.stop_tokens)}
    return sampling.model_copy(update=ends)
