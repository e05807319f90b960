"""Hosts of a cluster are lost in the middle of a run, and it ends with the bits of one that nothing disturbed."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lockstep.distributed.checkpoint.manager import Checkpoint
from tests.cluster.cli_process import Train, metrics, overrides, summary, write_recipe
from tests.cluster.hosts import PYTHON, Host, Hosts, connected, needs_hosts
from tests.cluster.run.test_resuming_rl import figures, same_checkpoints

pytestmark = [pytest.mark.exhaustive, needs_hosts]
PRETRAINING = Path(__file__).parents[3] / "recipes" / "parity-tiny.toml"
TEXT = ("pretrain.steps=40", "layout.data=2", "checkpoints.every=4")
PROBLEMS = (
    "supervised.steps=4",
    "rl.steps=60",
    "layout.data=1",
    "checkpoints.every=5",
    "rollout.workers=2",
    "model.numerics=exact",
)
APART = ("roles.policy.cpus=2", 'roles.rollout={place="apart",cpus=2}')


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """A head and two hosts."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    with connected(3) as made:
        yield made


class Run:
    """`lockstep train` on the head's host."""

    def __init__(self, hosts: Hosts, recipe: Path, *settings: str) -> None:
        self._log = hosts[0].folder / "train.log"
        command = ["train", recipe, "--address", hosts.cluster, *overrides(*settings)]
        self.process = hosts[0].start(PYTHON, "-m", "lockstep", *command, log=self._log.name)

    @property
    def output(self) -> str:
        """What it printed so far."""
        return self._log.read_text(errors="replace")

    def until(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        """Waits for a condition while it runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.2)


def workers(host: Host, kind: str) -> list[psutil.Process]:
    """The processes of a host that run workers of a class."""
    found = []
    for process in host.processes():
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(f"ray::{kind}"):
                found.append(process)
    return found


def check_same(first: Path, second: Path, phases: Sequence[str]) -> None:
    """Whether a run has the bits and figures of one that nothing disturbed."""
    same_checkpoints(Checkpoint(first), Checkpoint(second))
    for phase in phases:
        one, other = ({m["step"]: figures(m) for m in metrics(run, phase)} for run in (first, second))
        assert one == other
        assert [m["step"] for m in metrics(second, phase)] == list(range(1, len(one) + 1))


def test_a_run_goes_on_without_a_host_of_rollout_workers_and_with_it_when_it_is_back(
    hosts: Hosts, tmp_path: Path, tiny_folder: Path
) -> None:
    recipe, run = write_recipe(tmp_path, tiny_folder), tmp_path / "tiny"
    for number in range(3):
        hosts.start_ray(number, cpus=2)
    # On the same hosts, where the policy has as many threads: gradients add up in an order that their number decides.
    straight = Run(hosts, recipe, f"run={tmp_path}/straight", *PROBLEMS, *APART)
    assert straight.process.wait(240) == 0, straight.output
    command = Run(hosts, recipe, *PROBLEMS, *APART)
    command.until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run, "rl")) >= 3)
    lost = next(n for n in (1, 2) if workers(hosts[n], "RolloutWorker"))
    hosts[lost].lose()
    before = len(metrics(run, "rl"))
    command.until(lambda: len(metrics(run, "rl")) >= before + 5)
    assert metrics(run, "rl")[-1]["rollout_teams"] == 1
    assert metrics(run, "rl")[-1]["replaced_workers"] == 0, "there was no place for another"
    hosts.start_ray(lost, cpus=2)
    command.until(lambda: metrics(run, "rl")[-1]["replaced_workers"] == 1)
    assert command.process.wait(240) == 0, command.output
    assert metrics(run, "rl")[-1]["rollout_teams"] == 2
    check_same(tmp_path / "straight", run, ("sft", "rl"))


def test_a_run_begins_again_on_what_is_left_when_the_host_of_its_policy_is_lost(
    hosts: Hosts, tmp_path: Path, train: Train
) -> None:
    run = tmp_path / "run"
    for number, cpus in enumerate((0, 2, 2)):
        hosts.start_ray(number, cpus)
    command = Run(hosts, PRETRAINING, f"run={run}", *TEXT, "roles.policy.cpus=1")
    command.until(lambda: (run / "checkpoints" / "step-000008" / "manifest.json").exists())
    next(hosts[n] for n in (1, 2) if workers(hosts[n], "ModelWorker")).lose()
    assert command.process.wait(240) == 0, command.output
    assert summary(run)["status"] == "finished"
    assert "its node" in str(summary(run)["restarts"])
    code, output = train(tmp_path / "straight.log", PRETRAINING, f"run={tmp_path}/straight", *TEXT)
    assert code == 0, output
    check_same(tmp_path / "straight", run, ("pretrain",))
