"""Tool calls in a text that comes in parts."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lockstep.rl.environments.tool_calls import Call, CallParser, calls_of

PIECES = ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {"x": 1}}', "said ", "\n", "<", "<tool", "_call>"]


def joined(parts: list[str | Call]) -> list[str | Call]:
    """With what is said between two calls in one part."""
    found: list[str | Call] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join), st.lists(st.integers(0, 60), max_size=8))
def test_a_text_in_parts_has_the_calls_of_the_whole(text: str, cuts: list[int]) -> None:
    parser, ends = CallParser(), [0, *sorted(cuts), len(text)]
    found = [part for a, b in pairwise(ends) for part in parser.add(text[a:b])]
    found += parser.add("", last=True)
    assert joined(found) == joined(CallParser().add(text, last=True))
    assert [part for part in found if isinstance(part, Call)] == calls_of(text)
    if "<tool_call>" not in text:
        assert "".join(map(str, found)) == text


def test_what_is_said_comes_as_soon_as_it_is_certain() -> None:
    parser = CallParser()
    given = ["I ", "add.", "\n<tool", "_call>", '{"name": "f"}', "</tool_call>", "\n", "5 < 6", " <b"]
    assert [parser.add(part) for part in given] == [
        ["I"],
        [" add."],
        [],
        [],
        [],
        [Call("f", written='<tool_call>{"name": "f"}</tool_call>')],
        [],
        ["\n5 < 6"],
        [" <b"],
    ]
    assert parser.add("", last=True) == []
