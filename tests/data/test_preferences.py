"""Preferences: every shape gives rankings, best first; token pairs share their prompt exactly."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockstep.data.preferences import Preference, Turn, from_verdicts, read, tokenized
from lockstep.data.row_reader import BadRow
from lockstep.data.tokenizer import Tokenizer, train_tokenizer
from lockstep.rl.algorithms.config import PreferenceConfig
from lockstep.rl.algorithms.preferences import read_comparisons
from tests.conftest import TEMPLATE


def from_rows(tmp_path: Path, *rows: dict[str, Any]) -> list[Preference]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(str(path))


def test_hh_transcripts_are_split_into_turns(tmp_path: Path) -> None:
    talk = "\n\nHuman: What is 2 + 2?\n\nAssistant: 4.\n\nHuman: And\n\nthree?\n\nAssistant:"
    found = from_rows(tmp_path, {"chosen": talk + " Nine.\n", "rejected": talk + " Go away. "})
    before = (Turn("user", "What is 2 + 2?"), Turn("assistant", "4."))
    assert found == [Preference(0, "And\n\nthree?", ("Nine.\n", "Go away. "), before)]


def test_ultrafeedback_pairs_are_message_lists_with_scores(tmp_path: Path) -> None:
    def talk(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]

    row = {"prompt": "q", "prompt_id": "x", "chosen": talk("good"), "rejected": talk("bad"), "score_chosen": 8.5}
    assert from_rows(tmp_path, row | {"score_rejected": 4.0}) == [Preference(0, "q", ("good", "bad"))]
    with pytest.raises(BadRow, match=r"rows\.jsonl:1: the field 'score_chosen' is that of 'rejected', 8\.5"):
        from_rows(tmp_path, row | {"score_rejected": 8.5})


def test_ultrafeedback_completions_are_ranked_and_ties_stand_once(tmp_path: Path) -> None:
    scores = [7.5, 8.0, 3.0, 8.0]
    completions = [{"model": "m", "response": f"r{i}", "overall_score": s} for i, s in enumerate(scores)]
    found = from_rows(tmp_path, {"source": "s", "instruction": "q", "completions": completions})
    assert found == [Preference(0, "q", ("r1", "r0", "r2"))]
    other = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 3, 2]}
    assert from_rows(tmp_path, other) == [Preference(0, "q", ("b", "c", "a"))]


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def heard(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


ASKED, GOOD, BAD = said("user", "2+2?"), said("assistant", "4"), said("assistant", "5")


@pytest.mark.parametrize(
    ("row", "before"),
    [
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, ()),
        ({"prompt": [ASKED], "chosen": "4", "rejected": "5"}, ()),
        ({"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD]}, ()),
        ({"prompt": "2+2?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, ()),
        ({"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, ()),
        ({"prompt": None, "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, ()),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, ()),
        ({"prompt": [ASKED], "ranked": ["4", "5"]}, ()),
        ({"prompt": [ASKED], "chosen": GOOD, "rejected": BAD}, ()),
        ({"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"}, ()),
        (
            {"system": "s", "conversations": [heard("human", "2+2?")]}
            | {"chosen": heard("gpt", "4"), "rejected": heard("gpt", "5")},
            (Turn("system", "s"),),
        ),
        (
            {"chosen": [heard("human", "2+2?"), heard("gpt", "4")]}
            | {"rejected": [heard("human", "2+2?"), heard("gpt", "5")]},
            (),
        ),
        ({"prompt": [ASKED], "responses": ["5", "4"], "scores": [0, 1]}, ()),
        (
            {
                "prompt": [said("user", [{"type": "text", "text": "2+"}, {"text": "2?"}])],
                "chosen": [GOOD],
                "rejected": "5",
            },
            (),
        ),
        (
            {"prompt": [said("system", "s"), said("user", "x"), said("assistant", "y"), ASKED], "chosen": [GOOD]}
            | {"rejected": [BAD]},
            (Turn("system", "s"), Turn("user", "x"), Turn("assistant", "y")),
        ),
        (
            {
                "prompt": "2+2?",
                "chosen": [said("system", "s"), ASKED, GOOD],
                "rejected": [said("system", "s"), ASKED, BAD],
            },
            (Turn("system", "s"),),
        ),
        (
            {"prompt": [said("user", "x")], "chosen": [said("assistant", "y"), ASKED, GOOD]}
            | {"rejected": [said("assistant", "y"), ASKED, BAD]},
            (Turn("user", "x"), Turn("assistant", "y")),
        ),
    ],
)
def test_conversations_may_be_messages_in_whole_or_in_part(
    row: dict[str, Any], before: tuple[Turn, ...], tmp_path: Path
) -> None:
    assert from_rows(tmp_path, row) == [Preference(0, "2+2?", ("4", "5"), before)]


def test_plain_pairs_and_rankings(tmp_path: Path) -> None:
    found = from_rows(
        tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "ranked": ["a", "b", "c"]}
    )
    assert found == [Preference(0, "p", ("a", "b")), Preference(1, "p", ("a", "b", "c"))]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p", "chosen": "a"}, "the field 'rejected' is missing"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "the field 'rejected' ranks 1 different texts"),
        ({"prompt": "p", "ranked": ["a"]}, "the field 'ranked' ranks 1 different texts"),
        ({"chosen": "Human: x", "rejected": "y"}, "the field 'chosen' must be a transcript"),
        (
            {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: y\n\nAssistant: b"},
            "the field 'rejected' differs from 'chosen' before its last turn",
        ),
        ({"chosen": "\n\nHuman: x", "rejected": "\n\nHuman: y"}, "the field 'chosen' must end with a person's turn"),
        ({"chosen": [], "rejected": []}, "the field 'chosen' holds no messages"),
        ({"chosen": [{"role": "user"}], "rejected": []}, "the field 'content' is missing"),
        ({"prompt": [ASKED, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "'prompt' must end with a person's turn"),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "'prompt' holds no messages"),
        ({"prompt": ["2+2?"], "chosen": [GOOD], "rejected": [BAD]}, "'prompt' must hold an object, and holds text"),
        ({"prompt": 7.5, "chosen": [ASKED], "rejected": [ASKED]}, "'chosen' must end with a person's turn"),
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": []}, "'rejected' holds no messages"),
        ({"prompt": [ASKED], "chosen": [said("assistant", None)], "rejected": [BAD]}, "'content' is null"),
        (
            {"prompt": [ASKED], "chosen": [said("assistant", [{"type": "image"}])], "rejected": [BAD]},
            "'text' is missing",
        ),
        ({"prompt": "p", "chosen": "\ud800", "rejected": "b"}, "'chosen' holds half of a surrogate pair"),
        ({"instruction": "q", "completions": [{"response": "r"}]}, "completions: the field 'overall_score' is missing"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, "needs one number for each text"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 1.0]}, "'responses' ranks 1 different texts"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, "x"]}, "needs one number for each text"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_field(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadRow, match=rf"rows\.jsonl:2.*{words}"):
        from_rows(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"}, row)


def test_bad_rows_may_be_counted_instead(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "p", "chosen": "a", "rejected": r} for r in ("b", "a", "c")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt"\n\n')
    skipped: list[BadRow] = []
    assert [p.index for p in read(str(path), on_bad=skipped.append)] == [0, 2]
    assert len(skipped) == 2


def test_a_recipe_says_whether_bad_rows_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p"}\n')
    tokenizer, told = Tokenizer(train_tokenizer([TEMPLATE], 300)), list[str]()
    config = PreferenceConfig(source=str(path), chat=False, on_bad="skip")
    assert len(read_comparisons(config, tokenizer, told.append)) == 1
    assert told[0].startswith(f"Bad rows left out: 1; the first: {path}:2: the field 'chosen' is missing")
    with pytest.raises(BadRow, match="'chosen' is missing"):
        read_comparisons(config.model_copy(update={"on_bad": "stop"}), tokenizer)


ROWS = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "ranked", "responses", "scores", "instruction", "completions"]),
    st.recursive(
        st.none()
        | st.booleans()
        | st.floats()
        | st.integers()
        | st.sampled_from(["a", "", "\n\nHuman: a", "\ud800", "\0"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["role", "content", "text", "response", "overall_score", "score"]), inner)
        ),
        max_leaves=8,
    ),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS, max_size=4), raw=st.binary(max_size=20))
def test_any_rows_are_preferences_or_a_sentence_each(rows: list[dict[str, Any]], raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode() + raw)
    skipped: list[BadRow] = []
    found = read(str(path), on_bad=skipped.append)
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip(b" \t\r\n\v\f\xef\xbb\xbf")]
    assert len(found) + len(skipped) == len(lines)
    assert all(len(set(each.ranked)) > 1 for each in found)


OUTCOMES = st.sampled_from(["correct", "incorrect", "ungradable"])


@given(st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from("abcdef"), OUTCOMES)), st.integers(1, 4))
def test_pairs_from_verdicts_put_correct_before_incorrect(rows: list[tuple[str, str, str]], pairs: int) -> None:
    names = ("prompt", "completion", "outcome")
    found = list(from_verdicts([dict(zip(names, row, strict=True)) for row in rows], pairs=pairs))
    for prompt in "pq":
        said = {side: {c for p, c, o in rows if (p, o) == (prompt, side)} for side in ("correct", "incorrect")}
        good, bad = said["correct"] - said["incorrect"], said["incorrect"] - said["correct"]
        ranked = [p.ranked for p in found if p.prompt == prompt]
        assert len(ranked) == min(pairs, len(good), len(bad))
        assert {r[0] for r in ranked} <= good
        assert {r[1] for r in ranked} <= bad
        assert len({text for r in ranked for text in r}) == 2 * len(ranked)


def test_tokens_of_all_completions_continue_one_prompt() -> None:
    tokenizer = Tokenizer(train_tokenizer([TEMPLATE], 300) | {"chat_template.jinja": TEMPLATE})
    before = (Turn("system", "State"), Turn("user", "12"), Turn("assistant", "34"))
    preference = Preference(5, "12 + 34 =", ("46", "The answer", " 4"), before)
    found = tokenized(preference, tokenizer)
    messages = [{"role": t.role, "content": t.content} for t in (*before, Turn("user", preference.prompt))]
    assert tokenizer.decode(found.prompt, skip_special=False) == tokenizer.chat(messages)
    assert list(found.prompt) == tokenizer.encode(tokenizer.chat(messages))
    assert [tokenizer.decode(c[:-1]) for c in found.completions] == list(preference.ranked)
    assert {c[-1] for c in found.completions} == {tokenizer.eos}
    plain = tokenized(Preference(0, tokenizer.chat(messages), ("46", "4")), tokenizer, chat=False)
    assert (plain.prompt, plain.completions[0]) == (found.prompt, found.completions[0])
