"""SFT, RSFT, DPO, a reward model with PPO, and GRPO, from one start, on one arithmetic task.

Every method is a run of `lockstep train` on recipes/alignment.toml with the keys that METHODS gives. Then each
checkpoint of each run is measured in the same way, on held-out problems: greedy accuracy, the mean reward of samples,
and the KL to the start, which is a mean over the same samples. What is on the x axis is how many completions were
spent: demonstrations, or samples that were judged, those of preference pairs included.
"""

import argparse
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from lockstep.cluster.checks.mismatch import reported, rescored
from lockstep.cluster.recipe.load import load_recipe
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.records.svg import Series, line_chart
from lockstep.data.tasks.task import make_split
from lockstep.distributed.checkpoint.manager import Checkpoint, find, saved
from lockstep.distributed.pipeline import Stage
from lockstep.distributed.world.groups import Groups, alone, leave
from lockstep.model.config import ModelConfig
from lockstep.model.loading import DTYPES, build
from lockstep.rl.prompts import make_prompt
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.loading import load_rollout_engine
from lockstep.rl.rollout.output_processor import generate
from lockstep.rl.types import Prompt, Rollout
from lockstep.rl.verifiers.math.grader import grade

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "alignment.toml"
WORK = Path("runs/alignment")
END = "<end>"

START = (
    "model.config={layers=3,width=128,heads=4,kv_heads=4,head_dim=32,intermediate=384,vocabulary=13,context=64,"
    "eos_tokens=[0]}",
    "model.tokenizer=runs/alignment/tokenizer",
    "task.generator=runs/alignment/habits.jsonl",
    "supervised.problems_per_step=128",
    'supervised.optimizer={learning_rate=3e-3,warmup_steps=20,schedule="linear"}',
)
"""A model that is begun at random, and taught by answers of which two in three forget to carry."""
HELD_OUT = 512

GROUPS = (
    "rl.steps=40",
    "rl.prompts_per_step=64",
    "rl.group_size=8",
    "rl.sampling.max_new_tokens=6",
    "checkpoints.every=8",
)
PAIRS = (
    "preference.prompts=3072",
    "preference.completions=8",
    "preference.pairs=2",
    "preference.held_out=64",
    "preference.sampling.max_new_tokens=6",
    "preference.groups_per_step=64",
    "preference.evaluate_every=20",
)
METHODS: dict[str, tuple[str, ...]] = {
    "SFT": (
        "supervised.steps=80",
        "supervised.problems_per_step=64",
        "supervised.optimizer={learning_rate=3e-4,warmup_steps=5}",
        "checkpoints.every=10",
    ),
    "RSFT": (
        *GROUPS,
        "rl.method=rsft",
        "rl.optimizer={learning_rate=3e-4,warmup_steps=5}",
    ),
    "DPO": (
        *PAIRS,
        "preference.method=dpo",
        "preference.beta=1.0",
        "preference.steps=96",
        'preference.optimizer={learning_rate=3e-5,warmup_steps=5,schedule="linear"}',
        "checkpoints.every=24",
    ),
    "PPO": (
        *PAIRS,
        *GROUPS,
        "preference.method=reward_model",
        "preference.steps=160",
        "preference.optimizer={learning_rate=3e-4,warmup_steps=5}",
        "rl.method=ppo",
        "rl.kl_beta=1.0",
        "rl.optimizer={learning_rate=2e-4,warmup_steps=5}",
        "roles.critic.optimizer={learning_rate=3e-4,warmup_steps=5}",
    ),
    "GRPO": (
        *GROUPS,
        "rl.method=grpo",
        "rl.kl_beta=0.0",
        "rl.optimizer={learning_rate=2e-4,warmup_steps=5}",
    ),
}


METHODS["GRPO-asynchronous"] = (*METHODS["GRPO"], "rl.flow.mode=asynchronous", "rl.flow.max_staleness=4")


