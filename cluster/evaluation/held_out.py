"""Held-out accuracy and pass@k as a run records them: over all tasks that are trained on, and of each task."""

from collections import defaultdict
from collections.abc import Collection, Sequence

from lockstep.cluster.evaluation.accuracy import accuracy_row, mean_pass_at_k, tally
from lockstep.rl.types import Judged


def accuracy_line(judged: Sequence[Judged], beside: Collection[str]) -> dict[str, float]:
    """Accuracy, and how many of what outcome there are, of greedy completions, one a problem.

    Args:
        beside: names of tasks that are not trained on, each of which counts for its own `accuracy/name` alone.
    """
    trained, by_task = _by_task([[each] for each in judged], beside)
    parts = {f"accuracy/{task}": accuracy_row(_outcomes(groups))["accuracy"] for task, groups in by_task.items()}
    return accuracy_row(_outcomes(trained)) | parts


def pass_at_line(groups: Sequence[Sequence[Judged]], ks: Sequence[int], beside: Collection[str]) -> dict[str, float]:
    """pass@k of drawn completions, a group of each problem; as `accuracy_line`, with `pass@k/name` of each task."""
    trained, by_task = _by_task(groups, beside)
    parts = {"": trained} | {f"/{task}": some for task, some in by_task.items()}
    return {f"pass@{k}{name}": _pass_at(some, k) for name, some in parts.items() for k in ks}


def _by_task(
    groups: Sequence[Sequence[Judged]], beside: Collection[str]
) -> tuple[list[Sequence[Judged]], dict[str, list[Sequence[Judged]]]]:
    """The problems' groups of tasks that are trained on, and of each task that has a name."""
    by_task: dict[str, list[Sequence[Judged]]] = defaultdict(list)
    for group in groups:
        by_task[group[0].rollout.prompt.task].append(group)
    trained = [group for task, some in by_task.items() if task not in beside for group in some]
    return trained, {task: some for task, some in by_task.items() if task}


def _outcomes(groups: Sequence[Sequence[Judged]]) -> list[str]:
    return [judged.verdict.outcome for group in groups for judged in group]


def _pass_at(groups: Sequence[Sequence[Judged]], k: int) -> float:
    return mean_pass_at_k([tally(_outcomes([group])) for group in groups], k).value
