"""Parquet tables of rollouts, evaluations and comparisons: their columns and rows."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lockstep.rl.types import Advantaged, Judged, turns


def answer_row(judged: Judged) -> dict[str, Any]:
    """The row of an evaluation's completion, in EVALUATION_COLUMNS."""
    rollout, verdict = judged.rollout, judged.verdict
    task = {"task": rollout.prompt.task} if rollout.prompt.task else {}
    return task | {
        "problem": rollout.prompt.index,
        "prompt": rollout.prompt.text,
        "answer": rollout.prompt.answer,
        "completion": rollout.text,
        "outcome": str(verdict.outcome),
        "reason": verdict.reason,
    }


def rollout_row(step: int, number: int, completion: Advantaged) -> dict[str, Any]:
    """The row of a rollout of a step, in ROLLOUT_COLUMNS."""
    rollout = completion.rollout
    return answer_row(completion) | {
        "step": step,
        "group": rollout.prompt.index,
        "sample": number,
        "reward": completion.reward.total,
        "weight_version": rollout.weight_version,
        "weight_versions": np.asarray(rollout.weight_versions),
        "finish_reason": rollout.finish_reason,
        "prompt_tokens": len(rollout.prompt.tokens),
        "completion_tokens": len(rollout.tokens),
        "turns": turns(rollout),
        "advantage": completion.advantage,
    }


Record: TypeAlias = dict[str, Any]
Row: TypeAlias = Mapping[str, object]

ROLLOUT_COLUMNS: dict[str, pa.DataType] = {
    "step": pa.int64(),
    "group": pa.int64(),
    "sample": pa.int64(),
    "prompt": pa.string(),
    "completion": pa.string(),
    "answer": pa.string(),
    "reward": pa.float64(),
    "outcome": pa.string(),
    "reason": pa.string(),
    "weight_version": pa.int64(),
    "weight_versions": pa.list_(pa.int64()),
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int64(),
    "completion_tokens": pa.int64(),
    "advantage": pa.float64(),
}
EVALUATION_COLUMNS: dict[str, pa.DataType] = {
    "problem": pa.int64(),
    "prompt": pa.string(),
    "answer": pa.string(),
    "completion": pa.string(),
    "outcome": pa.string(),
    "reason": pa.string(),
}
COMPARISON_COLUMNS: dict[str, pa.DataType] = {
    "index": pa.int64(),
    "prompt": pa.list_(pa.int64()),
    "completions": pa.list_(pa.list_(pa.int64())),
    "reference_logp": pa.list_(pa.list_(pa.float32())),
}


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder in order, without those that are still being written."""
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))


def read_rows(path: Path) -> list[Record]:
    """Read a Parquet file as a list of rows."""
    rows: list[Record] = pq.read_table(path).to_pylist()
    return rows


def write_table(path: Path, rows: Sequence[Row], columns: Mapping[str, pa.DataType]) -> Path:
    """Write rows to a Parquet file atomically, with the given columns and those that rows have beyond them."""
    return write_arrow(path, to_arrow(rows, columns))


def to_arrow(rows: Sequence[Row], columns: Mapping[str, pa.DataType]) -> pa.Table:
    """Rows as an Arrow table, with the given columns and those that rows have beyond them."""
    names = list(dict.fromkeys([*columns, *(key for row in rows for key in row)]))
    return pa.table({n: _column((row.get(n) for row in rows), columns.get(n)) for n in names})


def write_arrow(path: Path, table: pa.Table) -> Path:
    """Write an Arrow table to a Parquet file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(table, temporary, compression="zstd")
    temporary.replace(path)
    return path


def _column(values: Iterable[object], kind: pa.DataType | None) -> pa.Array:
    """One column; text columns take anything that str can show, because answers may be numbers."""
    if kind == pa.string():
        return pa.array([None if value is None else str(value) for value in values], type=kind)
    return pa.array(list(values), type=kind)
