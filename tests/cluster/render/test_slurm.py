"""The sbatch script keeps exit codes, passes signals on, goes on after a requeue, and trains on two hosts."""

import os
import shutil
import signal
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lockstep.cluster.recipe.load import load_recipe, parse, to_toml
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.render.nodes import Nodes, RenderError
from lockstep.cluster.render.slurm import SlurmJob, sbatch_script
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.tensors import whole
from tests.cluster.cli_process import metrics, summary, until
from tests.cluster.hosts import PYTHON, Hosts, needs_hosts
from tests.cluster.render.slurm_stub import Slurm

needs_ip = pytest.mark.skipif(not shutil.which("ip"), reason="the script needs iproute2")
TINY = Path(__file__).parents[3] / "recipes" / "parity-tiny.toml"
INTERPRETER = """#!/bin/bash
# Ray lives until it is told to end, or as long as {folder}/ray says; a run ends with {folder}/code, or by SIGTERM.
case "$2" in
ray.scripts.scripts) echo "$*" > {folder}/started; exec sleep "$(cat {folder}/ray 2>/dev/null || echo 600)" ;;
lockstep)
  cp "$4" {folder}/recipe.toml; echo "$*" > {folder}/arguments; env > {folder}/environment
  trap 'echo TERM >> {folder}/signals; exit 130' TERM
  if [ -f {folder}/code ]; then exit "$(cat {folder}/code)"; fi
  touch {folder}/trains
  while :; do sleep 0.1; done ;;
esac
"""


def saving(**values: object) -> Recipe:
    return parse({"pretrain": {"steps": 2}, "model": {"config": TINY_SHAPE}, "checkpoints": {"every": 1}} | values)


TINY_SHAPE = tomllib.loads(TINY.read_text())["model"]["config"]


class Job:
    """A script whose Python is a shell script that plays Ray and the run."""

    def __init__(self, folder: Path, recipe: Recipe, **asked: object) -> None:
        self.folder, self.slurm = folder, Slurm(folder / "slurm", {"localhost": []})
        python = folder / "python of $USER's"
        python.write_text(INTERPRETER.format(folder=folder))
        python.chmod(0o755)
        (folder / "scratch").mkdir()
        job = replace(SlurmJob(hours=1, python=str(python)), **asked)  # type: ignore[arg-type]
        (folder / "job.sh").write_text(sbatch_script(recipe, Nodes(cpus=2), job))

    def start(self, restarts: int = 0) -> "subprocess.Popen[str]":
        return self.slurm.batch(self.folder / "job.sh", os.getpid(), restarts)

    def run(self, restarts: int = 0) -> tuple[int, str]:
        process = self.start(restarts)
        output = process.communicate(timeout=60)[0]
        assert not Path(f"/tmp/ls-{os.getpid()}-{restarts}").exists()
        return process.returncode, output

    def interrupted(self, restarts: int = 0) -> tuple[int, str]:
        process = self.start(restarts)
        until((self.folder / "trains").exists, 30)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        (self.folder / "trains").unlink()
        return process.returncode, output


@needs_ip
def test_the_run_gets_the_recipe_and_its_exit_code_is_kept(tmp_path: Path) -> None:
    recipe = saving(name='It\'s\n`id` $HOME "END_OF_RECIPE"', run=f"{tmp_path}/it's $HOME\\")
    job = Job(tmp_path, recipe)
    (tmp_path / "code").write_text("7")
    code, output = job.run()
    assert code == 7, output
    assert (tmp_path / "recipe.toml").read_text() == to_toml(recipe)
    known = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line)
    assert known["SLURM_JOB_END_TIME"] == subprocess.check_output(["date", "-d2030-01-01", "+%s"], text=True).strip()
    assert known["LOCKSTEP_JOB"] == f"slurm-{os.getpid()}"
    assert len(known["RAY_AUTH_TOKEN"]) == 64
    arguments = (tmp_path / "arguments").read_text()
    assert "--address 127.0.0.1:" in arguments
    assert "--resume" not in arguments
    assert known["RAY_AUTH_TOKEN"] not in arguments + (tmp_path / "started").read_text() + output
    assert job.slurm.requeued == []


@needs_ip
def test_a_run_that_is_told_to_end_hears_it_once_and_goes_on_after_a_requeue(tmp_path: Path) -> None:
    job = Job(tmp_path, saving(), requeues=1)
    code, output = job.interrupted()
    assert code == 130, output
    assert (tmp_path / "signals").read_text() == "TERM\n"
    assert job.slurm.requeued == [f"requeue {os.getpid()}"]
    code, output = job.interrupted(restarts=1)
    assert (tmp_path / "arguments").read_text().rstrip().endswith("--resume")
    assert code == 130, output
    assert len(job.slurm.requeued) == 1, "the bound is reached"


@needs_ip
def test_a_job_that_was_cancelled_is_not_queued_again(tmp_path: Path) -> None:
    job = Job(tmp_path, saving())
    job.slurm.cancel()
    assert job.interrupted()[0] == 130
    assert job.slurm.requeued == []


@needs_ip
def test_a_ray_that_has_died_ends_the_run_and_the_job_goes_on_elsewhere(tmp_path: Path) -> None:
    job = Job(tmp_path, saving())
    (tmp_path / "ray").write_text("1")
    code, output = job.run()
    assert code == 130, output
    assert "error: Ray has ended on a node" in output
    assert job.slurm.requeued == [f"requeue {os.getpid()}"]


