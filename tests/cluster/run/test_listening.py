"""A run on one machine listens where only this machine reaches it, as do Ray's daemons that it starts."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.cluster.cli_process import write_recipe


def listening(root: psutil.Process) -> dict[str, set[str]]:
    """Addresses at which a process and those below it listen, with their names."""
    found: dict[str, set[str]] = {}
    with suppress(psutil.Error):
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.Error):
                for each in process.net_connections("inet"):
                    if each.status == psutil.CONN_LISTEN:
                        found.setdefault(each.laddr.ip.removeprefix("::ffff:"), set()).add(process.name())
    return found


@pytest.mark.exhaustive
def test_a_run_on_one_machine_listens_on_the_loopback_interface_alone(tmp_path: Path, tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "lockstep", "train", str(write_recipe(tmp_path, tiny_folder))]
    with (tmp_path / "log").open("wb") as log:
        run = subprocess.Popen([*command, "--set", "supervised.steps=2"], stdout=log, stderr=log)
    found: dict[str, set[str]] = {}
    while run.poll() is None:
        for address, names in listening(psutil.Process(run.pid)).items():
            found.setdefault(address, set()).update(names)
        time.sleep(0.2)
    assert run.returncode == 0, (tmp_path / "log").read_text()
    assert set(found) == {"127.0.0.1"}, found
    assert {"raylet", "gcs_server"} < found["127.0.0.1"]
    assert any(name.startswith("ray::ModelWorker") for name in found["127.0.0.1"])
