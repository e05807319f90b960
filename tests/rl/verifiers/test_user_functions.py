"""Graders and reward functions of the user's own run in verifier processes, and fail for their own completion alone."""

from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.data.tasks.code_tests import CodeTests
from lockstep.rl.types import AnswerKey, Submission
from lockstep.rl.verdict import Outcome, Verdict, of_credit
from lockstep.rl.verifiers.answer_pool import AnswerPoolError
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.verifiers.judge import Judge

SOURCE = """
import os
from lockstep.rl.verdict import Outcome, Verdict

def grade(completion, answer, prompt):
    if completion == "hang":
        while True:
            pass
    if completion == "exit":
        os._exit(3)
    if completion == "reason":
        return Verdict(Outcome.incorrect, "because")
    return {"yes": True, "no": False, "half": 0.5, "two": 2, "none": None, "asked": prompt == "1 + 1"}[completion]

def brevity(tokens, finish_reason):
    return 1 / tokens if finish_reason == "stop" else 0

def echo(completion, answer):
    return {"nan": float("nan"), "text": "x"}.get(completion, completion == answer)
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(SOURCE)
    return f"{tmp_path}/mine.py"


KEY = AnswerKey("2")


def submission(text: str, key: AnswerKey = KEY, verdict: Verdict | None = None) -> Submission:
    return Submission(text, key, "1 + 1", 4, "stop", verdict=verdict)


def test_what_a_grader_returns_is_the_verdict(mine: str) -> None:
    texts = ["yes", "no", "half", "asked", "reason", "none", "two", "strange", "hang", "exit", "yes"]
    key = AnswerKey("2", grader=f"{mine}:grade")
    with Judge(VerifierConfig(deadline=0.3)) as judge:
        found = judge.grade([submission(text, key) for text in texts])
    assert found[:5] == [
        Verdict(Outcome.correct),
        Verdict(Outcome.incorrect),
        of_credit(0.5),
        Verdict(Outcome.correct),
        Verdict(Outcome.incorrect, "because"),
    ]
    assert found[5].outcome is Outcome.ungradable
    assert found[5].reason.endswith("mine.py:grade returned None")
    # The grader raises, hangs or ends at these, and raises at an empty completion, too: nothing says whose fault it is.
    assert [v.outcome for v in found[6:10]] == [Outcome.ungradable] * 4
    assert "a credit of 2.0 is not one" in found[6].reason
    assert "KeyError: 'strange'" in found[7].reason
    assert "deadline of 0.3 s passed" in found[8].reason
    assert "exit code 3" in found[9].reason
    assert found[10] == Verdict(Outcome.correct)


def test_reward_functions_add_terms_to_every_kind_of_verdict(mine: str) -> None:
    program = AnswerKey("", CodeTests("assert f() == 1", "f"))
    given = [
        submission("2"),
        submission("3"),
        submission("def f(): return 1", program),
        submission("anything", verdict=of_credit(0.25)),
        submission("nan"),
        submission("text"),
    ]
    functions = {"brevity": f"{mine}:brevity", "same": f"{mine}:echo"}
    with Judge(VerifierConfig(), reward_functions={"": functions}, note=lambda sentence: None) as judge:
        found = judge.grade(given)
        assert judge.grade([]) == []
    assert [(v.outcome, v.credit) for v in found[:4]] == [
        (Outcome.correct, None),
        (Outcome.incorrect, None),
        (Outcome.correct, None),
        (Outcome.incorrect, 0.25),
    ]
    assert [dict(v.terms) for v in found[:2]] == [{"brevity": 0.25, "same": 1.0}, {"brevity": 0.25, "same": 0.0}]
    assert all(v.terms.keys() == functions.keys() for v in found[:4])
    for verdict, said in zip(found[4:], ("ValueError: it returned nan", "ValueError: could not convert"), strict=True):
        assert verdict.outcome is Outcome.incorrect  # what the answer is worth does not hang on a reward function
        assert verdict.terms == {"brevity": 0.25}
        assert f"reward function same failed with {said}" in verdict.reason


def test_a_task_with_reward_functions_of_its_own_has_those_alone(mine: str) -> None:
    by_task = {"": {"same": f"{mine}:echo"}, "code": {"same": f"{mine}:brevity"}, "plain": {}}
    given = [replace(submission("2"), task=task) for task in ("", "code", "plain", "other")]
    with Judge(VerifierConfig(), reward_functions=by_task, note=lambda sentence: None) as judge:
        found = judge.grade(given)
    assert [dict(verdict.terms) for verdict in found] == [{"same": 1.0}, {"same": 0.25}, {}, {"same": 1.0}]
    with Judge(VerifierConfig(), reward_functions={"": {}, "plain": {}}) as judge:
        assert [dict(verdict.terms) for verdict in judge.grade(given)] == [{}] * 4
        assert len(judge._pools) == 1
        assert judge._terms is None, "no process waits for functions that nobody has"


def test_a_function_that_cannot_be_loaded_is_named(mine: str) -> None:
    with (
        Judge(VerifierConfig()) as judge,
        pytest.raises(AnswerPoolError, match=r"mine.py:nothing cannot be loaded \(AttributeError"),
    ):
        judge.grade([submission("1", AnswerKey("2", grader=f"{mine}:nothing"))])
