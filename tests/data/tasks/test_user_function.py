"""Functions of the user's are loaded from modules and files, and called with the arguments that they name."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.data.tasks.user_function import BadFunction, accepting, check, function_name, load


@pytest.fixture(autouse=True)
def _same_path() -> Iterator[None]:
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.mark.parametrize(
    ("text", "is_file"),
    [("a.b:f", False), ("f.py:g", True), ("/x y/f.py:g", True), ("../f.py:g", True), ("C:/x/f.py:g", True)],
)
def test_these_name_functions(text: str, is_file: bool) -> None:
    name = function_name(text)
    assert name is not None
    assert (str(name), name.is_file) == (text, is_file)


@pytest.mark.parametrize("text", ["", "gym", "a.b", "a:", ":f", "a b:f", "f.py", "s3://x/f.py:g", "a:f()", "x.txt/:f"])
def test_these_do_not(text: str) -> None:
    assert function_name(text) is None


def test_a_file_is_loaded_once_with_its_neighbours_and_in_the_way_of_nothing_installed(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("factor = 3\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')\n")
    source = "import json\nfrom dataclasses import dataclass\nfrom neighbour_of_mine import factor\ncalls = []\n"
    source += "@dataclass\nclass Point:\n    x: int\n"
    source += (
        "def times(x):\n    calls.append(x)\n    return Point(factor * x).x\ndef count():\n    return len(calls)\n"
    )
    (tmp_path / "numpy.py").write_text(source)  # a name that an installed package has
    times, count = load(f"{tmp_path}/numpy.py:times"), load(f"{tmp_path}/numpy.py:count")
    assert (times(2), count()) == (6, 1)
    import numpy as np

    assert np.ones(2).sum() == 2


@pytest.mark.parametrize(
    ("source", "function", "said"),
    [
        ("def f(:\n", "f", r"cannot be loaded \(SyntaxError"),
        ("import nothing_of_this_name\n", "f", r"cannot be loaded \(ModuleNotFoundError: No module named 'nothing_of"),
        ("x = 1\n", "f", r"cannot be loaded \(AttributeError: .* has no attribute 'f'"),
        ("f = 1\n", "f", "is int, and has to be a function"),
        ("raise RuntimeError('no GPU')\n", "f", r"RuntimeError: no GPU"),
        (None, "f", r"cannot be loaded \(FileNotFoundError"),
    ],
)
def test_what_cannot_be_loaded_says_why_each_time(tmp_path: Path, source: str | None, function: str, said: str) -> None:
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    for _ in range(2):
        with pytest.raises(BadFunction, match=said):
            load(f"{tmp_path}/mine.py:{function}")


def test_a_module_of_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_of_mine").mkdir()
    (tmp_path / "module_of_mine" / "deep.py").write_text("def f(): return 5\n")
    monkeypatch.chdir(tmp_path)
    assert load("module_of_mine.deep:f")() == 5


def test_arguments_are_given_by_name() -> None:
    def some(b: int, *, a: int = 0) -> tuple[int, int]:
        return a, b

    def rest(**values: int) -> dict[str, int]:
        return values

    def strange(b: int, /) -> int:
        return b

    values = {"a": 1, "b": 2, "c": 3}
    assert accepting(some, ("a", "b"), "m:some")(values) == (1, 2)
    assert accepting(rest, ("a", "b"), "m:rest")(values) == {"a": 1, "b": 2}
    assert accepting(lambda z=5, *more: z, ("a",), "m:none")(values) == 5
    with pytest.raises(BadFunction, match=r"m:some takes b, and is called with a, c by name"):
        accepting(some, ("a", "c"), "m:some")
    with pytest.raises(BadFunction, match=r"m:strange takes b, and is called with b by name"):
        accepting(strange, ("b",), "m:strange")


def test_a_check_imports_nothing_here(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import sys\nsys.setrecursionlimit(77)\ndef f(answer): ...\ndef g(other): ...\n")
    before = set(sys.modules)
    check(f"{tmp_path}/mine.py:f", ("answer",))
    with pytest.raises(BadFunction, match=r"mine.py:g takes other, and is called with answer by name$"):
        check(f"{tmp_path}/mine.py:g", ("answer",))
    (tmp_path / "mine.py").write_text("import os\nos._exit(7)\n")
    with pytest.raises(BadFunction, match=r"mine.py:f cannot be loaded: it ended the process with exit code 7"):
        check(f"{tmp_path}/mine.py:f")
    assert not {name for name in set(sys.modules) - before if name.startswith("mine")}
    assert sys.getrecursionlimit() > 77


def test_the_loader_needs_the_standard_library_alone() -> None:
    program = (
        "import sys; import lockstep.data.tasks.user_function; print('numpy' in sys.modules or 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "False"
