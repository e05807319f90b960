"""The judge sends each completion to the verifier that its problem asks for, and keeps their order."""

import reasoning_gym

from lockstep.data.tasks.code_tests import Case, CodeTests
from lockstep.data.tasks.problem import entry_text
from lockstep.rl.types import Prompt
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.verifiers.judge import Judge


def test_answers_and_programs_are_judged_in_order() -> None:
    sums = Prompt(0, "12 + 34 =", (), "46")
    double = Prompt(1, "def f(x):\n", (), "", CodeTests("assert f(2) == 4", "f", "def f(x):\n"))
    echo = Prompt(2, "Echo.", (), "", CodeTests(cases=(Case("a\n", "a\n"),)))
    given = [
        ("    return 2 * x\n", double, "correct"),
        ("46", sums, "correct"),
        ("    return x\n", double, "incorrect"),
        ("47", sums, "incorrect"),
        ("print(input())", echo, "correct"),
    ]
    notes: list[str] = []
    with Judge(VerifierConfig(), note=notes.append) as judge:
        verdicts = judge.grade([(text, prompt) for text, prompt, _ in given])
        assert judge.grade([]) == []
    assert len(notes) == 1
    assert [str(verdict.outcome) for verdict in verdicts] == [outcome for _, _, outcome in given]


def test_reasoning_gyms_own_scores_decide_where_the_task_says_so() -> None:
    entry = reasoning_gym.create_dataset("chain_sum", seed=1, size=1)[0]
    prompt = Prompt(0, entry["question"], (), entry_text(entry))
    with Judge(VerifierConfig(deadline=20.0), "gym") as judge:
        right, wrong = judge.grade([(f"<answer>{entry['answer']}</answer>", prompt), ("<answer>none</answer>", prompt)])
    assert (right.outcome, right.credit) == ("correct", 1.0)
    assert wrong.outcome == "incorrect"
    assert wrong.credit is not None
