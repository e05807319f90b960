"""Every path of a recipe is marked as one in its type, and means the submitter's file wherever the recipe is read."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lockstep.cluster.recipe.load import load_recipe, parse, to_toml
from lockstep.cluster.recipe.paths import (
    functions,
    input_paths,
    is_function,
    is_path,
    is_path_or_name,
    missing,
    with_absolute_paths,
)
from lockstep.cluster.recipe.schema import Recipe

TASKS = ("task", "tasks", "evaluation.tasks")
PATHS = {
    "run",
    "checkpoints.at",
    *(f"{section}.{key}" for section in TASKS for key in ("held_out_from", "pass_rates")),
    "preference.source",
    "rollout.python",
    "supervised.source",
    "pretrain.data.blend.path",
    "pretrain.retain.old.path",
}
PATHS_OR_NAMES = {
    "model.source",
    "model.tokenizer",
    *(f"{section}.generator" for section in TASKS),
    "roles.reward.source",
    "roles.teacher.source",
}
FUNCTIONS = {
    "environment.kind",
    *(
        f"{section}.{key}"
        for section in TASKS
        for key in ("generator", "held_out_from", "filter", "grader", "curriculum")
    ),
    "reward.functions.function",
    "tasks.reward.functions.function",
}
CALLED_PATHS = re.compile(
    r"(.*_)?(path|paths|source|sources|folder|folders|file|files|dir|at|from|tokenizer|generator)"
)
SAID_TO_BE_PATHS = re.compile(r"\b(folder|file|files|path|checkpoint or|URL)\b")
NO_PATHS = {*(f"{section}.fields" for section in TASKS), "model.config.family", "verifier.llm_judge.url"}
"""Whose descriptions speak of files that they do not name."""


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field of a schema by its key, those of the elements of lists included."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        for part in parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from fields(part, f"{prefix}{name}.")


def parts(annotation: object) -> Iterator[object]:
    """A type and all types inside of it."""
    yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from parts(inner)


def test_every_field_that_is_called_or_said_to_be_a_path_is_marked_as_one() -> None:
    for key, field in fields(Recipe):
        holds_text = any(part is str for part in parts(field.annotation))
        suspicious = CALLED_PATHS.fullmatch(key.rpartition(".")[2]) or SAID_TO_BE_PATHS.search(field.description or "")
        if holds_text and suspicious and key not in NO_PATHS:
            assert is_path(field) or is_path_or_name(field) or is_function(field), (
                f"{key}: mark it as cluster/recipe/paths.py says"
            )


def test_these_are_marked() -> None:
    assert {key for key, field in fields(Recipe) if is_path(field)} == PATHS
    assert {key for key, field in fields(Recipe) if is_path_or_name(field)} == PATHS_OR_NAMES
    assert {key for key, field in fields(Recipe) if is_function(field)} == FUNCTIONS


def test_functions_of_files_are_the_submitters_and_those_of_modules_stay(here: Path) -> None:
    values = {
        "environment": {"kind": "games.py:Chess"},
        "task": {"grader": "mine:grade", "filter": "../filters.py:keep", "generator": "own.py:make"},
        "reward": {"functions": [{"function": "judge/style.py:rate"}, {"function": "a.b:c"}]},
    }
    recipe = with_absolute_paths(parse(values))
    assert dict(functions(recipe)) == {
        "environment.kind": f"{here}/games.py:Chess",
        "task.generator": f"{here}/own.py:make",
        "task.filter": f"{here.parent}/filters.py:keep",
        "task.grader": "mine:grade",
        "reward.functions[0].function": f"{here}/judge/style.py:rate",
        "reward.functions[1].function": "a.b:c",
    }
    assert not input_paths(recipe).keys() - {"model.source"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model beside it."""
    folder = tmp_path / "submit"
    (tmp_path / "models" / "plain").mkdir(parents=True)
    (folder / "tokens").mkdir(parents=True)
    (folder / "tokens" / "tokenizer").mkdir()
    (folder / "judge").mkdir()
    (folder / "latest").symlink_to("judge")
    monkeypatch.chdir(folder)
    return folder


def test_paths_of_pretraining_are_the_submitters(here: Path) -> None:
    (here / "pre.toml").write_text(
        'checkpoints = { at = "saves/{name}" }\nmodel = { tokenizer = "../models/plain" }\n'
        '[pretrain]\nsteps = 1\ndata = { blend = [{ path = "tokens/corpus" }, { path = "plain", weight = 2.0 }] }\n'
    )
    sent = load_recipe(here / "pre.toml", ["name=mine"])
    assert sent.pretrain is not None
    assert sent.pretrain.data is not None
    assert sent.model.tokenizer == str(here.parent / "models" / "plain")
    assert [part.path for part in sent.pretrain.data.blend] == [str(here / "tokens" / "corpus"), str(here / "plain")]
    assert sent.pretrain.data.blend[1].weight == 2
    assert sent.run == str(here / "runs" / "mine")
    assert sent.checkpoints.at == str(here / "saves" / "{name}")
    assert str(sent.saves) == str(here / "saves" / "mine")


