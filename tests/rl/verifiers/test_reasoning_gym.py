"""The tasks of reasoning-gym are graded by their own scores, and no answer of a model runs as a program."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from lockstep.data.tasks.problem import entry_text
from lockstep.rl.verdict import Outcome
from lockstep.rl.verifiers.answer_pool import AnswerPool
from lockstep.rl.verifiers.reasoning_gym import grade

SLOW = {"arc_agi", "composite"}


@cache
def entry(name: str) -> dict[str, Any]:
    made: dict[str, Any] = reasoning_gym.create_dataset(name, size=1, seed=1)[0]
    return made


def test_the_answers_of_all_tasks_are_correct_and_nonsense_is_not() -> None:
    wrong = []
    for name in sorted(DATASETS.keys() - SLOW):
        reference, answer = entry_text(entry(name)), entry(name)["answer"]
        if isinstance(answer, str) and grade(f"So <answer>{answer}</answer>.", reference).reward != 1:
            wrong.append((name, answer, grade(f"<answer>{answer}</answer>", reference)))
        verdict = grade("<answer>no idea at all</answer>", reference)
        if verdict.reward is None or verdict.reward > 0.2:
            wrong.append((name, "no idea at all", verdict))
    assert wrong == []


def test_credit_is_partial_where_the_task_says_so() -> None:
    made = entry("spell_backward")
    answer = made["answer"]
    verdict = grade(f"<answer>{answer[:-1]}x</answer>", entry_text(made))
    assert verdict.outcome is Outcome.incorrect
    assert verdict.reward is not None
    assert 0 < verdict.reward < 1
    assert verdict.reward == verdict.credit


def test_the_last_answer_counts_and_thoughts_do_not() -> None:
    reference = entry_text(entry("chain_sum"))
    answer = entry("chain_sum")["answer"]
    for response in (
        answer,
        rf"It is \boxed{{{answer}}}",
        f"<think>1</think> {answer}",
        f"<answer>1</answer><answer>{answer}</answer>",
    ):
        assert grade(response, reference).outcome is Outcome.correct
    assert grade(f"<think><answer>{answer}</answer></think> 1", reference).outcome is Outcome.incorrect
    assert grade("", reference).reward == 0


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("42", "metadata.source_dataset"),
        ("{}", "metadata.source_dataset"),
        (json.dumps({"answer": "1", "metadata": {"source_dataset": "chain_sums"}}), "no data set 'chain_sums'"),
        (json.dumps({"answer": "1", "metadata": {"source_dataset": "countdown"}}), "own answer"),
    ],
)
def test_an_entry_that_decides_nothing_is_ungradable(reference: str, words: str) -> None:
    verdict = grade("<answer>1</answer>", reference)
    assert verdict.outcome is Outcome.ungradable
    assert words in verdict.reason


def test_answers_do_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    program = f"open({str(mark)!r}, 'w')"
    spelled = "+".join(f"chr({ord(character)})" for character in program)
    tasks = ("n_queens", "binary_matrix", "spiral_matrix", "string_insertion", "puzzle24", "countdown")
    tasks += ("simple_integration", "intermediate_integration", "polynomial_multiplication")
    pairs = [
        (f"<answer>{attack}</answer>", entry_text(entry(task)))
        for task in tasks
        for attack in (program, f"[{program}]", f"exec({spelled})", f"().__class__ or {program}", f"eval({spelled})")
    ]
    with AnswerPool(1, 20.0, grade, examples=()) as pool:
        verdicts = pool.grade(pairs)
    assert not mark.exists()
    assert all(v.reward is not None and v.reward < 0.1 for v in verdicts)
