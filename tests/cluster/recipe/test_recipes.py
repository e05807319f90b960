"""The shipped recipes parse, and those of GRPO run from start to end in any layout, on problems that people use."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.cluster.launch.plan import RunPlan
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import load_recipe, parse
from lockstep.cluster.recipe.schema import Recipe
from tests.cluster.cli_process import Train, metrics, overrides

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "recipes"
DATASETS = ROOT.parent / "shared" / "datasets"
PROBLEMS = {
    "grpo-gsm8k-smollm2": (
        f"task.generator={DATASETS / 'gsm8k' / 'train.jsonl'}",
        f"task.held_out_from={DATASETS / 'gsm8k' / 'test.jsonl'}",
    ),
    "grpo-humaneval": (f"task.generator={DATASETS / 'humaneval' / 'HumanEval.jsonl.gz'}",),
}
LAYOUTS = ("{data=2}", "{tensor=2}", "{pipeline=2}", "{data=2,tensor=2,pipeline=2}")
CASES = [pytest.param(recipe, layout, marks=pytest.mark.exhaustive) for recipe in PROBLEMS for layout in LAYOUTS]
LOWER_CASE = 0.5
SHORT = (
    "rollout.length=3500",
    "trainer.row_tokens=512",
    "evaluation.max_new_tokens=4",
    "verifier.deadline=60.0",
    "rl.steps=2",
    "rl.prompts_per_step=2",
    "rl.group_size=6",
    "rl.sampling.max_new_tokens=4",
)
"""Two steps on prompts of any length."""


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_parses(path: Path) -> None:
    assert load_recipe(path).name


def test_a_cluster_needs_another_layout_and_nothing_else() -> None:
    here, there = (
        load_recipe(RECIPES / f"grpo-gsm8k-{name}.toml").model_dump(exclude={"layout", "rollout", "roles"})
        for name in ("smollm2", "cluster")
    )
    assert here == there


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_grpo_runs_on_real_problems(name: str, layout: str, tmp_path: Path, tiny_folder: Path, train: Train) -> None:
    """A random model is right by accident only; half a point for a small letter makes its completions differ."""
    missing = [file for file in PROBLEMS[name] if not Path(file.partition("=")[2]).is_file()]
    if missing:
        pytest.skip("the data set does not lie in ../shared/datasets beside the repository")
    settings = (
        *(f"{key}={value}" for key, value in tiny(tiny_folder).items()),
        *PROBLEMS[name],
        f"run={tmp_path}/{{name}}",
        f"layout={layout}",
        "task.held_out=2",
        f"roles.reference.place={'apart' if 'tensor' in layout else 'together'}",
        *SHORT,
        f"reward.format.weight={LOWER_CASE}",
        "reward.format.pattern=(?s).*[a-z].*",
    )
    code, output = train(tmp_path / "log", RECIPES / f"{name}.toml", *settings)
    assert code == 0, output
    steps = metrics(next(tmp_path.glob("grpo-*")), "rl")
    assert len(steps) == 2
    for step in steps:
        assert step["reward"] == pytest.approx(step["reward/format"] + step["reward/correctness"])
        assert 0 < step["reward/format"] < LOWER_CASE
        assert step["grad_norm"] > 0
        assert step["ungradable"] == 0
    for role in ("policy", "rollout", *(["reference"] if "tensor" in layout else [])):
        assert f"[{role} 0 step 0] info: ready" in output
    if "humaneval" in name:
        assert output.startswith("code sandbox: namespaces on, seccomp on")
        assert "[verifier 0 step 0] info: code sandbox: namespaces on" in output


MIXTURE = """
name = "mixture"
seed = 0

[[tasks]]
name = "math"
preset = "gsm8k"
generator = "{gsm8k}/train.jsonl"
held_out_from = "{gsm8k}/test.jsonl"
held_out = 2

[[tasks]]
name = "code"
preset = "humaneval"
generator = "{humaneval}/HumanEval.jsonl.gz"
held_out = 2

[[reward.functions]]
name = "small"
function = "{file}:small"
weight = 0.5
"""
REWARD = """
def small(completion: str, task: str) -> float:
    assert task in ("math", "code")
    return float(any(letter.islower() for letter in completion))
