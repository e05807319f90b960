"""What is inside of a trace."""

import json
from pathlib import Path


def steps_and_kinds(path: Path) -> tuple[int, dict[str, bool]]:
    """How many steps a trace shows, and whether there are forward, backward and collective operations in it."""
    names = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
    begins = {"forward": "aten::linear", "backward": "autograd::engine::evaluate_function", "collective": "gloo:"}
    found = {kind: any(name.startswith(start) for name in names) for kind, start in begins.items()}
    return len({name for name in names if name.startswith("ProfilerStep#")}), found
