import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lockstep.cluster.records.run_folder import RunError, RunFolder
from lockstep.cluster.records.tables import EVALUATION_COLUMNS, ROLLOUT_COLUMNS


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_new_run_is_readable_at_once(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "runs" / "one", "steps = 3\n", "one")
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["name"] == "one"
    assert summary["status"] == "running"
    assert summary["error"] is None
    assert RunFolder.open(run.path).recipe() == "steps = 3\n"
    assert run.metrics() == []
    assert run.evaluations() == {}
    assert run.last_rollouts(2) == []
    assert run.moved_aside is None


def test_an_old_run_moves_aside_and_nothing_is_lost(tmp_path: Path) -> None:
    for count in range(3):
        run = RunFolder.create(tmp_path / "one", "", f"run {count}")
    assert run.moved_aside == tmp_path / "one-2"
    assert run.summary()["moved_aside"] == "one-2"
    names = [RunFolder.open(tmp_path / folder).summary()["name"] for folder in ("one-1", "one-2", "one")]
    assert names == ["run 0", "run 1", "run 2"]


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, "", "here").moved_aside is None


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(RunError, match="not a run's"):
        RunFolder.create(tmp_path, "", "one")
    with pytest.raises(RunError, match="is a file"):
        RunFolder.create(tmp_path / "thesis.txt", "", "one")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_open_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a folder"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"holds no summary\.json"):
        RunFolder.open(tmp_path)
    for text, words in (("{", "is not JSON"), ("[]", "holds a list")):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(RunError, match=words):
            RunFolder.open(tmp_path)


def test_metrics_round_trip_and_are_on_disk_at_once(tmp_path: Path) -> None:
    clock = Clock()
    run = RunFolder.create(tmp_path / "one", "", "one", clock)
    clock.now += 2.5
    run.log("rl", 1, {"reward": 0.5, "kl": math.nan, "note": "warm", "step": 99})
    text = (run.path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        **{"phase": "rl", "step": 1, "time": 2.5},
        **{"reward": 0.5, "kl": None, "note": "warm"},
    }
    (record,) = RunFolder.open(run.path).metrics()
    assert record["reward"] == 0.5
    assert math.isnan(record["kl"])


def test_metrics_reach_tensorboard(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "one", "", "one")
    for step in (1, 2):
        run.log("rl", step, {"reward": step / 2, "stage": "text is left out"})
    run.close("finished")
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["rl/reward"]
    assert [(event.step, event.value) for event in events.Scalars("rl/reward")] == [(1, 0.5), (2, 1.0)]


def test_a_half_written_last_line_is_left_out_and_then_replaced(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "one", "", "one")
    run.log("rl", 1, {"reward": 0.5})
    run.close("interrupted")
    with (run.path / "metrics.jsonl").open("ab") as lines:
        lines.write('{"phase": "rl", "step": 2, "word": "é'.encode()[:-1])
    again = RunFolder.open(run.path)
    assert [record["step"] for record in again.metrics()] == [1]
    again.log("rl", 2, {"reward": 0.75})
    assert [record["reward"] for record in again.metrics()] == [0.5, 0.75]
    assert (run.path / "metrics.jsonl").read_bytes().count(b"\n") == 2


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "one", "", "one")
    (run.path / "metrics.jsonl").write_text('{"phase": "rl"\n{"phase": "rl", "step": 2}\n')
    with pytest.raises(RunError, match="line 1 is not JSON"):
        run.metrics()


def test_a_resumed_run_goes_on_and_its_repeated_steps_count_once(tmp_path: Path) -> None:
    clock = Clock()
    run = RunFolder.create(tmp_path / "one", "", "one", clock)
    for step in (1, 2, 3):
        clock.now += 10
        run.log("rl", step, {"reward": 0.1 * step})
    run.close("interrupted")
    clock.now = 5.0
    again = RunFolder.resume(run.path, clock)
    assert RunFolder.open(run.path).summary()["status"] == "running"
    assert again.seconds() == pytest.approx(30)
    for step in (2, 3, 4):
        clock.now += 1
        again.log("rl", step, {"reward": 1.0 * step})
    assert [(record["step"], record["reward"]) for record in again.metrics()] == [
        (1, 0.1),
        (2, 2.0),
        (3, 3.0),
        (4, 4.0),
    ]
    again.close("finished")
    assert RunFolder.open(run.path).summary()["seconds"] == pytest.approx(33)


def test_measurements_at_the_same_step_stay_apart(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "one", "", "one")
    for stage in ("before", "supervised"):
        run.log("eval", 0, {"stage": stage, "accuracy": 0.5})
    assert [record["stage"] for record in run.metrics()] == ["before", "supervised"]


def test_tables_round_trip_with_fixed_columns(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "one", "", "one")
    for step in (9, 10, 11):
        run.rollouts(step, [{"step": step, "group": 0, "sample": 1, "answer": 42, "reward": 1, "extra": [1, 2]}])
    run.rollouts(12, [])
    path = run.path / "rollouts" / "step-000012.parquet"
    assert pq.read_schema(path).names == list(ROLLOUT_COLUMNS)
    rows = run.last_rollouts(3)
    assert [row["step"] for row in rows] == [10, 11]
    assert rows[0]["answer"] == "42"
    assert rows[0]["reward"] == 1.0
    assert rows[0]["extra"] == [1, 2]
    assert rows[0]["completion"] is None
    assert run.last_rollouts(0) == []


def test_evaluations_come_in_the_order_of_the_run(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "one", "", "one")
    for stage in ("after", "step-000020", "before", "step-000010", "supervised"):
        run.evaluation(stage, [dict.fromkeys(EVALUATION_COLUMNS, 1)])
    (run.path / "evals" / ".later.parquet.7.tmp").write_bytes(b"half")
    found = run.evaluations()
    assert list(found) == ["before", "supervised", "step-000010", "step-000020", "after"]
    assert found["before"] == [{"problem": 1, **dict.fromkeys(list(EVALUATION_COLUMNS)[1:], "1")}]


def test_update_keeps_other_fields_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "one", "", "one")
    run.update(rows=[{"stage": "before", "accuracy": math.nan}])
    run.update(speed={"rollout_tokens_per_second": 812.0})
    summary = json.loads((run.path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["rows"] == [{"stage": "before", "accuracy": None}]
    assert summary["speed"]
    assert sorted(path.name for path in run.path.iterdir()) == ["metrics.jsonl", "recipe.toml", "summary.json"]


def test_leaving_a_run_records_how(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "good", "", "good"):
        pass
    with pytest.raises(MemoryError), RunFolder.create(tmp_path / "bad", "", "bad"):
        raise MemoryError("no room")
    with pytest.raises(KeyboardInterrupt), RunFolder.create(tmp_path / "cut", "", "cut"):
        raise KeyboardInterrupt
    ends = [RunFolder.open(tmp_path / name).summary() for name in ("good", "bad", "cut")]
    assert [end["status"] for end in ends] == ["finished", "failed", "interrupted"]
    assert ends[1]["error"] == "MemoryError: no room"


def test_a_run_ends_only_in_known_ways(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="use one of running"):
        RunFolder.create(tmp_path / "one", "", "one").close("done")
