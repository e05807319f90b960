"""`lockstep study`: what it leaves, that it goes on where it was, and what it refuses before work begins."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cli_process import lockstep, refused

SMALL = ["--dtype", "float32", "--set", "temperature=0.5,2", "--set", "samples=3", "--set", "max_new_tokens=12"]


@pytest.fixture(scope="module")
def arguments(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    problems = tmp_path_factory.mktemp("problems") / "sums.jsonl"
    problems.write_text("".join(json.dumps({"question": f"{a} + 1 =", "answer": str(a + 1)}) + "\n" for a in range(4)))
    return ["study", "generation", str(tiny_folder), "--file", str(problems), *SMALL]


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "whole"
    result = lockstep(*arguments, "--out", str(folder))
    assert result.exit_code == 0, result.output
    assert (folder / "table.md").read_text() in result.stdout
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]


def test_a_study_leaves_a_line_for_each_place_and_seed_a_table_and_plots(whole: Path) -> None:
    found = rows(whole)
    assert [(row["place"], row["seed"]) for row in found] == [(place, seed) for place in (0.5, 2) for seed in range(3)]
    entropy = {row["place"]: row["values"]["entropy"] for row in found}
    assert entropy[0.5] < entropy[2]
    table = (whole / "table.md").read_text()
    assert "| entropy, nats per token | 0.5 |" in table
    assert table.count("\n") == 2 + 8 * 2
    svg = (whole / "entropy.svg").read_text()
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert svg.count('class="whisker"') == 2


def test_an_interrupted_study_goes_on_and_other_settings_are_measured_anew(
    whole: Path, arguments: list[str], tmp_path: Path
) -> None:
    kept = (whole / "measurements.jsonl").read_text().splitlines(keepends=True)
    marked = kept[0].replace('"length": ', '"length": 1')
    (tmp_path / "measurements.jsonl").write_text("".join([marked, *kept[1:4]]) + kept[4][:30])
    assert lockstep(*arguments, "--out", str(tmp_path)).exit_code == 0
    assert (tmp_path / "measurements.jsonl").read_text() == "".join([marked, *kept[1:]])
    assert lockstep(*arguments, "--out", str(tmp_path), "--set", "samples=2").exit_code == 0
    assert len(rows(tmp_path)) == 12
    assert len({row["settings"] for row in rows(tmp_path)}) == 2


def test_what_cannot_be_studied_is_refused_before_work_begins(
    arguments: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    folder = ["--out", str(tmp_path / "new")]
    assert "did you mean 'generation'" in refused("study", "generatoin", str(tiny_folder), *folder)
    assert "give one or more checkpoints" in refused("study", "step", *folder)
    assert "nowhere" in refused(*arguments[:3], "nowhere", *arguments[3:], *folder)
    assert "given twice" in refused(*arguments[:3], str(tiny_folder), *arguments[3:], *folder)
    assert "--set seeds sets nothing" in refused(*arguments, "--set", "seeds", *folder)
    assert "needs 2009 positions" in refused("study", "cache", str(tiny_folder), "--set", "context=2000", *folder)
    assert not (tmp_path / "new").exists()
    (tmp_path / "measurements.jsonl").write_text('{"mine": 1}\n')
    assert "it is no study's: give another folder" in refused(*arguments, "--out", str(tmp_path))


def test_steps_and_caches_are_studied_side_by_side(tiny_folder: Path, tmp_path: Path) -> None:
    options = ["--dtype", "float32", "--out", str(tmp_path)]
    other = tmp_path / "other"
    other.symlink_to(tiny_folder)
    assert lockstep("study", "step", str(tiny_folder), str(other), *options).exit_code == 0
    assert (tmp_path / "entropy.svg").read_text().count('<path class="line ') == 4  # two lines, and their legend
    small = ["--set", "context=16,64", "--set", "steps=2"]
    result = lockstep("study", "cache", str(tiny_folder), *small, *options)
    assert result.exit_code == 0, result.output
    assert "| exponent of attention, cached | all | 1 | 1 to 1 | 3 |" in result.stdout


def test_studies_are_listed_with_what_they_are() -> None:
    listed = lockstep("study", "--list").stdout
    assert "cache       KV cache: operations and seconds" in listed
    assert "generation  Temperature sweep: " in listed
