"""`lockstep render` prints what schedulers take, or writes it into a file, and refuses in one sentence."""

from pathlib import Path

import pytest
import yaml

from tests.cluster.cli_process import lockstep, overrides, refused

ON_VOLUME = overrides("run=/runs/{name}")


@pytest.mark.parametrize("command", ["slurm", "rayjob", "compose"])
def test_help_has_an_example(command: str) -> None:
    result = lockstep("render", command, "--help")
    assert result.exit_code == 0
    assert f"Example: lockstep render {command} quickstart" in result.output


def test_it_is_printed_or_written(tmp_path: Path) -> None:
    for arguments in (
        ("slurm", "quickstart", "--hours", "2", "--requeues", "0"),
        ("rayjob", "quickstart", "--image", "lockstep", "--volume", "runs:/runs", *ON_VOLUME),
        ("compose", "quickstart", "--image", "lockstep", "--volume", "runs:/runs", *ON_VOLUME),
    ):
        printed = lockstep("render", *arguments)
        assert printed.exit_code == 0, printed.output
        file = tmp_path / f"{arguments[0]} of mine"
        written = lockstep("render", *arguments, "--output", str(file))
        assert (written.stdout, written.stderr) == ("", f"wrote {file}\n")
        assert file.read_text() == printed.stdout


def test_flags_reach_what_is_rendered() -> None:
    flags = ("--hours", "1.5", "--nodes", "3", "--cpus", "4", "--gpus", "2", "--memory", "32", "--partition", "p")
    more = ("--account", "a", "--option=--qos=high", "--python", "/x y/python", "--interface", "ib0", "--resume")
    script = lockstep("render", "slurm", "quickstart", *flags, *more, "--requeues", "0", "--scratch", "/local").stdout
    for line in ("#SBATCH --account=a", "#SBATCH --qos=high", "#SBATCH --time=0-01:30:00", "interface=ib0"):
        assert f"\n{line}\n" in script
    for line in ("nodes=3 cpus=4 gpus=2 requeues=0", "python='/x y/python'", "resume=(--resume)"):
        assert f"\n{line}\n" in script
    assert "\nscratch=/local/ls-" in script
    flags = ("--image", "i", "--volume", "runs:/runs", "--retries", "2", "--secret", "s", "--keep", "5")
    _, rayjob = yaml.safe_load_all(
        lockstep("render", "rayjob", "quickstart", *flags, *ON_VOLUME, *overrides("checkpoints.every=5")).stdout
    )
    assert (rayjob["spec"]["backoffLimit"], rayjob["spec"]["ttlSecondsAfterFinished"]) == (2, 5)


def test_what_cannot_run_names_its_flag() -> None:
    assert "--requeues 3 with checkpoints.every=0" in refused("render", "slurm", "quickstart", "--hours", "1")
    assert "--hours 0.01 leaves no time" in refused(
        "render", "slurm", "quickstart", "--hours", "0.01", "--requeues", "0"
    )
    assert "--volume runs is not of the form" in refused(
        "render", "compose", "quickstart", "--image", "i", "--volume", "runs"
    )
    sentence = refused("render", "rayjob", "quickstart", "--image", "i", "--gpus", "1", *ON_VOLUME)
    assert "the roles need 2 GPU (policy 2) and the cluster has 1" in sentence
    assert "--set 'rl' is not of the form" in refused("render", "slurm", "quickstart", "--hours", "1", "--set", "rl")
