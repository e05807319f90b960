"""Rollout workers, verifiers and environments that are stopped by a signal are named and replaced; nothing is lost."""

import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from lockstep.distributed.checkpoint.manager import Checkpoint
from tests.cluster.cli_process import Command, Train, metrics, overrides, until, write_recipe
from tests.cluster.heads import Head
from tests.cluster.run.test_attempts import workers
from tests.cluster.run.test_resuming_rl import figures, same_checkpoints

OWN = """
from lockstep.rl.environments.protocol import Message, Reply

class Twice:
    async def reset(self, prompt): ...
    async def step(self, turn):
        return Reply() if turn.last or not turn.whole else Reply((Message("user", "Again."),))
    async def close(self): ...
"""
COLUMNS = ["step", "group", "completion", "outcome", "reward", "weight_versions", "finish_reason"]
KINDS = ("rollout", "verifier", "environment")
CLASSES = {"rollout": "RolloutWorker", "verifier": "VerifierWorker", "environment": "EnvironmentWorker"}


def rollouts(run: Path) -> list[dict[str, Any]]:
    files = sorted((run / "rollouts").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file, columns=COLUMNS).to_pylist()]


@pytest.mark.exhaustive
def test_workers_that_are_stopped_cost_neither_a_sample_nor_a_bit(
    tmp_path: Path, tiny_folder: Path, train: Train, head: Head
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    recipe = write_recipe(tmp_path, tiny_folder)
    settings = (
        "layout.data=1",
        "model.numerics=exact",
        "rl.steps=40",
        "rl.sampling.max_new_tokens=24",
        f"environment.kind={tmp_path}/own.py:Twice",
        'environment.stop=["a", "e", "i", "o", "3", "4"]',
        "environment.turns=2",
    )
    code, output = train(tmp_path / "log", recipe, f"run={tmp_path}/straight", *settings)
    assert code == 0, output
    given = overrides(*settings, "recovery.stopped_after=4")
    command = Command(tmp_path / "log", "train", str(recipe), *given, RAY_ADDRESS=head.cluster)
    run = tmp_path / "tiny"
    try:
        for step, kind in enumerate(KINDS, start=1):
            command.wait_for_file(run / "rollouts" / f"step-{step:06d}.parquet")
            [process] = workers(head, CLASSES[kind])
            process.send_signal(signal.SIGSTOP)
            command.wait_for(f"{kind} 0 counts as dead: its process")
            until(lambda kind=kind: len(workers(head, CLASSES[kind])) == 1, 120)  # type: ignore[misc]
        assert command.wait() == 0, command.output
    finally:
        command.kill()
    assert len(rollouts(run)) == 40 * 16
    assert rollouts(run) == rollouts(tmp_path / "straight")
    same_checkpoints(Checkpoint(tmp_path / "straight"), Checkpoint(run))
    one, other = ([figures(m) for m in metrics(r, "rl")] for r in (tmp_path / "straight", run))
    assert one == other
    assert metrics(run, "rl")[-1]["replaced_workers"] == len(KINDS)
