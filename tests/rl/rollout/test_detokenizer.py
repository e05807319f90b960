"""Text that comes token by token against the text of all tokens."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from lockstep.rl.rollout.detokenizer import TextStream, before_stop


def decode(tokens: Sequence[int]) -> str:
    """A byte a token."""
    return bytes(tokens).decode(errors="replace")


def pieces(tokens: Sequence[int], reason: str, stop: Sequence[str]) -> list[str]:
    stream = TextStream(decode, stop)
    return [stream.add(t, reason if i == len(tokens) - 1 else None) for i, t in enumerate(tokens)]


STOPS = st.lists(st.text("abé", min_size=1, max_size=4), max_size=3)


@given(st.text("abcé中🙂", min_size=1, max_size=40), STOPS)
def test_pieces_are_whole_characters_that_come_as_soon_as_no_stop_can_follow(text: str, stop: list[str]) -> None:
    tokens = list(text.encode())
    found = pieces(tokens, "length", stop)
    assert "".join(found) == text
    for i in range(len(tokens) - 1):
        certain = tokens[: i + 1]
        while decode(certain).endswith("\ufffd"):
            certain = certain[:-1]
        known, given_so_far = decode(certain), "".join(found[: i + 1])
        doubtful = [n for s in stop for n in range(1, len(s)) if known.endswith(s[:n])]
        assert given_so_far == known[: len(known) - max(doubtful, default=0)]


@given(st.text("abcé中", max_size=30), st.text("abé", min_size=1, max_size=4), STOPS)
def test_a_stop_string_is_never_given(before: str, last: str, more: list[str]) -> None:
    stop = [last, *more]
    text = before + last
    end = min(text.find(s) + len(s) for s in stop if s in text)
    tokens = list(text[:end].encode())
    expected = min(text[:end].find(s) for s in stop if s in text[:end])
    assert "".join(pieces(tokens, "stop", stop)) == text[:expected]
    assert before_stop(text[:end], stop) == text[:expected]


@given(st.lists(st.integers(0, 255), min_size=1, max_size=60))
def test_broken_bytes_hold_nothing_up_for_long(tokens: list[int]) -> None:
    stream, behind = TextStream(decode), 0
    for token in tokens:
        behind = 0 if stream.add(token) else behind + 1
        assert behind <= 12
