"""Accuracy of tasks is measured between steps of RL; the best checkpoint stays, and RL ends where none improves."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.cluster.cli_process import Train, metrics, summary, write_recipe
from tests.documented import check_run

OWN = """
def words(count):
    for n in range(count):
        yield {"question": f"Say a word of {n} letters, or more.", "answer": str(n)}

def long_enough(completion, answer, task):
    assert task == "words"
    return len(completion) >= int(answer) % 8

def brief(tokens, task):
    assert task == "words"
    return 1 / (1 + tokens)
"""


def mixed(folder: Path, recipe: Path) -> Path:
    """The recipe with a second task, of which problems and grader are the user's."""
    (folder / "own.py").write_text(OWN)
    second = f"""
[[tasks]]
name = "words"
weight = 0.5
generator = "{folder}/own.py:words"
grader = "{folder}/own.py:long_enough"
settings = {{ count = 40 }}
reward = {{ functions = [{{ function = "{folder}/own.py:brief", weight = 0.5 }}] }}
train = 10
held_out = 2

[[evaluation.tasks]]
name = "others"
generator = "{folder}/problems.jsonl"
prompt = "Say it: {{question}}"
held_out = 3

[layout]"""
    text = recipe.read_text().replace("[task]", '[[tasks]]\nname = "digits"').replace("[layout]", second)
    recipe.write_text(text)
    return recipe


SETTINGS = (
    "rl.steps=9",
    "rl.flow.mode=asynchronous",
    "rl.optimizer.learning_rate=1e-9",  # so that no accuracy is better than the first
    "evaluation.every=2",
    "evaluation.patience=2",
    "evaluation.best=others",
    "evaluation.samples=3",
    "evaluation.pass_at=[1, 3]",
    "checkpoints.every=1",
    "checkpoints.keep_last=1",
)


def test_accuracy_between_steps_of_rl_its_best_checkpoint_and_an_early_end(
    tmp_path: Path, tiny_folder: Path, train: Train
) -> None:
    recipe = mixed(tmp_path, write_recipe(tmp_path, tiny_folder))
    code, output = train(tmp_path / "log", recipe, *SETTINGS)
    assert code == 0, output
    run = tmp_path / "tiny"
    lines = metrics(run, "eval")
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("before", 0),
        ("supervised", 16),
        ("during", 18),
        ("during", 20),
        ("during", 22),
        ("after", 22),
    ]
    assert len(metrics(run, "rl")) == 6
    for line in lines:
        assert 0 <= line["pass@1"] <= line["pass@3"] <= 1
        parts = 4 * line["accuracy/digits"] + 2 * line["accuracy/words"]
        assert line["accuracy"] == pytest.approx(parts / 6)
        assert line["accuracy/others"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
        assert 0 <= line["pass@1/others"] <= line["pass@3/others"] <= 1
    for line in metrics(run, "rl"):
        assert line["task/digits/completions"] + line["task/words/completions"] == 16
    rewards = [line["task/words/reward"] for line in metrics(run, "rl") if "task/words/reward" in line]
    assert len(rewards) >= 5
    assert max(rewards) > 0, "the user's grader found nothing right"
    terms = {key.split("/", 1)[1] for line in metrics(run, "rl") for key in line if key.startswith("task/")}
    assert terms == {
        "digits/reward",
        "digits/reward/correctness",
        "digits/completions",
        "words/reward",
        "words/reward/correctness",
        "words/reward/brief",
        "words/completions",
    }
    rows = pq.read_table(run / "rollouts" / "step-000001.parquet").to_pylist()
    assert {row["task"] for row in rows} == {"digits", "words"}
    assert all(row["group"] < 32 if row["task"] == "digits" else 32 <= row["group"] < 42 for row in rows)
    assert summary(run)["data"].keys() == {
        "tasks[0].generator",
        "tasks[1].generator",
        "tasks[1].grader",
        "tasks[1].reward.functions[0].function",
        "evaluation.tasks[0].held_out_from",
    }
    assert summary(run)["split"]["train"] == 42
    during = [line for line in lines if line["stage"] == "during"]
    assert len({line["accuracy/others"] for line in during}) == 1, "equal weights up to rounding answer alike"
    said = summary(run)["stopped_early"]
    assert said == "RL ended after 22 steps: no accuracy of others in 2 measurements was above that of step 18"
    assert said in output
    checkpoints = run / "checkpoints"
    assert (checkpoints / "best").resolve().name == "step-000018"
    assert sorted(p.name for p in checkpoints.glob("step-*")) == ["step-000018", "step-000022"]
    assert pq.read_table(run / "evals" / "step-000020.parquet").num_rows == 9
    assert [row["stage"] for row in summary(run)["rows"]] == [line["stage"] for line in lines]
    check_run(run)


@pytest.mark.exhaustive
def test_a_run_that_ended_early_stays_so_and_goes_on_where_the_recipe_lets_it(
    tmp_path: Path, tiny_folder: Path, train: Train
) -> None:
    recipe, run = mixed(tmp_path, write_recipe(tmp_path, tiny_folder)), tmp_path / "tiny"
    for options in ((), ("--resume",)):
        code, output = train(tmp_path / "log", recipe, *SETTINGS, options=options)
        assert code == 0, output
        assert len(metrics(run, "rl")) == 6
        assert summary(run)["stopped_early"]
    patient = [each for each in SETTINGS if not each.startswith(("evaluation.p", "evaluation.samples"))]
    code, output = train(tmp_path / "log", recipe, *patient, options=("--resume",))
    assert code == 0, output
    assert len(metrics(run, "rl")) == 9
    assert summary(run)["stopped_early"] is None
    assert [(row["stage"], row["step"]) for row in summary(run)["rows"]][-2:] == [("during", 24), ("after", 25)]
