"""Jobs on three hosts: submitted, left alone, found again, stopped and resumed, two of them at once."""

import json
import re
from pathlib import Path

import pytest

from tests.cluster.cli_process import metrics, overrides, summary, until, write_recipe
from tests.cluster.hosts import PYTHON, Hosts, connected, needs_hosts
from tests.cluster.run.test_resuming_rl import figures

ROOT = Path(__file__).parents[3]
pytestmark = [needs_hosts, pytest.mark.exhaustive]


def lockstep(hosts: Hosts, *arguments: str, log: str) -> tuple[int, str]:
    """Exit code and output of a command that is given on the last host, which has no dashboard of its own."""
    process = started(hosts, *arguments, log=log)
    return process.wait(280), (hosts[2].folder / log).read_text()


def started(hosts: Hosts, *arguments: str, log: str):  # type: ignore[no-untyped-def]
    command = [PYTHON, "-m", "lockstep", *arguments, "--address", f"{hosts[0].address}:8265"]
    return hosts[2].start(*command, log=log, PYTHONPATH=str(ROOT / "src"))


JOBS = {
    "pretrain": ("layout.data=2", "roles.policy.cpus=0.5", "pretrain.steps=300"),
    "rl": ("layout.data=1", "supervised.steps=4", "rl.steps=300"),
}


@pytest.mark.parametrize("phase", JOBS)
def test_jobs_on_three_hosts(phase: str, tmp_path: Path, tiny_folder: Path) -> None:
    recipe = "parity-tiny" if phase == "pretrain" else str(write_recipe(tmp_path, tiny_folder))
    with connected(3) as hosts:
        for number in range(3):
            hosts.start_ray(number, 1)

        def run(name: str) -> list[str]:
            return ["submit", recipe, "--name", name, *overrides(f"run={tmp_path}/{name}", *JOBS[phase])]

        client = started(hosts, *run("one"), log="client.log")
        printed = hosts[2].folder / "client.log"
        until(lambda: "  2/300" in printed.read_text() or client.poll() is not None, 200)
        client.kill()
        assert lockstep(hosts, *run("two"), "--no-wait", log="two.log")[0] == 0
        code, ended = lockstep(hosts, "stop", "one", log="stop.log")
        assert code == 0, ended
        assert "which is saved" in ended
        code, resumed = lockstep(hosts, "resume", "one", log="resume.log")
        assert code == 0, resumed
        assert "going on after step" in resumed
        assert lockstep(hosts, "attach", "two", log="attach.log")[0] == 0
        table = lockstep(hosts, "jobs", log="jobs.log")[1]
    assert len(re.findall(rf"{phase} 300/300", table)) == 2, table
    assert [word for line in table.splitlines()[1:] for word in line.split()[1:2]].count("stopped") == 1
    one, two = ([figures(line) for line in metrics(tmp_path / name, phase)] for name in ("one", "two"))
    assert one == two
    assert summary(tmp_path / "one")["status"] == summary(tmp_path / "two")["status"] == "finished"


def test_a_host_without_the_text_is_named(tmp_path: Path) -> None:
    with connected(2) as hosts:
        text = hosts[0].local / "text"
        for suffix in (".bin", ".idx"):
            (hosts[0].disk / f"text{suffix}").write_bytes(b"")
        for number in range(2):
            hosts.start_ray(number, 1)
        script = f"""
import ray
from lockstep.cluster.recipe.load import parse
from lockstep.cluster.run.inputs import check_inputs
ray.init(address={hosts.cluster!r}, log_to_driver=False)
check_inputs(parse({{"pretrain": {{"steps": 1, "data": {{"length": 8, "blend": [{{"path": {str(text)!r}}}]}}}}}}))
"""
        code, output = hosts[0].run(PYTHON, "-c", script, timeout=120, PYTHONPATH=str(ROOT / "src"))
    assert code == 1
    wanted = f"the node {hosts[1].address} has no {text}, which pretrain.data.blend[0].path names: put it there"
    assert wanted in output, json.dumps(output)
