"""Tasks that are not trained on count for their own accuracy, and for no other."""

import math

import pytest

from lockstep.cluster.evaluation.accuracy import pass_at_k
from lockstep.cluster.evaluation.held_out import accuracy_line, pass_at_line
from lockstep.rl.types import Judged, Prompt, Rollout
from lockstep.rl.verdict import Outcome, Verdict

LETTERS = {"c": Outcome.correct, "i": Outcome.incorrect, "u": Outcome.ungradable}


def group(task: str, letters: str) -> list[Judged]:
    prompt = Prompt(0, "?", (1,), "", task=task)
    rollouts = [Rollout(n, (1,), (-0.5,), "", "stop", (0,), prompt=prompt) for n in range(len(letters))]
    return [Judged(each, Verdict(LETTERS[letter])) for each, letter in zip(rollouts, letters, strict=True)]


def greedy(task: str, letters: str) -> list[Judged]:
    return [group(task, letter)[0] for letter in letters]


def test_accuracy_is_of_what_is_trained_on_and_of_each_task() -> None:
    judged = [*greedy("sums", "cciu"), *greedy("code", "i"), *greedy("late", "cccccc")]
    assert accuracy_line(judged, {"late"}) == {
        "accuracy": 0.5,
        "correct": 2,
        "total": 5,
        "ungradable": 1,
        "accuracy/sums": pytest.approx(2 / 3),
        "accuracy/code": 0.0,
        "accuracy/late": 1.0,
    }
    assert accuracy_line(greedy("", "ci"), ()) == {"accuracy": 0.5, "correct": 1, "total": 2, "ungradable": 0}
    alone = accuracy_line([*greedy("", "ci"), *greedy("late", "u")], {"late"})
    assert (alone["accuracy"], alone["total"], math.isnan(alone["accuracy/late"])) == (0.5, 2, True)


def test_pass_at_k_is_of_the_same() -> None:
    groups = [group("sums", "ciii"), group("sums", "ccii"), group("late", "cccc")]
    found = pass_at_line(groups, (1, 2), {"late"})
    assert list(found) == ["pass@1", "pass@2", "pass@1/sums", "pass@2/sums", "pass@1/late", "pass@2/late"]
    for k in (1, 2):
        assert found[f"pass@{k}"] == pytest.approx((pass_at_k(4, 1, k) + pass_at_k(4, 2, k)) / 2)
        assert (found[f"pass@{k}/sums"], found[f"pass@{k}/late"]) == (found[f"pass@{k}"], 1.0)
