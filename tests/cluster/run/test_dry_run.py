"""A recipe is checked as far as a run comes without a cluster, and nothing is written."""

import json
from pathlib import Path

import pytest

from lockstep.cluster.recipe.load import load_recipe
from lockstep.cluster.run.dry_run import ReadyRun, dry_run
from tests.cluster.cli_process import write_recipe
from tests.rl.verifiers.llm_judge.scripted_endpoint import Scripted, refuses, says, scripted


def ready(folder: Path, model: Path, *settings: str) -> ReadyRun:
    """The recipe that runs in seconds, checked, with settings; nothing is written."""
    recipe = load_recipe(write_recipe(folder, model), settings)
    before = sorted(folder.rglob("*"))
    found = dry_run(recipe, print)
    assert sorted(folder.rglob("*")) == before
    return found


def test_a_recipe_that_can_run_is_described(tmp_path: Path, tiny_folder: Path) -> None:
    words = str(ready(tmp_path, tiny_folder))
    assert words == (
        f"with processes 2 policy, 1 rollout, 1 verifier, on 32 problems and 4 held-out ones, into {tmp_path}/tiny"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["layout.tensor=5"], r"layout\.tensor=5 does not divide the model's 6 query heads"),
        (["model.source=gone.gguf"], r"there is no file .*gone\.gguf"),
        (["task.generator=chain_sums"], "chain_sums"),
        (["task.curriculum=easy"], r"task\.curriculum='easy' names no function"),
        (["task.pass_rates=gone.jsonl"], r"gone\.jsonl.*there is no such file"),
        (["rollout.length=20"], r"with evaluation\.max_new_tokens=4 it needs \d+, where rollout\.length is 20"),
        (["rollout.length=9999", "rl.sampling.max_new_tokens=250"], r"where the model's context is 256: lower rl\.sam"),
        (["rl.sampling.max_new_tokens=120"], r"lower rl\.sampling\.max_new_tokens, or raise rollout\.length"),
        (["preference.source=gone.jsonl"], r"gone\.jsonl"),
        (["supervised.source=gone.jsonl"], r"gone\.jsonl.*there is no such file"),
        (
            ["supervised.source=talks.jsonl", "supervised.longest=257"],
            r"supervised\.longest=257 is more than the model's context of 256 tokens",
        ),
        (["preference.steps=1", "preference.sampling.max_new_tokens=120"], r"lower preference\.sampling\.max_new"),
    ],
)
def test_what_a_run_would_be_refused_for_is_said(
    tmp_path: Path, tiny_folder: Path, settings: list[str], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        ready(tmp_path, tiny_folder, *settings)


def test_an_llm_judge_is_tried_before_a_run_starts(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def settings(server: Scripted) -> list[str]:
        return ["task.grader=llm_judge", f"verifier.llm_judge.url={server.url}", "verifier.llm_judge.model=judge"]

    with scripted(says("SCORE: 10")) as server:
        ready(tmp_path, tiny_folder, *settings(server))
        assert "gave 10, from 0 to 10, to a right answer of 2 + 2" in capsys.readouterr().out
        with pytest.raises(ValueError, match=r"verifier\.llm_judge: KEY_NOWHERE is not set"):
            ready(tmp_path, tiny_folder, *settings(server), "verifier.llm_judge.api_key_env=KEY_NOWHERE")
    for status, words in (
        (401, "give api_key_env"),
        (403, "give api_key_env"),
        (404, "model is a name that it serves"),
    ):
        with scripted(refuses(status)) as server, pytest.raises(ValueError, match=rf"verifier\.llm_judge: .*{words}"):
            ready(tmp_path, tiny_folder, *settings(server))


def test_a_place_that_is_no_runs_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files that are not a run's"):
        ready(tmp_path, tiny_folder)


def test_conversations_that_cannot_be_used_are_named(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talks = tmp_path / "talks.jsonl"
    rows = [json.dumps({"prompt": f"{n}?", "completion": "12" * n}) + "\n" for n in (1, 4, 100)]
    source = f"supervised.source={talks}"
    talks.write_text("".join(rows))
    with pytest.raises(ValueError, match=r"talks\.jsonl:3: the conversation has 2\d\d tokens, and may have 100"):
        ready(tmp_path, tiny_folder, source, "supervised.longest=100")
    talks.write_text("".join([*rows, '{"prompt": "x"}']))
    with pytest.raises(ValueError, match=r"talks\.jsonl:4: no conversation is in the fields 'prompt'"):
        ready(tmp_path, tiny_folder, source)
    skip = ("supervised.longest=100", "supervised.on_long=skip", "supervised.on_bad=skip")
    with pytest.raises(ValueError, match=r"2 conversations were found and supervised\.held_out=32 keeps all"):
        ready(tmp_path, tiny_folder, source, *skip)
    capsys.readouterr()
    ready(tmp_path, tiny_folder, source, *skip, "supervised.held_out=1")
    said = capsys.readouterr().out
    assert "Bad rows left out: 1" in said
    assert "Conversations of more than 100 tokens: 1 left out" in said
    assert "2 conversations of" in said


def test_a_row_of_preferences_that_cannot_be_used_is_named(tmp_path: Path, tiny_folder: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n{}\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl"):
        ready(tmp_path, tiny_folder, f"preference.source={pairs}")