"""


def test_a_mixture_of_real_math_and_code_learns_from_a_users_reward(
    tmp_path: Path, tiny_folder: Path, train: Train
) -> None:
    gsm8k, humaneval = DATASETS / "gsm8k", DATASETS / "humaneval"
    if not gsm8k.is_dir() or not humaneval.is_dir():
        pytest.skip("the data sets do not lie in ../shared/datasets beside the repository")
    recipe, own = tmp_path / "mixture.toml", tmp_path / "own.py"
    own.write_text(REWARD)
    recipe.write_text(MIXTURE.format(gsm8k=gsm8k, humaneval=humaneval, file=own))
    code, output = train(
        tmp_path / "log",
        recipe,
        *(f"{key}={value}" for key, value in tiny(tiny_folder).items()),
        f"run={tmp_path}/{{name}}",
        *SHORT,
    )
    assert code == 0, output
    steps = metrics(tmp_path / "mixture", "rl")
    assert len(steps) == 2
    for step in steps:
        assert step["task/math/completions"] == step["task/code/completions"] == 6
        rewards = [step["task/math/reward"], step["task/code/reward"]]
        assert step["reward"] == pytest.approx(sum(rewards) / 2)
        assert step["reward"] == pytest.approx(step["reward/small"] + step["reward/correctness"])
        assert 0 < step["reward/small"] < 0.5
        assert step["grad_norm"] > 0
        assert step["ungradable"] == 0
    assert "[verifier 0 step 0] info: code sandbox: namespaces on" in output


def test_a_run_is_refused_where_programs_could_not_be_kept_in(tmp_path: Path) -> None:
    """In a user namespace that grants no others."""
    alone = ["unshare", "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("the kernel grants no user namespaces")
    tests = "def check(candidate):\n    candidate()\n"
    row = {"task_id": "a", "prompt": "def f():\n", "test": tests, "entry_point": "f", "canonical_solution": "    pass"}
    problems, run = tmp_path / "problems.jsonl", tmp_path / "run"
    problems.write_text("".join(json.dumps(row | {"prompt": f"def f{i}():\n"}) + "\n" for i in range(40)))
    settings = (f"task.generator={problems}", f"run={run}")
    command = [sys.executable, "-m", "lockstep", "train", str(RECIPES / "grpo-humaneval.toml"), *overrides(*settings)]
    done = subprocess.run([*alone, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "verifier.sandbox.requires=['namespaces', 'seccomp']: programs would run without namespaces" in done.stderr
    assert not run.exists()


def test_a_sandbox_is_what_the_recipe_says() -> None:
    recipe = parse({"verifier": {"sandbox": {"requires": ["landlock"], "memory_mib": 512, "seconds": 1.5}}})
    sandbox = recipe.verifier.sandbox
    assert (sandbox.limits.memory_bytes, sandbox.limits.seconds) == (512 << 20, 1.5)
    assert sandbox.required.lacks(Recipe().verifier.sandbox.required) == ("namespaces", "seccomp")
    assert Recipe().verifier.sandbox.required.lacks(sandbox.required) == ("landlock",)
    with pytest.raises(RecipeError, match=r"verifier\.sandbox\.requires"):
        parse({"verifier": {"sandbox": {"requires": ["moat"]}}})


def test_length_is_punished_once() -> None:
    with pytest.raises(RecipeError, match=r"overlong_share=0\.2 and reward\.overlong\.weight=0\.5 punish"):
        parse({"rl": {"method": "dapo"}, "reward": {"overlong": {"weight": 0.5}}})


def tiny(folder: Path) -> dict[str, str]:
    """A random model whose context holds any problem byte by byte, with the tiny model's tokenizer."""
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    shape = "layers=4,width=48,heads=6,kv_heads=2,head_dim=8,intermediate=80,context=4096,bos_token=1,eos_tokens=[2]"
    return {
        "model.config": f"{{{shape},vocabulary={vocabulary}}}",
        "model.tokenizer": str(folder),
        "model.dtype": "float32",
    }


def test_roles_that_work_at_the_same_time_share_the_cores() -> None:
    synchronous = load_recipe(RECIPES / "alignment.toml", ["rl.steps=1", "rl.method=ppo", "layout.data=2"])
    plan = RunPlan.of(synchronous)
    assert plan.computing_with("rollout") == ("rollout",)
    assert plan.computing_with("policy") == plan.computing_with("critic") == ("policy", "critic")
    asynchronous = load_recipe(RECIPES / "alignment.toml", ["rl.steps=1", "rl.flow.mode=asynchronous", "layout.data=2"])
    plan = RunPlan.of(asynchronous)
    assert plan.computing_with("rollout") == plan.computing_with("policy") == ("policy", "rollout")
