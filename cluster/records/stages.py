"""Held-out accuracy of a run by stage: before and after each of its phases, with intervals, and of each task."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lockstep.cluster.evaluation.accuracy import wilson
from lockstep.cluster.records.charts import count_of, of_phase, task_names, value_of
from lockstep.cluster.records.run_folder import DURING, STAGES, RunFolder
from lockstep.cluster.records.tables import Record


@dataclass(frozen=True)
class Stage:
    """One held-out measurement; gain is in points over the stage before it."""

    name: str
    accuracy: float
    correct: int
    total: int
    ungradable: int
    gain: float | None
    tasks: Mapping[str, float]
    """Accuracy of each task, where there are several."""

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of the accuracy, which leaves out what is ungradable."""
        return wilson(self.correct, self.total - self.ungradable)


def held_out_stages(folder: RunFolder, records: Sequence[Record]) -> list[Stage]:
    """Rows of the summary, and from the metrics what a killed run had not yet summarised."""
    rows = folder.summary().get("rows")
    found = {str(row.get("stage")): row for row in rows or [] if isinstance(row, Mapping)}
    found.pop(DURING, None)
    for record in of_phase(records, "eval"):
        if record.get("stage") in STAGES:
            found.setdefault(str(record["stage"]), record)
    order = sorted(found, key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))
    stages: list[Stage] = []
    for name in order:
        correct, total, ungradable = (count_of(found[name], key) for key in ("correct", "total", "ungradable"))
        accuracy = value_of(found[name], "accuracy")
        accuracy = accuracy if math.isfinite(accuracy) else correct / max(1, total - ungradable)
        gain = accuracy - stages[-1].accuracy if stages else None
        tasks = {task: value_of(found[name], f"accuracy/{task}") for task in task_names([found[name]])}
        stages.append(Stage(name, accuracy, correct, total, ungradable, gain, tasks))
    return stages
