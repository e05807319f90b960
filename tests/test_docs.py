"""Documents, docstrings and strings name files and modules that exist; docs/log.md is history and may not."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("data", "distributed", "model", "rl", "cluster", "recipes", "tests")
PAGES = [*ROOT.glob("*.*"), *ROOT.glob("docs/*"), *ROOT.glob("benchmarks/**/*")]
FILES = [*PAGES, *(path for folder in FOLDERS for path in ROOT.joinpath(folder).rglob("*"))]
WRITTEN = {"/recipe.toml", "/table.md"}
"""By runs and studies."""
KNOWN = {f"/{path.relative_to(ROOT)}" for path in FILES} | WRITTEN


def prose(path: Path) -> str:
    if path.suffix != ".py":
        return path.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, documented)]
    return "\n".join(ast.get_docstring(node) or "" for node in nodes)


def unknown(path: Path) -> Iterator[str]:
    for name in re.findall(
        r"(?<![\w:/.*-])(?:\.\./)?([\w/-]+\.(?:py|c|toml|md|svg|png))\b(?!/|:[A-Za-z])", prose(path)
    ):
        if not name.startswith(("megatron/", "deepspeed/")) and not any(file.endswith(f"/{name}") for file in KNOWN):
            yield name
    text = path.read_text()
    imports = re.findall(r"from (lockstep[\w.]*) import ([\w, ]+)", text)
    imported = [f"{module}.{name.strip()}" for module, names in imports for name in names.split(" as ")[0].split(",")]
    for dotted in [*imported, *re.findall(r"(?<![/\w])lockstep(?:\.[a-z]\w*)+", text)]:
        place = ROOT.joinpath(*dotted.split(".")[1:])
        source = ROOT / "src/lockstep/__init__.py" if place.parent == ROOT else place.parent.with_suffix(".py")
        defined = source.exists() and re.search(rf"\b{place.name}\b", source.read_text())
        if not (place.exists() or place.with_suffix(".py").exists() or defined):
            yield dotted


def test_documents_docstrings_and_strings_name_what_exists() -> None:
    texts = [path for path in FILES if path.suffix in {".md", ".py"} and path.name != "log.md"]
    assert not {(str(path.relative_to(ROOT)), name) for path in texts for name in unknown(path)}
