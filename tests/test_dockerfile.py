"""The Dockerfile builds as the Makefile does, from the files that it copies; there may be no Docker where tests run."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
echo "$@" >> {log}
"""


def instructions() -> list[tuple[str, list[str]]]:
    """Instructions with their words."""
    lines = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    return [(line.split()[0], shlex.split(line)[1:]) for line in lines if line and not line.startswith("#")]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with what the Dockerfile copies."""
    for name, words in instructions():
        if name == "COPY":
            *sources, target = words
            for source in sources:
                place = tmp_path / "image" / target
                if (ROOT / source).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
                    shutil.copytree(ROOT / source, place, symlinks=True, ignore=ignored)
                else:
                    place.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, place)
    return tmp_path / "image"


def test_it_installs_by_the_makefile_what_the_makefile_installs(copied: Path, tmp_path: Path) -> None:
    (command,) = [words for name, words in instructions() if name == "RUN" and "make" in words[:1]]
    own = tmp_path / "venv"
    (own / "bin").mkdir(parents=True)
    python = own / "bin" / "python"
    python.write_text(PYTHON.format(log=tmp_path / "log"))
    python.chmod(0o755)
    (environment,) = [words for name, words in instructions() if name == "ENV"]
    place = dict(word.split("=", 1) for word in environment)["VIRTUAL_ENV"]
    done = [word.replace(place, str(own)) for word in command]
    subprocess.run(done, cwd=copied, check=True, capture_output=True)
    assert (own / "installed").exists()
    steps = re.search(r"^\$\(VENV\)/installed: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert steps
    expected = [shlex.split(line)[1:] for line in steps[1].splitlines() if "$(PIP)" in line]
    ran = [line.partition("--constraint constraints.txt ")[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert ran == [" ".join(words) for words in expected]
    assert len(ran) == 3


def test_what_is_copied_is_the_package(copied: Path) -> None:
    files = {path.relative_to(copied) for path in copied.rglob("*.py")}
    rooms = ("data", "distributed", "model", "rl", "cluster")
    wanted = {path.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("*.py")}
    assert wanted <= files
    for link in (ROOT / "src/lockstep").iterdir():
        if link.is_symlink():
            assert (copied / "src/lockstep" / link.name).exists()
