"""A recipe runs from a model to a report, in any layout, and its losses do not depend on which."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lockstep.cluster.recipe.load import load_recipe, to_toml
from tests.cluster.cli_process import Command, Train, metrics, summary, write_recipe
from tests.distributed.traces import steps_and_kinds

LAYOUTS = {
    "data": ("layout.data=2",),
    "tensor": ("layout.data=1", "layout.tensor=2", "rollout.tensor=2", "model.numerics=exact"),
    "pipeline": ("layout.data=1", "layout.pipeline=2"),
}
RECIPES = Path(__file__).parents[3] / "recipes"
OWN = "def brevity(tokens, completion):\n    return 1 / (tokens + len(completion))\n"
"""A reward function of the user's."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    recipe: Path
    set: tuple[str, ...]
    output: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Run]:
    """Runs that have ended, by layout."""
    return {}


@pytest.fixture(params=["tensor", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("data", "pipeline"))])
def run(
    request: pytest.FixtureRequest,
    finished: dict[str, Run],
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Path,
    train: Train,
) -> Run:
    """A run of the tiny recipe with another layout, the same for all tests."""
    name: str = request.param
    if name not in finished:
        folder = tmp_path_factory.mktemp("run")
        recipe = write_recipe(folder, tiny_folder)
        (folder / "own.py").write_text(OWN)
        given = (*LAYOUTS[name], f'reward.functions=[{{function = "{folder}/own.py:brevity", weight = 0.25}}]')
        code, output = train(folder / "log", recipe, *given, options=("--profile",))
        assert code == 0, output
        finished[name] = Run(folder / "tiny", recipe, given, output)
    return finished[name]


def test_a_run_leaves_a_whole_folder(run: Run) -> None:
    names = {p.name for p in run.folder.iterdir()}
    wanted = {"recipe.toml", "summary.json", "metrics.jsonl", "report.html", "tensorboard", "rollouts", "checkpoints"}
    assert names >= wanted
    resolved = load_recipe(run.folder / "recipe.toml")
    assert resolved == load_recipe(run.recipe, run.set)
    assert tomllib.loads(to_toml(resolved)) == tomllib.loads((run.folder / "recipe.toml").read_text())
    assert any(p.name.startswith("events.out") for p in (run.folder / "tensorboard").iterdir())
    assert (run.folder / "checkpoints" / "latest").resolve().name == "step-000018"
    assert summary(run.folder)["status"] == "finished"
    rows = pq.read_table(run.folder / "rollouts" / "step-000001.parquet").to_pylist()
    assert len(rows) == 16
    assert {row["outcome"] for row in rows} == {"correct", "incorrect"}, "RL had nothing to learn from"


def test_each_phase_has_traces_where_it_is_long_enough(run: Run) -> None:
    traces = run.folder / "traces"
    assert [p.name for p in traces.iterdir()] == ["sft"]
    for rank in (0, 1):
        assert steps_and_kinds(traces / "sft" / f"rank-{rank}.json")[0] == 3
    assert f"traces of steps 3 to 5: {traces}/sft/rank-*.json" in run.output
    assert f"no traces in {traces}/rl: they begin with step 3" in run.output


def test_reinforcement_updates_the_policy(run: Run) -> None:
    first, second = metrics(run.folder, "rl")
    assert first["grad_norm"] > 0
    assert second["weight_version"] == 1 + first["weight_version"]
    assert [line["stage"] for line in metrics(run.folder, "eval")] == ["before", "supervised", "after"]


def test_a_reward_function_from_a_file_is_a_term_of_the_reward_and_its_source_is_on_record(run: Run) -> None:
    for line in metrics(run.folder, "rl"):
        assert line["reward"] == pytest.approx(line["reward/correctness"] + line["reward/brevity"], abs=1e-9)
    rows = pq.read_table(run.folder / "rollouts" / "step-000001.parquet").to_pylist()
    credit = {"correct": 1.0, "incorrect": 0.0}
    for row in rows:
        own = 0.25 / (row["completion_tokens"] + len(row["completion"]))
        assert row["reward"] == pytest.approx(credit[row["outcome"]] + own, abs=1e-9)
    assert len(summary(run.folder)["data"]["reward.functions[0].function"]) == 32


@pytest.mark.parametrize("run", ["tensor"], indirect=True)
def test_in_exact_numerics_rollouts_and_training_never_differ_by_a_bit(run: Run) -> None:
    check_exact(run.folder)


def check_exact(folder: Path) -> None:
    for line in metrics(folder, "rl"):
        assert line["mismatch_bits"] == line["mismatch_max"] == line["mismatch_kl"] == line["ratio_max"] == 0
        assert line["grad_norm"] > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nor_do_they_in_fifty_steps(dtype: str, tmp_path: Path, tiny_folder: Path, train: Train) -> None:
    """Half a point for a small letter makes a random model's completions differ, so that every step has an update."""
    settings = (
        f"model.dtype={dtype}",
        "model.numerics=exact",
        "supervised.steps=0",
        "rl.steps=50",
        "rl.group_size=8",
        "rl.optimizer.learning_rate=1e-4",
        "reward.format.weight=0.5",
        "reward.format.pattern=(?s).*[aeiou].*",
    )
    code, output = train(tmp_path / "log", write_recipe(tmp_path, tiny_folder), *settings)
    assert code == 0, output
    assert len(metrics(tmp_path / "tiny", "rl")) == 50
    check_exact(tmp_path / "tiny")


@pytest.mark.exhaustive
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_a_mixture_of_experts_replays_the_routing_of_its_rollouts(
    numerics: str, tmp_path: Path, tiny_folder: Path, train: Train
) -> None:
    settings = (
        f"run={tmp_path}/run",
        f"model.tokenizer={tiny_folder}",
        "model.config.vocabulary=301",
        f"model.numerics={numerics}",
        "layout.expert=2",
        "rl.steps=2",
    )
    code, output = train(tmp_path / "log", RECIPES / "grpo-experts.toml", *settings)
    assert code == 0, output
    differs = [line["routing_differs"] for line in metrics(tmp_path / "run", "rl")]
    if numerics == "exact":
        check_exact(tmp_path / "run")
        assert differs == [0, 0]
    else:
        assert all(0 < share < 0.2 for share in differs)


def test_the_screen_shows_steps_workers_and_the_report(run: Run) -> None:
    for words in ("sft  16/16", "rl   2/2", "[policy 1 step 0] info: ready", "[rollout 0 step 0]", "report: "):
        assert words in run.output
    for noise in ("\x1b[", "pid=", "Warning", "DeepSpeed"):
        assert noise not in run.output


def test_supervised_losses_agree_with_the_first_layout(run: Run, finished: dict[str, Run]) -> None:
    losses = [line["loss"] for line in metrics(run.folder, "sft")]
    assert len(losses) == 16
    first = next(iter(finished.values()))
    assert losses == pytest.approx([line["loss"] for line in metrics(first.folder, "sft")], abs=1e-4)


@pytest.mark.parametrize("run", ["tensor"], indirect=True)
def test_a_sharded_checkpoint_generates_and_is_evaluated(run: Run, tmp_path: Path) -> None:
    task = ["--task", str(run.recipe), "--max-new-tokens", "4", "--dtype", "float32"]
    command = Command(tmp_path / "log", "eval", str(run.folder), *task, "--output", str(tmp_path / "eval"))
    assert command.wait() == 0, command.output
    after = metrics(run.folder, "eval")[-1]
    assert f"{after['correct']} of {after['total']} correct" in command.output