@dataclass(frozen=True)
class Measured:
    """A checkpoint of a run, on held-out problems."""

    step: int
    completions: int
    accuracy: float
    reward: float
    kl: float
    """To the start: nats a completion, the mean of Σ (log π − log π_start) over samples of π."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--start-steps", type=int, default=1000, help="supervised steps that make the start")
    parser.add_argument("--seed", type=int, default=0, help="of all runs; the start is the same")
    parser.add_argument("--charts", type=Path, default=WORK, help="folder for the three charts")
    parser.add_argument("--measure-only", action="store_true", help="of runs that are there")
    args = parser.parse_args()
    prepare(WORK)
    if not (WORK / "start" / "checkpoints").exists():
        train("start", (*START, f"supervised.steps={args.start_steps}"))
    runs = {
        f"{name}-{args.seed}" if args.seed else name: (*METHODS[name], f"seed={args.seed}") for name in args.methods
    }
    if not args.measure_only:
        for name, settings in runs.items():
            train(name, settings)
    groups = alone()
    found = {name: measured(name, settings, groups) for name, settings in runs.items()}
    leave()
    print(table(found, {name: trained_seconds(WORK / name) for name in runs}))
    draw(found, args.charts)


def prepare(folder: Path) -> None:
    """A tokenizer of digits; sums of two numbers below 100, each in one order, and answers that make a bad habit."""
    tokens = FastTokenizer(models.WordLevel({word: i for i, word in enumerate([END, *"0123456789+="])}, END))
    tokens.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokens.decoder = decoders.Fuse()
    tokens.add_special_tokens([END])
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text(tokens.to_str())
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    chance = random.Random(0)
    sums = [chance.sample((a, b), 2) for a in range(100) for b in range(a + 1)]
    chance.shuffle(sums)
    held_out, taught = sums[:HELD_OUT], sums[HELD_OUT:]
    habits = [row(a, b, a + b if copy else carelessly(a, b)) for copy in (0, 0, 1) for a, b in taught]
    write(folder / "held_out.jsonl", [row(a, b, a + b) for a, b in held_out])
    write(folder / "sums.jsonl", [row(a, b, a + b) for a, b in taught])
    write(folder / "habits.jsonl", habits)


def carelessly(a: int, b: int) -> int:
    """The sum of somebody who forgets to carry."""
    return 10 * ((a // 10 + b // 10) % 10) + (a % 10 + b % 10) % 10


def row(a: int, b: int, answer: int) -> dict[str, str]:
    """A sum with an answer, all digits in their places."""
    return {"question": f"{a:02} + {b:02} =", "answer": f"{answer:03}"}


def write(file: Path, rows: list[dict[str, str]]) -> None:
    """One row a line."""
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))


def train(name: str, settings: tuple[str, ...]) -> None:
    """One run, as a user would start it."""
    overrides = [part for setting in (f"name={name}", *settings) for part in ("--set", setting)]
    subprocess.run([sys.executable, "-m", "lockstep", "train", str(RECIPE), *overrides], check=True)


def measured(name: str, settings: tuple[str, ...], groups: Groups) -> list[Measured]:
    """The start, then each checkpoint of a run that changed the policy."""
    recipe = load_recipe(RECIPE, [f"name={name}", *settings])
    begins = recipe.preference.steps if recipe.preference and recipe.preference.judged else 0
    start = find(WORK / "start")
    places = {0: start} | {step: place for step, place in saved(recipe.saves).items() if step >= begins}
    source = Checkpoint(start)
    reference = build(ModelConfig(**source.manifest["model"]), groups, DTYPES["float32"], source)
    split = make_split(recipe.task, recipe.seed)
    found = []
    for step, place in places.items():
        config = EngineConfig(length=32, cache_gib=0.1)
        engine, tokenizer = load_rollout_engine(place, config, dtype="float32", groups=groups)
        prompts = [make_prompt(problem, recipe.task, tokenizer) for problem in split.held_out]
        found.append(Measured(step, spent(recipe, step), *figures(engine, reference, prompts)))
    return found


def figures(engine: RolloutEngine, reference: Stage, prompts: list[Prompt]) -> tuple[float, float, float]:
    """Greedy accuracy, and mean reward and KL of two samples of each prompt."""
    greedy = list(generate(engine, prompts, SamplingParams(temperature=0, max_new_tokens=6), samples=1, seed=0))
    drawn = list(generate(engine, prompts, SamplingParams(max_new_tokens=6), samples=2, seed=1))
    log_ratios = reported(drawn) - rescored(reference, engine.transformer.groups, drawn, 1.0)
    return right(greedy), right(drawn), float(log_ratios.sum() / len(drawn))


def right(rollouts: list[Rollout]) -> float:
    """The share of correct completions."""
    return float(np.mean([grade(r.text, r.prompt.answer).reward or 0.0 for r in rollouts]))


def spent(recipe: Recipe, step: int) -> int:
    """Completions behind the weights after so many steps of all phases."""
    if step and recipe.supervised:
        return step * recipe.supervised.problems_per_step
    pairs = recipe.preference.prompts * recipe.preference.completions if step and recipe.preference else 0
    before = recipe.preference.steps if recipe.preference else 0
    written = recipe.rl.prompts_per_step * recipe.rl.group_size * max(0, step - before) if recipe.rl else 0
    return pairs + written


def trained_seconds(run: Path) -> float:
    """Wall time from the first measurement to the last step, of the steps of all phases."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    begun = next(line["time"] for line in lines if line["phase"] == "eval")
    return float(max(line["time"] for line in lines if line["phase"] != "eval") - begun)


def table(found: dict[str, list[Measured]], seconds: dict[str, float]) -> str:
    """The start and the end of each run, in Markdown."""
    lines = [
        "| method | completions | held-out accuracy | reward of samples | KL, nats | seconds |",
        "| --- " * 6 + "|",
    ]
    for name, points in found.items():
        begun, ended = points[0], points[-1]
        accuracy, reward = f"{begun.accuracy:.3f} → {ended.accuracy:.3f}", f"{begun.reward:.3f} → {ended.reward:.3f}"
        lines.append(
            f"| {name} | {ended.completions:,} | {accuracy} | {reward} | {ended.kl:.2f} | {seconds[name]:.0f} |"
        )
    return "\n".join(lines)


STYLE = (
    "text{font:11px sans-serif;fill:#5d6870}path{fill:none;stroke-width:1.9}.grid{stroke:#e1e4e4}.axis{stroke:#5d6870}"
    ".s0{stroke:#1f6f8b}.s1{stroke:#c2622d}.s2{stroke:#24713f}.s3{stroke:#8250a8}.s4{stroke:#80630f}"
)


def draw(found: dict[str, list[Measured]], folder: Path) -> None:
    """Three charts over the completions that were spent."""
    for key, title, unit in (
        ("accuracy", "Held-out accuracy, greedy", "share"),
        ("reward", "Mean reward of samples", "reward"),
        ("kl", "KL to the start", "nats"),
    ):
        lines = [Series(n, [p.completions for p in ps], [getattr(p, key) for p in ps]) for n, ps in found.items()]
        svg = line_chart(title, lines, "completions", unit, zero=True)
        opening = '<svg xmlns="http://www.w3.org/2000/svg" '
        styled = svg.replace("<svg ", opening, 1).replace(">", f"><style>{STYLE}</style>", 1)
        (folder / f"alignment-{key}.svg").write_text(styled, encoding="utf-8")


if __name__ == "__main__":
    main()
