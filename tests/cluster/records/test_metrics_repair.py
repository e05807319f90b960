"""A run that goes on has each of its steps once in its metrics; what is torn is dropped and what is missing is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.cluster.records.metrics_repair import repair_metrics
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.reshard import chunks_of
from lockstep.distributed.checkpoint.saver import Saver


def checkpoint(folder: Path, step: int, **manifest: Any) -> Checkpoint:
    return Checkpoint(Saver(folder).save(step, chunks_of(torch.ones(2), "w"), manifest, {}))


def line(phase: str, step: int, **values: float) -> bytes:
    return json.dumps({"loss": 1.0, **values, "phase": phase, "step": step}).encode() + b"\n"


def lines_of(path: Path) -> list[tuple[str, int]]:
    return [(found["phase"], found["step"]) for found in map(json.loads, path.read_text().splitlines())]


def pretraining(*steps: int) -> bytes:
    return b"".join(line("pretrain", step) for step in steps)


@pytest.mark.parametrize(
    ("end", "torn"),
    [
        (b"", 0),
        (line("pretrain", 5)[:-9], 1),
        (line("pretrain", 5)[:-9] + b"\n", 1),
        (bytes(4096), 0),
        (line("pretrain", 5)[:9] + bytes(512), 1),
        (b'{"phase": "pretrain"}\n', 1),
        (b"7\n[]\n\xff\n", 3),
    ],
    ids=["whole", "torn", "torn with its newline", "zeros", "torn and zeros", "no step", "no objects"],
)
def test_what_a_killed_run_left_is_dropped(end: bytes, torn: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(pretraining(1, 2, 3, 4) + end)
    found = repair_metrics(path, checkpoint(tmp_path, 3))
    assert lines_of(path) == [("pretrain", 1), ("pretrain", 2), ("pretrain", 3)]
    assert path.read_bytes().endswith(b"\n")
    assert (found.repeated, found.torn, found.missing) == (1, torn, ())
    assert found.sentences[0] == "1 step after the checkpoint will be taken again"


def test_a_torn_line_amid_others_is_dropped_and_is_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(pretraining(1) + b'{"loss": 2.0, "pha\n' + pretraining(3, 4))
    found = repair_metrics(path, checkpoint(tmp_path, 4))
    assert lines_of(path) == [("pretrain", 1), ("pretrain", 3), ("pretrain", 4)]
    assert found.sentences == [
        "dropped 1 line of metrics.jsonl that could not be read",
        "metrics.jsonl has no line of pretrain 2: its curves have a gap there, the run has none",
    ]


@pytest.mark.parametrize(
    ("steps", "gaps"),
    [
        ((1, 2, 5, 6), [range(3, 5)]),
        ((2, 3, 4, 5), [range(1, 2), range(6, 7)]),
        ((), [range(1, 7)]),
        ((1, 2, 3, 4, 5, 6), []),
    ],
)
def test_gaps_are_said(steps: tuple[int, ...], gaps: list[range], tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(pretraining(*steps))
    found = repair_metrics(path, checkpoint(tmp_path, 6))
    assert list(found.missing) == gaps
    assert len(found.sentences) == len(gaps)


def test_a_file_that_is_gone_is_one_gap(tmp_path: Path) -> None:
    found = repair_metrics(tmp_path / "metrics.jsonl", checkpoint(tmp_path, 2))
    assert found.missing == (range(1, 3),)


def test_measurements_stand_up_to_the_checkpoint_and_rewinds_as_it_says(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    before = line("held_out", 0) + pretraining(1, 2, 3, 4) + line("rewind", 4, back_to=2) + pretraining(3)
    path.write_bytes(before + line("held_out", 3) + pretraining(4, 5) + line("held_out", 4) + line("rewind", 5))
    found = repair_metrics(path, checkpoint(tmp_path, 3, rewinds=[[2, 4]]))
    phases = [("held_out", 0), *(("pretrain", n) for n in (1, 2, 3)), ("rewind", 4), ("pretrain", 3), ("held_out", 3)]
    assert lines_of(path) == phases
    assert found.repeated == 2


def test_later_phases_go_with_their_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [("eval", 0), *(("sft", n) for n in (1, 2, 3, 4)), ("eval", 4), *(("preference", n) for n in (1, 2, 3))]
    lines += [("eval", 7), ("rl", 1), ("rl", 2), ("rl", 3)]
    content = b"".join(line(*each) for each in lines)
    for phase, phase_step, steps, kept in (
        ("rl", 2, 9, 12),
        ("preference", 2, 6, 8),
        ("sft", 4, 4, 6),
        ("sft", 1, 1, 2),
    ):
        path.write_bytes(content)
        position = {"phase": phase, "phase_step": phase_step, "group": 0, "version": 0, "kl_beta": None}
        repair_metrics(path, checkpoint(tmp_path, steps, position=position))
        assert lines_of(path) == lines[:kept]
