"""A job's status is the last step in its run's folder; its exit code is what the head says of its end."""

from pathlib import Path

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from lockstep.cluster.jobs import status
from lockstep.cluster.jobs.following import exit_code
from lockstep.cluster.jobs.spec import METADATA, JobSpec
from lockstep.cluster.jobs.table import row
from lockstep.cluster.recipe.load import resolve
from lockstep.cluster.records.run_folder import METRICS, RunFolder


def test_the_last_step_is_found_behind_other_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve("parity-tiny", {"run": str(tmp_path / "run"), "layout.data": 2})
    assert status.JobStatus.of(recipe, 3) == status.JobStatus(attempt=3)
    run = RunFolder.create(recipe.folder, "", "tiny")
    for step in (1, 2):
        run.log(
            "pretrain", step, {"loss": 5.0 - step, "train_tokens_per_second": 90.0, "step_seconds": 2.0, "mfu": 0.5}
        )
    run.log("held_out", 2, {"loss": 9.0})
    wanted = status.JobStatus(1, "pretrain", 2, 20, 2.0, 45.0, 0.5, None, 3.0)
    with (recipe.folder / METRICS).open("a") as file:
        file.write('{"phase": "pretrain", "st')
    assert status.JobStatus.of(recipe, 1) == wanted
    monkeypatch.setattr(status, "TAIL_BYTES", 250)
    assert status.JobStatus.of(recipe, 1) == wanted
    wanted.write(tmp_path / "status.json")
    assert status.JobStatus.of_json((tmp_path / "status.json").read_text()) == wanted
    assert status.JobStatus.of_json(None) == status.JobStatus.of_json("half a") == status.JobStatus()


def details(state: JobStatus, code: int | None = None) -> JobDetails:
    spec = JobSpec(resolve("parity-tiny"), "mine")
    made = JobDetails(
        type=JobType.SUBMISSION, status=state, entrypoint="", driver_exit_code=code, metadata={METADATA: spec.to_json()}
    )
    made.submission_id, made.start_time = "mine-1", 1_000_000
    return made


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        (JobStatus.RUNNING, None, None),
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.STOPPED, None, 130),
        (JobStatus.FAILED, 1, 1),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, 75, 75),
        (JobStatus.FAILED, 124, 124),
        (JobStatus.FAILED, 137, 75),
        (JobStatus.FAILED, None, 75),
    ],
)
def test_exit_codes(state: JobStatus, code: int | None, expected: int | None) -> None:
    assert exit_code(details(state, code)) == expected


def test_a_row_of_the_table() -> None:
    where = status.JobStatus(2, "rl", 3, 10, 4.5, 1234.5, 0.51, 0.25, 9.0)
    cells = row(details(JobStatus.RUNNING), where, 1090.0)
    assert cells == ("mine-1", "running, attempt 2", "rl 3/10", "4.50", "1,234", "51%", "reward 0.25", "1m30s")
    assert row(details(JobStatus.PENDING), status.JobStatus(), 1005.0)[1:7] == ("pending", *"–––––")
    assert row(details(JobStatus.FAILED, 124), status.JobStatus(), 1005.0)[1] == "out of time"
