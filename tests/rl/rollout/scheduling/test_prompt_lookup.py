"""Proposals are those of a search through the whole text, however it is read, and what is never right goes silent."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from lockstep.rl.rollout.scheduling.prompt_lookup import LONGEST_PAUSE, NGRAM, PromptLookup

TEXTS = st.lists(st.integers(0, 2), max_size=40)
"""Of few words, so that they repeat themselves."""


def searched(text: Sequence[int], most: int) -> tuple[int, ...]:
    """The continuation that is copied, token by token, from the last place where the text's end stood before."""
    ends = [i for i in range(NGRAM, len(text)) if text[i - NGRAM : i] == text[len(text) - NGRAM :]]
    copied = list(text)
    for i in range(ends[-1], ends[-1] + most) if ends else ():
        copied.append(copied[i])
    return tuple(copied[len(text) :])


@given(st.lists(TEXTS, min_size=1, max_size=4), st.integers(1, 12))
def test_proposals_are_those_of_a_search_through_the_text(parts: list[list[int]], most: int) -> None:
    lookup, text = PromptLookup(), list[int]()
    for part in parts:
        text += part
        assert lookup.propose(part, most) == searched(text, most)
        assert lookup.read == len(text)


def test_a_text_that_goes_round_is_proposed_to_go_on() -> None:
    assert PromptLookup().propose([9, 1, 2, 1, 2, 1, 2], 5) == (1, 2, 1, 2, 1)
    assert PromptLookup().propose([1, 2, 3, 4, 5, 6, 1, 2, 3], 3) == (4, 5, 6)
    assert PromptLookup().propose([1, 2, 3, 4, 5, 6, 2, 3], 3) == ()


def test_proposals_that_are_never_right_become_rare() -> None:
    lookup = PromptLookup()
    lookup.propose([1] * 9, 1)
    asked = []
    for _ in range(8):
        lookup.verified(0)
        silent = 0
        while not lookup.propose([1], 4):
            silent += 1
        asked.append(silent)
    assert asked == [1, 3, 7, 15, 31, *[LONGEST_PAUSE] * 3]
    lookup.verified(2)
    assert lookup.propose([1], 4) == (1, 1, 1, 1), "a token that was right ends the silence"
