"""What docs/run-folder.md says that runs leave: their files, and the keys of summary.json and metrics.jsonl."""

import json
import re
from functools import cache
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "run-folder.md"


@cache
def tables() -> dict[str, list[str]]:
    """Names in the first columns of the page's tables, by their heading; … stands for any text."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^##+ ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| (`.+?`) \|", part, re.MULTILINE)
        found[part.split("\n", 1)[0].strip()] = [name for row in rows for name in re.findall("`([^`]+)`", row)]
    found["reward"] = found["preference"]
    return found


def check_keys(heading: str, keys: set[str]) -> None:
    """Fails where a line of a phase, or the summary, has keys that the page does not list."""
    listed = tables()[heading] + (tables()["metrics.jsonl"] if heading != "summary.json" else [])
    patterns = [re.escape(name).replace("…", ".+") for name in listed]
    unknown = {key for key in keys if not any(re.fullmatch(pattern, key) for pattern in patterns)}
    assert not unknown, f"docs/run-folder.md does not say under {heading} what {sorted(unknown)} are"


def check_run(run: Path) -> None:
    """Fails where a run left files, or wrote keys, that the page does not list."""
    unknown = {path.name for path in run.iterdir()} - set(tables()["Files"])
    assert not unknown, f"docs/run-folder.md does not say under Files what {sorted(unknown)} are"
    check_keys("summary.json", set(json.loads((run / "summary.json").read_text())))
    for line in (run / "metrics.jsonl").read_text().splitlines():
        check_keys(json.loads(line)["phase"], set(json.loads(line)))
