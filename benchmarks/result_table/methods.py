"""What a row trains: one recipe, and the few keys by which tasks and methods differ.

All methods begin with the 16 supervised steps of the quickstart. Then each has 1,152 training problems to spend: SFT
one given answer to each, the others 8 completions of each that are judged.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "results.toml"
SEEDS = range(5)

TASKS: dict[str, tuple[str, ...]] = {
    "sums": (),
    "sequences": ("task.generator=number_sequence", "task.settings={min_value=0,max_value=99,max_complexity=1}"),
    "legs": ("task.generator=leg_counting", "task.settings={min_animals=1,max_animals=2,max_instances=9}"),
}
"""Keys of `[task]` that are not the quickstart's, whose sums of two numbers are the first task."""

METHODS: dict[str, tuple[str, ...]] = {
    "sft": ("supervised.steps=52", "rl.steps=0", "rl.kl_beta=0"),
    "rsft": (
        "rl.method=rsft",
        "rl.kl_beta=0",
        "rl.optimizer.learning_rate=2e-5",
    ),
    "dpo": (
        "rl.steps=0",
        "rl.kl_beta=0",
        "preference.method=dpo",
        "preference.beta=0.3",
        "preference.prompts=1152",
        "preference.completions=8",
        "preference.pairs=2",
        "preference.steps=36",
        "preference.groups_per_step=32",
        "preference.sampling={temperature=1.0,max_new_tokens=12}",
        'preference.optimizer={learning_rate=3e-6,warmup_steps=2,schedule="linear"}',
    ),
    "ppo": (
        "rl.method=ppo",
        "roles.critic.layout={data=1}",
        "roles.critic.optimizer={learning_rate=1e-5,warmup_steps=2}",
    ),
    "grpo": (),
    "rloo": ("rl.method=rloo",),
    "grpo-one-step-off": ("rl.flow.mode=one_step_off",),
    "grpo-asynchronous": ("rl.flow.mode=asynchronous", "rl.flow.max_staleness=4"),
}
"""Keys that are not those of GRPO, which is what recipes/results.toml says."""


def settings_of(task: str, method: str, seed: int) -> tuple[str, ...]:
    """The `key=value` overrides that make a row of the recipe.

    Raises:
        ValueError: names what there is, where there is no such task, method or seed.
    """
    for kind, given, known in (("task", task, TASKS), ("method", method, METHODS)):
        if given not in known:
            raise ValueError(f"there is no {kind} {given!r}: give one of {', '.join(known)}")
    if seed < 0:
        raise ValueError(f"seed {seed} is below 0: give 0 or more")
    return (*TASKS[task], *METHODS[method], f"seed={seed}")


def is_reproducible(method: str) -> bool:
    """Whether a run has the same bits again; asynchronous ones do not, as time decides which weights draw a token.

    Rows may name a method that is listed no more, which had bits.
    """
    return "rl.flow.mode=asynchronous" not in METHODS.get(method, ())
