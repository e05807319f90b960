"""docs/studies.md and docs/paper.md: commands run, and files and functions that a row links are there."""

import re
import shlex
from pathlib import Path

import pytest

from tests.cluster.cli_process import lockstep, overrides

DOCS = Path(__file__).parents[4] / "docs"
SMALL = {
    "generation": overrides("samples=2", "problems=1", "max_new_tokens=2", "temperature=1", "seeds=3"),
    "step": [],
    "sycophancy": overrides("problems=2", "max_new_tokens=2"),
    "cache": overrides("context=8,16", "steps=1"),
    "--list": [],
}
COMMANDS = re.findall(r"^    (lockstep study .+)$", (DOCS / "studies.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_on_a_small_model_and_with_small_settings(command: str, tiny_folder: Path, tmp_path: Path) -> None:
    words = [str(tiny_folder) if word.startswith("smollm2") else word for word in shlex.split(command)[1:]]
    result = lockstep(*words, *SMALL[words[1]], "--dtype", "float32", "--out", str(tmp_path / "study"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "study" / "table.md").exists() == (words[1] != "--list")


def test_rows_of_the_paper_are_whole_and_link_what_exists() -> None:
    rows = [line for line in (DOCS / "paper.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert rows
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5, row
        assert all(cells), row
        for target in re.findall(r"\]\(([^)]+)\)", row):
            assert (DOCS / target).is_file(), f"docs/paper.md links {target}"
        for target, function in re.findall(r"\]\(([^)]+)\) `(\w+)`", cells[2]):
            assert re.search(rf"(def|class) {function}\b", (DOCS / target).read_text()), f"{target} has no {function}"
        assert "](" in cells[2]
        assert "](" in cells[3]
