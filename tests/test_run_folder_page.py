"""docs/run-folder.md lists what the code writes; that it lists all of it is checked where tests read runs."""

import re
from pathlib import Path

from lockstep.cluster.records.run_folder import STAGES, STATUSES
from lockstep.cluster.records.tables import COMPARISON_COLUMNS, EVALUATION_COLUMNS, ROLLOUT_COLUMNS
from tests.documented import PAGE, tables

ROOT = Path(__file__).parents[1]
CODE = "\n".join(
    p.read_text() for room in ("cluster", "rl", "model", "distributed") for p in (ROOT / room).rglob("*.py")
)
COMPOSED = {
    "held_out_loss": 'f"held_out_{name}"',
    "held_out_accuracy": 'f"held_out_{name}"',
    "held_out_margin": 'f"held_out_{name}"',
    "train_seconds": 'clock.lap("train")',
    "sync_seconds": 'clock.lap("sync")',
}
"""Keys that are put together, and the code that does it."""


def test_every_key_is_in_the_code() -> None:
    keys = {key.split("…")[0].rstrip("/") for name, found in tables().items() if name != "Files" for key in found}
    assert len(keys) > 60
    missing = {key for key in keys if not re.search(rf"\b{key}\b", CODE) and COMPOSED.get(key, "…") not in CODE}
    assert not missing


def test_every_phase_status_stage_and_column_is_named() -> None:
    text = PAGE.read_text()
    phases = set(re.findall(r"\.log\(\s*\"(\w+)\"", CODE)) | {"sft", "preference", "reward", "rl"}
    assert phases <= set(tables())
    columns = [*COMPARISON_COLUMNS, *EVALUATION_COLUMNS, *ROLLOUT_COLUMNS]
    assert not [word for word in (*STATUSES, *STAGES, *columns) if f"`{word}`" not in text]
