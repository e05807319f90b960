"""On a full disk a run ends with a sentence and the path, what was saved before is whole, and the summary says why."""

import json
import multiprocessing
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lockstep.cluster.records.disk_reserve import RESERVE, DiskReserve
from lockstep.cluster.records.run_folder import RunFolder
from lockstep.cluster.run.failures import RunFailed, told_in_sentences
from lockstep.distributed.checkpoint.integrity import damage, newest_whole
from lockstep.distributed.checkpoint.reshard import chunks_of
from lockstep.distributed.checkpoint.saver import SaveFailed, Saver
from lockstep.distributed.checkpoint.storage import storage_of
from lockstep.rl.remote import WorkerFailed
from tests.cluster.cli_process import overrides, summary

PRETRAINING = Path(__file__).parents[3] / "recipes" / "parity-tiny.toml"
LARGEST = 64 << 10
"""Bytes that a file may have: beyond them writes fail as they do on a full disk."""


def within_limits(folder: Path, wait: bool) -> None:
    """Saves, and logs, until a file is too large; what is said goes into files."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, LARGEST))
    saver = Saver(folder / "checkpoints")
    saver.save(1, chunks_of(torch.ones(8, 8), "w"), {}, {})
    try:
        with told_in_sentences(folder):
            saver.save(2, chunks_of(torch.ones(300, 300), "w"), {}, {}, wait=wait)
            saver.wait()
    except RunFailed as error:
        (folder / "save").write_text(str(error))
    run = RunFolder.create(folder / "run", "", "mine")
    try:
        with run, told_in_sentences(run.path):
            for step in range(1, LARGEST):
                run.log("pretrain", step, {"loss": 1.0})
    except RunFailed as error:
        (folder / "log").write_text(str(error))


@pytest.mark.parametrize("wait", [True, False], ids=["at once", "in the background"])
def test_what_cannot_be_written_is_one_sentence_with_its_path(
    wait: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    child = multiprocessing.get_context("spawn").Process(target=within_limits, args=(tmp_path, wait))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert "Traceback" not in "".join(capfd.readouterr())
    assert (tmp_path / "save").read_text() == (
        f"{tmp_path}/checkpoints/step-000002 was not saved: File too large; checkpoints before it are whole: "
        "free space there, and resume"
    )
    checkpoints = storage_of(tmp_path / "checkpoints")
    assert newest_whole(checkpoints).place == checkpoints / "step-000001"
    sentence = f"{tmp_path}/run could not be written (File too large): free space there, and resume"
    assert (tmp_path / "log").read_text() == sentence
    run = RunFolder.open(tmp_path / "run")
    assert (run.summary()["status"], run.summary()["error"]) == ("failed", f"RunFailed: {sentence}")
    steps = [line["step"] for line in run.metrics()]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 100


def test_room_for_the_end_is_kept_while_a_run_is_under_way(tmp_path: Path) -> None:
    with DiskReserve(tmp_path):
        (kept,) = tmp_path.iterdir()
        assert kept.stat().st_blocks * 512 >= RESERVE
    assert not list(tmp_path.iterdir())


def test_other_failures_stay_as_they_are(tmp_path: Path) -> None:
    for error in (WorkerFailed("policy 0: KeyError"), PermissionError(13, "no"), ValueError("x")):
        with pytest.raises(type(error)) as caught, told_in_sentences(tmp_path):
            raise error
        assert caught.value is error
    with pytest.raises(RunFailed, match="step-000001 was not saved: x; checkpoints"), told_in_sentences(tmp_path):
        raise SaveFailed("step-000001 was not saved: x")


@pytest.mark.exhaustive
@pytest.mark.parametrize("mib", [2, 3, 4])
def test_a_run_on_a_small_disk_ends_in_a_sentence(mib: int, tmp_path: Path) -> None:
    disk, left = tmp_path / "disk", tmp_path / "left"
    disk.mkdir()
    settings = overrides(f"run={disk}/run", "pretrain.steps=400", "checkpoints.every=2", "layout.data=2")
    train = shlex.join([sys.executable, "-m", "lockstep", "train", str(PRETRAINING), *settings])
    script = (
        f"mount -t tmpfs -o size={mib}m tmpfs {disk} && {{ {train}; code=$?; cp -r {disk}/run {left}; exit $code; }}"
    )
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True, timeout=280)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.count(f"{disk}/run") == 1
    assert "No space left on device" in done.stderr
    assert "free space there, and resume" in done.stderr
    assert summary(left)["status"] == "failed"
    assert "No space left on device" in str(summary(left)["error"])
    assert (left / "report.html").exists()
    assert json.loads((left / "metrics.jsonl").read_text().splitlines()[0])["step"] == 0
    found = newest_whole(storage_of(left / "checkpoints"))
    assert found.place is None or damage(found.place) is None
    assert not found.damaged