@pytest.mark.parametrize(
    ("key", "given", "sent"),
    [
        ("model.source", "judge", "{here}/judge"),
        ("model.source", "latest", "{here}/latest"),
        ("model.source", "./judge", "{here}/judge"),
        ("model.source", "../models/gone", "{above}/models/gone"),
        ("model.source", "runs/alignment/start", "{here}/runs/alignment/start"),
        ("model.source", "weights.gguf", "{here}/weights.gguf"),
        ("model.source", "/models/plain", "/models/plain"),
        ("model.source", "smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("model.source", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("model.source", "s3://bucket/models/plain", "s3://bucket/models/plain"),
        ("model.source", '{"driver": "s3", "bucket": "b"}', '{"driver": "s3", "bucket": "b"}'),
        ("model.tokenizer", "tokens/tokenizer", "{here}/tokens/tokenizer"),
        ("model.tokenizer", "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("roles.reward.source", "judge", "{here}/judge"),
        ("roles.teacher.source", "../models/plain/", "{above}/models/plain"),
        ("roles.teacher.source", "owner/teacher", "owner/teacher"),
        ("preference.source", "pairs.jsonl", "{here}/pairs.jsonl"),
        ("preference.source", "pairs", "{here}/pairs"),
        ("preference.source", "hf://datasets/owner/name/train-*.parquet", "hf://datasets/owner/name/train-*.parquet"),
        ("task.generator", "chain_sum", "chain_sum"),
        ("task.generator", "train.jsonl.gz", "{here}/train.jsonl.gz"),
        ("task.held_out_from", "test.parquet", "{here}/test.parquet"),
        ("task.held_out_from", "", ""),
        ("checkpoints.at", "saves", "{here}/saves"),
        ("checkpoints.at", "{name}/saves", "{here}/{name}/saves"),
        ("checkpoints.at", "s3://bucket/{name}", "s3://bucket/{name}"),
        ("checkpoints.at", "", ""),
        ("run", "..", "{above}"),
        ("environment.kind", "judge:Tools", "judge:Tools"),
    ],
)
def test_paths_are_made_absolute_and_names_are_not(key: str, given: str, sent: str, here: Path) -> None:
    for place, path in (("{here}", here), ("{above}", here.parent)):
        sent = sent.replace(place, str(path))
    recipe = with_absolute_paths(parse({}, [f"{key}={json.dumps(given)}"]))
    found: object = recipe
    for part in key.split("."):
        found = getattr(found, part)
    assert found == sent
    assert with_absolute_paths(recipe) == recipe


def test_a_recipe_means_the_same_files_in_another_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = with_absolute_paths(parse({"model": {"source": "judge"}, "preference": {"source": "pairs.jsonl"}}))
    (here.parent / "sent.toml").write_text(to_toml(recipe))
    monkeypatch.chdir("/")
    assert load_recipe(here.parent / "sent.toml") == recipe


@pytest.mark.parametrize(
    ("at", "place"),
    [
        ("/saves/{name}", "/saves/mine"),
        ("file:///saves/{name}/", "file:///saves/mine"),
        ('{"driver": "file", "path": "/saves/{name}/x"}', "file:///saves/mine/x"),
    ],
)
def test_checkpoints_go_where_the_name_says(at: str, place: str) -> None:
    assert str(parse({"name": "mine", "checkpoints": {"at": at}}).saves) == place


def test_what_a_recipe_reads_is_found_by_key_and_what_it_writes_is_left_out(tmp_path: Path) -> None:
    for name in ("model", "text.bin", "text.idx"):
        (tmp_path / name).touch()
    values = {
        "run": f"{tmp_path}/new",
        "checkpoints": {"at": f"{tmp_path}/elsewhere"},
        "model": {"source": f"{tmp_path}/model", "tokenizer": "smollm2-135m-instruct"},
        "pretrain": {
            "steps": 1,
            "data": {"length": 8, "blend": [{"path": f"{tmp_path}/text"}, {"path": f"{tmp_path}/other"}]},
        },
    }
    found = input_paths(parse(values))
    text, other = "pretrain.data.blend[0].path", "pretrain.data.blend[1].path"
    assert found == {"model.source": tmp_path / "model", text: tmp_path / "text", other: tmp_path / "other"}
    assert missing(found) == {other: tmp_path / "other"}
