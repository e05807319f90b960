"""The judge sends each completion to the verifier that its problem asks for, and keeps their order."""

import reasoning_gym

from lockstep.data.tasks.code_tests import Case, CodeTests
from lockstep.data.tasks.problem import entry_text
from lockstep.rl.types import AnswerKey, Submission
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.verifiers.judge import Judge


def test_answers_and_programs_are_judged_in_order() -> None:
    sums = AnswerKey("46")
    double = AnswerKey("", CodeTests("assert f(2) == 4", "f", "def f(x):\n"))
    echo = AnswerKey("", CodeTests(cases=(Case("a\n", "a\n"),)))
    given = [
        ("    return 2 * x\n", double, "correct"),
        ("46", sums, "correct"),
        ("    return x\n", double, "incorrect"),
        ("47", sums, "incorrect"),
        ("print(input())", echo, "correct"),
    ]
    notes: list[str] = []
    with Judge(VerifierConfig(), note=notes.append) as judge:
        verdicts = judge.grade([Submission(text, key) for text, key, _ in given])
        assert judge.grade([]) == []
    assert len(notes) == 1
    assert [str(verdict.outcome) for verdict in verdicts] == [outcome for _, _, outcome in given]


def test_each_problem_has_its_own_grader() -> None:
    entry = reasoning_gym.create_dataset("chain_sum", seed=1, size=1)[0]
    gym, plain = AnswerKey(entry_text(entry), grader="gym"), AnswerKey("46")
    text = f"<answer>{entry['answer']}</answer>"
    with Judge(VerifierConfig(deadline=20.0)) as judge:
        judge.start(["answer"])
        found = judge.grade([Submission("46", plain), Submission(text, gym), Submission("47", plain)])
    assert [(str(v.outcome), v.credit) for v in found] == [("correct", None), ("correct", 1.0), ("incorrect", None)]


def test_reasoning_gyms_own_scores_decide_where_the_task_says_so() -> None:
    entry = reasoning_gym.create_dataset("chain_sum", seed=1, size=1)[0]
    key = AnswerKey(entry_text(entry), grader="gym")
    with Judge(VerifierConfig(deadline=20.0)) as judge:
        right, wrong = judge.grade(
            [Submission(f"<answer>{entry['answer']}</answer>", key), Submission("<answer>none</answer>", key)]
        )
    assert (right.outcome, right.credit) == ("correct", 1.0)
    assert wrong.outcome == "incorrect"
    assert wrong.credit is not None
