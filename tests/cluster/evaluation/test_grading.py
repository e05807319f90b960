"""`lockstep grade` prints a verdict a row, in order, and a bad row costs no other."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import reasoning_gym
from typer.testing import CliRunner, Result

from lockstep.cluster.cli import app
from tests.cluster.cli_process import lockstep, refused


def rows(*values: dict[str, Any] | str) -> str:
    return "".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values)


def verdicts(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_math_in_order_with_a_summary(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(
        rows(
            {"response": r"First \boxed{7}. Wait: \boxed{42}", "answer": "42", "id": "a"},
            {"response": "#### 41", "answer": 42, "more": None},
            "",
            {"response": "42", "answer": "???"},
        )
    )
    result = lockstep("grade", "--task", "math", str(path), "--workers", "1")
    assert result.exit_code == 0, result.output
    found = verdicts(result)
    assert [(v["line"], v["outcome"], v["reward"]) for v in found] == [
        (1, "correct", 1.0),
        (2, "incorrect", 0.0),
        (4, "ungradable", None),
    ]
    assert found[0]["id"] == "a"
    assert found[0]["extracted"] == "42"
    assert "cannot be read" in found[2]["reason"]
    assert result.stderr == "3 rows: 1 correct (50.0% of those that could be graded), 1 incorrect, 1 ungradable\n"


def test_a_bad_row_names_file_line_and_field_and_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    good = {"response": "42", "answer": "42"}
    text = rows(good, {"response": "42"}, "{", {"response": 42, "answer": "42"}, "[1]", good).encode()
    path.write_bytes(text + b'{"response": "\xff", "answer": "1"}\n')
    result = lockstep("grade", "--task", "math", str(path), "--workers", "1")
    assert result.exit_code == 1
    found = verdicts(result)
    assert [v["outcome"] for v in found] == ["correct", *["ungradable"] * 4, "correct", "ungradable"]
    problems = result.stderr.splitlines()
    assert problems[0] == f"{path}:2: the field 'answer' is missing" == found[1]["reason"]
    assert problems[1].startswith(f"{path}:3: this is not JSON")
    assert problems[2] == f"{path}:4: the field 'response' is int, and has to be a string"
    assert problems[3] == f"{path}:5: a row is an object with fields, not list"
    assert problems[4].startswith(f"{path}:7: this is not JSON")
    assert problems[5].endswith("0 incorrect, 5 ungradable, of which 5 bad rows")


def test_an_audit_says_where_rules_disagree(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(
        rows(
            {"response": "It is \\boxed{7}. No, the answer is 42.", "answer": "42"},
            {"response": "The answer is 42.", "answer": "42"},
        )
    )
    result = lockstep("grade", "--task", "math", str(path), "--workers", "1", "--audit")
    assert result.exit_code == 0, result.output
    first, second = verdicts(result)
    assert first["disagree"]
    assert first["rules"] == {
        "boxed": {"answer": "7", "outcome": "incorrect"},
        "phrase": {"answer": "42", "outcome": "correct"},
    }
    assert not second["disagree"]
    assert result.stderr.splitlines()[1:4] == [
        "rules disagree on 1 of 2 rows",
        "boxed: finds 1, 0 correct, 1 unlike the verdict",
        "hashes: finds 0, 0 correct, 0 unlike the verdict",
    ]


def test_entries_of_reasoning_gym_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    entries = [reasoning_gym.create_dataset(name, size=1, seed=1)[0] for name in ("chain_sum", "spell_backward")]
    path.write_text(
        rows(
            *({"response": f"<answer>{entry['answer']}</answer>", "answer": entry} for entry in entries),
            {"response": "1", "answer": "1"},
        )
    )
    result = lockstep("grade", "--task", "gym", str(path), "--workers", "1")
    assert [v["reward"] for v in verdicts(result)] == [1.0, 1.0, None], result.output


def test_code_with_a_line_on_what_protects_from_it(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    path.write_text(
        rows(
            {"completion": "def add(a, b):\n    return a + b", "tests": tests, "entry_point": "add"},
            {"completion": "def add(a, b):\n    return 3", "tests": "\n".join(tests), "entry_point": "add"},
            {"completion": "print(int(input()) * 2)", "tests": [{"stdin": "4\n", "stdout": "8\n"}]},
            {"completion": "print(8)", "tests": [{"stdin": "4\n"}]},
        )
    )
    result = lockstep("grade", "--task", "code", str(path), "--workers", "1")
    assert result.exit_code == 1
    assert [v["outcome"] for v in verdicts(result)] == ["correct", "incorrect", "correct", "ungradable"], result.output
    protection, problem, *_ = result.stderr.splitlines()
    assert protection.startswith("code sandbox: namespaces ")
    assert problem == f"{path}:4: the field 'stdout' is missing"


def test_each_verdict_comes_while_the_writer_of_stdin_waits() -> None:
    command = [sys.executable, "-m", "lockstep", "grade", "--task", "math", "-", "--workers", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for answer, outcome in (("42", "correct"), ("41", "incorrect")):
            child.stdin.write(rows({"response": "42", "answer": answer}).encode())
            child.stdin.flush()
            assert json.loads(child.stdout.readline())["outcome"] == outcome
        child.stdin.close()
        assert child.wait() == 0


def test_what_cannot_be_graded_at_all_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("")
    assert "use math, code or gym" in refused("grade", "--task", "maths", str(path))
    assert "--task gym has none of" in refused("grade", "--task", "gym", "--audit", str(path))
    assert "No such file" in refused("grade", "--task", "math", str(tmp_path / "none.jsonl"))
    assert CliRunner().invoke(app, ["grade", "--task", "math", str(path), "--workers", "1"]).exit_code == 0
