"""A run's folder and the place of its checkpoints are one run's alone, as long as its process lives."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lockstep.cluster.launch.run_lock import RunLocked, locked
from lockstep.cluster.process_identity import ProcessIdentity
from lockstep.distributed.checkpoint.storage import Folder, Storage, storage_of


@pytest.fixture(params=["inside", "folder", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Where checkpoints go."""
    return {
        "inside": Folder(tmp_path / "run" / "checkpoints"),
        "folder": Folder(tmp_path / "saves"),
        "store": storage_of(f"file://{tmp_path}/store/"),
    }[request.param]


@pytest.fixture
def gone() -> Iterator[ProcessIdentity]:
    """A process that has ended."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        holder = replace(ProcessIdentity.this_process(), pid=child.pid)
        child.kill()
        child.wait()
        yield holder


def write_lock(folder: Path, holder: ProcessIdentity) -> Path:
    file = folder.with_name(f"{folder.name}.lock")
    file.write_text(json.dumps(asdict(holder)))
    return file


def test_the_second_of_two_runs_is_refused_and_the_first_goes_on(place: Storage, tmp_path: Path) -> None:
    with locked(tmp_path / "run", place):
        sentence = r"another run writes into .*/run: process \d+ on .* remove that file"
        with pytest.raises(RunLocked, match=sentence), locked(tmp_path / "run", place):
            raise AssertionError("two runs hold one lock")
        with pytest.raises(RunLocked), locked(tmp_path / "run", Folder(tmp_path / "elsewhere")):
            raise AssertionError("two runs hold one lock")
    assert not list(tmp_path.rglob("*.lock"))
    with locked(tmp_path / "run", place):
        assert (tmp_path / "run.lock").is_file()


def test_two_runs_do_not_share_a_place(tmp_path: Path) -> None:
    for at in (Folder(tmp_path / "saves"), storage_of(f"file://{tmp_path}/store/")):
        with locked(tmp_path / "one", at):
            with (
                pytest.raises(RunLocked, match=r"another run writes into .*(saves|store)"),
                locked(tmp_path / "two", at),
            ):
                raise AssertionError("two runs share a place")
            assert not (tmp_path / "two.lock").exists(), "the lock of a run that was refused stays"


def test_a_folder_is_the_same_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    place = Folder(tmp_path / "run" / "checkpoints")
    with locked(Path("run"), place):
        for name in (tmp_path / "link", Path("link"), tmp_path / "x" / ".." / "run"):
            with pytest.raises(RunLocked), locked(name, place):
                raise AssertionError("two runs hold one lock")


def test_a_lock_stays_where_its_folder_is_moved_aside(place: Storage, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run", place):
        (tmp_path / "run").rename(tmp_path / "run-1")
        with pytest.raises(RunLocked), locked(tmp_path / "run", place):
            raise AssertionError("two runs hold one lock")


def test_the_lock_of_a_process_that_is_gone_is_taken_over(
    gone: ProcessIdentity, place: Storage, tmp_path: Path
) -> None:
    file = write_lock(tmp_path / "run", gone)
    with locked(tmp_path / "run", place):
        assert json.loads(file.read_text())["pid"] != gone.pid
    assert not file.exists()


def test_a_process_that_took_the_number_of_another_is_another(tmp_path: Path) -> None:
    here = ProcessIdentity.this_process()
    write_lock(tmp_path / "run", replace(here, started=here.started - 100))
    with locked(tmp_path / "run", Folder(tmp_path / "run" / "checkpoints")):
        pass


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"processes": 1}])
def test_nobody_knows_from_another_host(change: dict[str, object], gone: ProcessIdentity, tmp_path: Path) -> None:
    file = write_lock(tmp_path / "run", replace(gone, **change))  # type: ignore[arg-type]
    with pytest.raises(RunLocked) as caught, locked(tmp_path / "run", Folder(tmp_path / "run" / "checkpoints")):
        raise AssertionError("a lock of another host was taken over")
    assert str(file) in str(caught.value)
    assert f"on {change.get('host', gone.host)}" in str(caught.value)
    file.unlink()
    with locked(tmp_path / "run", Folder(tmp_path / "run" / "checkpoints")):
        pass


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"host": 3}', "\x00\xff", "null"])
def test_a_lock_that_cannot_be_read_is_somebodys(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(content)
    with pytest.raises(RunLocked, match="remove that file"), locked(tmp_path / "run", Folder(tmp_path / "run")):
        raise AssertionError("a lock that cannot be read was taken over")


def test_a_run_that_fails_lets_go(place: Storage, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "run", place):
        raise KeyboardInterrupt
    with locked(tmp_path / "run", place):
        pass
