"""Completions come in any order, and each group leaves whole, in the order of its samples."""

from hypothesis import given
from hypothesis import strategies as st

from lockstep.rl.collector.group_buffer import GroupBuffer
from lockstep.rl.types import Judged, Prompt, Rollout
from lockstep.rl.verdict import Outcome, Verdict

GROUPS, SAMPLES = 3, 4
PROMPT = Prompt(index=0, text="", tokens=(1,), answer="")


def judged(sample: int) -> Judged:
    rollout = Rollout(
        prompt=PROMPT, sample=sample, tokens=(2,), logp=(-1.0,), weight_versions=(0,), text="", finish_reason="stop"
    )
    return Judged(rollout, Verdict(Outcome.correct))


@given(order=st.permutations(range(GROUPS * SAMPLES)))
def test_groups_are_whole_when_their_last_completion_has_come(order: list[int]) -> None:
    buffer = GroupBuffer()
    numbers = [buffer.open(group, PROMPT, SAMPLES) for group in range(GROUPS)]
    assert [n for group in numbers for n in group] == list(range(GROUPS * SAMPLES))
    came: list[int] = []
    for sample in order:
        assert [buffer.is_whole(g) for g in range(GROUPS)] == [set(numbers[g]) <= set(came) for g in range(GROUPS)]
        buffer.put(judged(sample))
        came.append(sample)
    for group in reversed(range(GROUPS)):
        assert [each.rollout.sample for each in buffer.take(group)] == list(numbers[group])


def test_a_group_may_be_asked_for_again_after_all_was_forgotten() -> None:
    buffer = GroupBuffer()
    for sample in buffer.open(0, PROMPT, 2):
        buffer.put(judged(sample))
        buffer.clear()
        buffer.open(0, PROMPT, 2)
    assert not buffer.is_whole(0)


def test_a_completion_finds_its_prompt_until_its_group_is_taken() -> None:
    buffer = GroupBuffer()
    prompts = [Prompt(index=group, text="", tokens=(group,), answer="") for group in range(GROUPS)]
    for group, prompt in enumerate(prompts):
        for sample in buffer.open(group, prompt, SAMPLES):
            assert buffer.prompt_of(sample) is prompt
