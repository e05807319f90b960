"""Repairs metrics.jsonl before a run goes on: drops lines that are torn, or of steps that will be taken again."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.cluster.atomic_files import replace_file
from lockstep.cluster.launch.resume import position_of
from lockstep.cluster.records.tables import Record
from lockstep.distributed.checkpoint.manager import Checkpoint

STEPS = ("pretrain", "sft", "preference", "reward", "rl")
"""Phases whose lines are of steps, a line each; others are of what was measured in between."""


@dataclass(frozen=True)
class Repair:
    """What was dropped, and what is missing of the steps that stand."""

    repeated: int
    """Steps that were taken after the checkpoint, and are taken again."""
    torn: int
    """Lines that could not be read."""
    phase: str
    missing: tuple[range, ...]
    """Runs of steps of the present phase that have no line."""

    @property
    def sentences(self) -> list[str]:
        """What a user should know."""
        said = []
        if self.repeated:
            said.append(f"{_counted(self.repeated, 'step')} after the checkpoint will be taken again")
        if self.torn:
            said.append(f"dropped {_counted(self.torn, 'line')} of metrics.jsonl that could not be read")
        for steps in self.missing:
            last = f" to {steps[-1]}" if len(steps) > 1 else ""
            which = f"{self.phase} {steps[0]}{last}"
            said.append(f"metrics.jsonl has no line of {which}: its curves have a gap there, the run has none")
        return said


def repair_metrics(path: Path, last: Checkpoint | None) -> Repair:
    """Rewrite a run's metrics without lines that cannot be read, or are of steps after the checkpoint `last`.

    Args:
        last: None for a run that begins again with nothing saved; what was measured before its first step stands.
    """
    stands, phase, steps = _standing(last)
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    parsed = [(line, _parsed(line)) for line in lines if line.strip(b"\0 \r")]
    readable = [(line, record) for line, record in parsed if record is not None]
    kept = [(line, record) for line, record in readable if stands(record)]
    if len(kept) < len(parsed) or lines[-1:] not in ([], [b""]):
        replace_file(path, b"".join(line + b"\n" for line, _ in kept))
    there, before = ({_step(record) for _, record in some} for some in (kept, readable))
    repeated = sum(step[0] in STEPS for step in before - there)
    return Repair(repeated, len(parsed) - len(readable), phase, tuple(_gaps(phase, steps, there)))


def _standing(last: Checkpoint | None) -> tuple[Callable[[Record], bool], str, int]:
    """Whether a line is of the steps that a checkpoint has taken; its phase, and the steps of that so far."""
    if last is None:
        return lambda line: line["step"] == 0, "", 0
    manifest = last.manifest
    if "position" not in manifest:
        spikes = {spike for _, spike in manifest.get("rewinds", ())}
        done = int(manifest["step"])
        return (
            lambda line: line["step"] in spikes if line["phase"] == "rewind" else line["step"] <= done,
            "pretrain",
            done,
        )
    at = position_of(last)
    order = STEPS.index(at.phase)

    def stands(line: Record) -> bool:
        if line["phase"] not in STEPS:
            return bool(line["step"] <= at.steps)
        return (STEPS.index(line["phase"]), line["step"]) <= (order, at.phase_step)

    return stands, at.phase, at.phase_step


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None where it is torn, or overwritten."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    is_line = isinstance(found, dict) and isinstance(found.get("phase"), str) and isinstance(found.get("step"), int)
    return found if is_line else None


def _step(record: Record) -> tuple[str, int]:
    return record["phase"], record["step"]


def _gaps(phase: str, steps: int, there: set[tuple[str, int]]) -> Sequence[range]:
    """Runs of the steps 1 … steps that are not there."""
    found: list[range] = []
    for step in range(1, steps + 1):
        if (phase, step) in there:
            continue
        if found and found[-1].stop == step:
            found[-1] = range(found[-1].start, step + 1)
        else:
            found.append(range(step, step + 1))
    return found


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
