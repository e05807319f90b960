"""The wheel has every file of the package and the recipes, and its command works from any folder.

Needs pip and setuptools in the environment, the package's dependencies, and the weights of the quickstart, all of which
`make test` installs. Nothing is downloaded.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lockstep

ROOT = Path(__file__).parents[1]
ROOMS = ("cluster", "data", "distributed", "model", "recipes", "rl")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
ALONE = ("--no-deps", "--no-index")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, since setuptools leaves files beside what it builds."""
    tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in (*ROOMS, "src"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    subprocess.run([*PIP, "wheel", *ALONE, "--no-build-isolation", "--wheel-dir", folder, tree], check=True)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as the wheel installs it, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([*PIP, "install", *ALONE, "--target", folder, wheel], check=True)
    return folder


def output(installed: Path, folder: Path, *command: str) -> str:
    """What a command prints in an empty folder, with the installed package before that of the repository."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(folder.iterdir())
    return done.stdout


def test_it_has_every_file_of_the_package(wheel: Path) -> None:
    files = {path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file() and path.suffix != ".pyc"}
    named = {f"lockstep/{path.relative_to(ROOT)}" for path in files}
    own = {f"lockstep/{name}" for name in ("__init__.py", "__main__.py", "py.typed")}
    assert {"lockstep/model/ops/cpu/kernels.c", "lockstep/recipes/quickstart.toml"} <= named
    found = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lockstep/")}
    assert found == named | own


def test_its_command_works_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = output(installed, tmp_path, sys.executable, "-c", "import lockstep; print(lockstep.__file__)")
    assert where == f"{installed}/lockstep/__init__.py\n"
    script = str(installed / "bin" / "lockstep")
    assert output(installed, tmp_path, script, "--version") == f"lockstep {lockstep.__version__}\n"
    recipes = output(installed, tmp_path, script, "recipe", "list").splitlines()
    assert [line.split()[0] for line in recipes] == sorted(path.stem for path in ROOT.glob("recipes/*.toml"))
    assert f'run = "{tmp_path}/runs/quickstart"' in output(installed, tmp_path, script, "recipe", "show", "quickstart")
    assert "rl.group_size = 8\n" in output(installed, tmp_path, script, "recipe", "keys")
    checked = output(installed, tmp_path, script, "recipe", "check", "quickstart")
    assert checked.startswith("quickstart can run with processes 2 policy, 1 rollout, 1 verifier")
