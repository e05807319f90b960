"""Code travels, and nothing that lies beside it."""

import os
from pathlib import Path

import pytest

from lockstep.cluster.jobs.package import BadModule, TooLarge, check_size, copy_functions, copy_modules, copy_package
from lockstep.cluster.recipe.load import parse


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_package_is_code_and_what_code_reads(tmp_path: Path) -> None:
    copy_package(tmp_path)
    found = files(tmp_path)
    wanted = ("cluster/cli.py", "py.typed", "recipes/quickstart.toml", "model/ops/cpu/kernels.c")
    assert found >= {f"lockstep/{name}" for name in wanted}
    assert {Path(name).suffix for name in found} == {".py", ".typed", ".toml", ".c", ".j2", ".sh"}
    assert not [name for name in found if "__pycache__" in name]
    check_size(tmp_path)


def test_a_module_travels_with_those_beside_it_that_it_imports(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    write(here, own_dot_py="import json, numpy, helper\nfrom parts.deep import x\nfrom lockstep import train\n")
    write(here, helper_dot_py="import own\n", other_dot_py="", parts__deep_dot_py="", parts__rows_dot_jsonl="{}")
    write(here, _dot_env="TOKEN=secret", data_dot_bin="0" * 1000, parts___dot_env="")
    assert copy_modules(["own"], there, [str(here)]) == []
    assert files(there) == {"own.py", "helper.py", "parts/deep.py"}


def test_what_is_installed_stays_and_what_is_nowhere_is_said(tmp_path: Path) -> None:
    import sys

    assert copy_modules(["numpy", "json", "sys_of_nobody", "lockstep"], tmp_path, sys.path) == ["sys_of_nobody"]
    assert files(tmp_path) == set()


def test_a_module_that_is_no_python_is_refused(tmp_path: Path) -> None:
    write(tmp_path, own_dot_py="def f(:\n")
    with pytest.raises(BadModule, match=r"own\.py, which would travel with the job, is no Python"):
        copy_modules(["own"], tmp_path / "there", [str(tmp_path)])


def test_functions_of_a_recipe_travel_and_those_of_files_become_modules(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    write(
        here, graders_dot_py="import helper\ndef f(): ...\n", helper_dot_py="", mine__games_dot_py="", other_dot_py=""
    )
    recipe = parse(
        {
            "environment": {"kind": "mine.games:Chess"},
            "task": {"grader": f"{here}/graders.py:f", "filter": "absent:keep"},
            "reward": {"functions": [{"function": f"{here}/graders.py:g"}, {"function": "mine.games:h"}]},
        }
    )
    sent, missing = copy_functions(recipe, there, [str(here)])
    assert missing == ["absent"]
    assert files(there) == {"graders.py", "helper.py", "mine/games.py"}
    assert (sent.task.grader, sent.task.filter) == ("graders:f", "absent:keep")
    assert [term.function for term in sent.reward.functions] == ["graders:g", "mine.games:h"]
    assert sent.environment == recipe.environment
    assert copy_functions(parse({"environment": {"kind": "tools"}}), there, [str(here)])[1] == []


@pytest.mark.parametrize("name", ["json", "numpy", "not a name"])
def test_a_file_whose_name_is_taken_does_not_travel(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("")
    with pytest.raises(BadModule, match=rf"{name}\.py would travel with the job as the module {name}"):
        copy_functions(parse({"task": {"grader": f"{tmp_path}/{name}.py:f"}}), tmp_path / "there", [])


def test_two_files_of_one_name_do_not_travel_together(tmp_path: Path) -> None:
    write(tmp_path, a__same_dot_py="x = 1", b__same_dot_py="x = 2")
    task = {"grader": f"{tmp_path}/a/same.py:f", "filter": f"{tmp_path}/b/same.py:f"}
    with pytest.raises(BadModule, match=r"another has that name: rename it"):
        copy_functions(parse({"task": task}), tmp_path / "there", [])


def test_too_much_is_refused_with_the_largest_and_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, small_dot_py="x", big__large_dot_so="")
    os.truncate(tmp_path / "big" / "large.so", 101 << 20)
    with pytest.raises(TooLarge) as caught:
        check_size(tmp_path)
    assert str(caught.value).startswith(
        "the code that would travel has 101 MiB, and a Ray head takes 100: the largest are big/large.so (101 MiB), "
    )
    assert "install such modules on the cluster's nodes" in str(caught.value)