@needs_ip
@pytest.mark.parametrize(("code", "requeued"), [(75, 1), (124, 1), (1, 0), (2, 0)])
def test_a_run_that_lost_a_node_or_ran_out_of_time_goes_on(tmp_path: Path, code: int, requeued: int) -> None:
    job = Job(tmp_path, saving())
    (tmp_path / "code").write_text(str(code))
    assert job.run()[0] == code
    assert len(job.slurm.requeued) == requeued


def test_directives_say_what_was_asked_for() -> None:
    job = SlurmJob(hours=30.5, partition="a100", account="lab-1", options=["--qos=high"], requeues=0)
    script = sbatch_script(saving(name="Größe 7 of 9"), Nodes(2, 16, 8, 64.0), job)
    directives = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert directives == [
        "--job-name=gr-e-7-of-9",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=16",
        "--gpus-per-node=8",
        "--mem=65536M",
        "--time=1-06:30:00",
        "--partition=a100",
        "--account=lab-1",
        "--signal=B:TERM@180",
        "--open-mode=append",
        "--no-requeue",
        "--qos=high",
    ]


def test_a_container_has_the_scratch_folder_and_what_was_asked_for() -> None:
    job = SlurmJob(hours=1, container="img it's", mounts=["/data:/data"])
    script = sbatch_script(saving(), Nodes(), job).partition("export")[0].splitlines()
    shown = [
        *(line for line in script if line.startswith(("python=", "scratch=", "container="))),
        'echo "${container[@]}"',
    ]
    said = subprocess.run(["bash", "-c", "\n".join(shown)], env={"SLURM_JOB_ID": "5"}, capture_output=True, text=True)
    mounted = "/data:/data,/tmp/ls-5-0:/tmp/ls-5-0"
    assert said.stdout == f"--container-image=img it's --container-mounts={mounted}\n"
    assert "python=python" in script


@pytest.mark.parametrize(
    ("values", "asked", "words"),
    [
        ({"checkpoints": {}}, {}, "requeues=3 with checkpoints.every=0 would begin with step 1 again"),
        ({}, {"hours": 0.05}, "hours=0.05 leaves no time to train: a run is told to end 240 s before"),
        ({}, {"scratch": "/scratch/of a/user"}, "scratch=/scratch/of a/user is not an absolute path of at most 26"),
        ({}, {"scratch": "/scratch/of/a/project/of/mine"}, "which Ray needs for its sockets"),
        ({}, {"mounts": ["/a:/a"]}, "mount has no effect without container"),
        ({}, {"partition": "a b"}, "partition='a b' is no name that Slurm takes"),
        ({}, {"options": ["--comment=a b"]}, "option='--comment=a b' is no option of sbatch"),
    ],
)
def test_what_cannot_run_is_refused(values: dict[str, object], asked: dict[str, object], words: str) -> None:
    with pytest.raises(RenderError, match=words.replace("(", r"\(")):
        sbatch_script(saving(**values), Nodes(), replace(SlurmJob(hours=1), **asked))  # type: ignore[arg-type]


@pytest.mark.exhaustive
@needs_hosts
def test_on_two_hosts_a_job_ends_and_one_that_is_requeued_ends_with_the_same_bits(hosts: Hosts, tmp_path: Path) -> None:
    places = {host.address: host.words for host in hosts.hosts}
    slurm = Slurm(tmp_path / "slurm", places)
    settings = ["layout.data=2", "pretrain.steps=60", "checkpoints.every=20", "pretrain.evaluate_every=0"]

    def start(name: str, job: int, restarts: int = 0) -> "tuple[Path, subprocess.Popen[bytes]]":
        folder = tmp_path / f"{name}'s $HOME"
        recipe = load_recipe(TINY, [*settings, f"run={folder}"])
        script = tmp_path / f"{name}.sh"
        asked = SlurmJob(hours=1, python=str(PYTHON), scratch=str(hosts[0].local))
        script.write_text(sbatch_script(recipe, Nodes(2, cpus=1), asked))
        log = f"{name}-{restarts}.log"
        known = slurm.environment(job, restarts)
        return folder, hosts[0].start("bash", script, log=log, **known)

    def said(log: str) -> str:
        return (hosts[0].folder / log).read_text()

    whole_run, process = start("whole", 41)
    assert process.wait(300) == 0, said("whole-0.log")
    assert slurm.requeued == []
    cut, process = start("cut", 47)
    until(lambda: (cut / "metrics.jsonl").exists() and len(metrics(cut, "pretrain")) > 4, 240)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 130, said("cut-0.log")
    assert slurm.requeued == ["requeue 47"]
    assert "which is saved" in summary(cut)["ended"]
    taken = metrics(cut, "pretrain")[-1]["step"]
    assert 4 < taken < 60
    _, process = start("cut", 47, restarts=1)
    assert process.wait(300) == 0, said("cut-1.log")
    assert summary(cut)["status"] == "finished"
    one, other = Checkpoint(whole_run), Checkpoint(cut)
    assert one.tensors.keys() == other.tensors.keys()
    for tensor, entry in one.tensors.items():
        box = whole(tuple(entry["shape"]))
        np.testing.assert_array_equal(one.read(tensor, box), other.read(tensor, box), tensor)
    assert [m["loss"] for m in metrics(cut, "pretrain")] == [m["loss"] for m in metrics(whole_run, "pretrain")]
    assert not list(hosts[1].disk.iterdir()), "a scratch folder is left"
    assert not [process for host in hosts.hosts for process in host.processes()]
