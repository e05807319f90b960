"""However rewards fall, no group is learned from too late, none is left out, and steps are full where they can be."""

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from lockstep.rl.algorithms.config import FlowConfig
from lockstep.rl.algorithms.rewards import CORRECTNESS, rewarded
from lockstep.rl.collector.batch_scheduler import BatchScheduler
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.types import Judged, Prompt, Rollout
from lockstep.rl.verdict import Outcome, Verdict


class Slowest:
    """The worst that rollout workers can do: the first token of a group is drawn when it is asked for."""

    def __init__(self, teaching: list[bool]) -> None:
        self.version, self.groups, self.open_most = 0, dict[int, list[Judged]](), 0
        self._teaching = teaching

    def ask(self, prompts: Mapping[int, Prompt], sampling: SamplingParams, samples: int, seed: int) -> None:
        for number, prompt in prompts.items():
            outcome = Outcome.correct if self._teaching[number % len(self._teaching)] else Outcome.incorrect
            versions = (self.version, self.version + 1)
            rollout = Rollout(number, (1, 2), (0.0, 0.0), "", "stop", versions, prompt=prompt)
            self.groups[number] = [Judged(rollout, Verdict(outcome))]
        self.open_most = max(self.open_most, len(self.groups))

    def take(self, group: int) -> list[Judged]:
        return self.groups.pop(group)


flows = st.builds(
    FlowConfig,
    mode=st.sampled_from(["synchronous", "one_step_off", "asynchronous"]),
    max_staleness=st.integers(1, 5),
    dynamic_sampling=st.booleans(),
    most=st.floats(1, 4),
)


@given(flows, st.integers(1, 6), st.lists(st.booleans(), min_size=1, max_size=30))
def test_the_bound_holds_for_every_group(flow: FlowConfig, groups: int, teaching: list[bool]) -> None:
    source = Slowest(teaching)
    stream = BatchScheduler(
        source,
        lambda number: Prompt(number, "", (1,), ""),
        flow,
        groups=groups,
        samples=1,
        sampling=SamplingParams(),
        seed=0,
        reward=lambda groups: [rewarded(group, CORRECTNESS) for group in groups],
        teaches=lambda group: group[0].verdict.outcome is Outcome.correct,
    )
    taken = 0
    for version in range(8):
        source.version = version
        batch = stream.batch()
        numbers = [group[0].rollout.sample for group in batch.groups]
        assert numbers == list(range(taken, taken + len(numbers)))
        taken = stream.position
        assert list(batch.teaching) == [teaching[number % len(teaching)] for number in numbers]
        assert max(batch.staleness) <= flow.staleness
        assert max(batch.staleness) == min(version, flow.staleness) or flow.dynamic_sampling
        most = int(flow.most * groups) if flow.dynamic_sampling else groups
        assert len(numbers) - batch.replaced == groups or len(numbers) == most
        assert source.open_most <= (flow.staleness + 1) * groups
