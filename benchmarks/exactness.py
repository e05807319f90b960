"""Exact numerics on a real model and small ones: whether a bit differs, and what the arithmetic costs.

    python benchmarks/exactness.py check --model smollm2 --dtype bfloat16 --tensor 3
    python benchmarks/exactness.py cost --dtype bfloat16

`check` draws sequences of mixed lengths under random arrival, chunked prefill, prefix sharing and preemption, since the
cache is far too small, and scores them again in the trainer's packed rows. `cost` times both arithmetics side by side.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lockstep.cluster.checks.mismatch import compare, reported, rescored
from lockstep.data.batch import sample
from lockstep.data.packing import RowRules, rows_for_ranks
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.tensors import Source
from lockstep.distributed.layout import Layout
from lockstep.distributed.pipeline import run_forward_backward
from lockstep.distributed.world.groups import Groups, alone
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.attention.kv_cache import kinds
from lockstep.model.config import ModelConfig, MoEConfig, Numerics
from lockstep.model.formats.registry import QUICKSTART_MODEL
from lockstep.model.loading import DTYPES, build, transformer_of
from lockstep.model.objectives.token_loss import nll
from lockstep.model.training.device_batch import DeviceBatch, DeviceRows
from lockstep.model.training.forward import scorer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.loading import to_lockstep
from lockstep.rl.rollout.protocol import Request
from lockstep.rl.types import Completion, Prompt, Rollout

BASE = dict(layers=4, width=256, heads=8, kv_heads=4, head_dim=32, intermediate=700, vocabulary=5003, context=1024)
SMALL = {
    "gemma": BASE
    | dict(
        norm="rms_offset",
        norm_at="around",
        attention_cap=5.0,
        logit_cap=9.0,
        window=100,
        full_layers=(1, 3),
        activation="gelu_tanh",
        embedding_scale=16.0,
    ),
    "gpt2": BASE
    | dict(rope="learned", norm="layer", gated=False, activation="gelu_tanh", kv_heads=8, biases=("qkv", "out", "mlp")),
    "experts": BASE | dict(moe=MoEConfig(experts=8, experts_per_token=2, intermediate=300), qk_norm="head"),
}
SAMPLES = 4
"""Completions of each prompt."""
RUNNING = 48
"""Sequences that run at one time, in a cache with room for a third of them."""
TEMPERATURE = 0.9
TURNS = 3
"""Measurements of each side, in turns, after one that does not count."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "cost"))
    parser.add_argument("--model", choices=("smollm2", *SMALL), default="smollm2")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--numerics", choices=("fast", "exact"), default="exact", help="of check")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--longest-prompt", type=int, default=700)
    parser.add_argument("--longest-completion", type=int, default=300)
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="each draws other sequences, one after another"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = to_lockstep(QUICKSTART_MODEL, Path(folder)) if args.model == "smollm2" else None
        if args.what == "cost":
            cost(args.model, checkpoint, args.dtype)
            return
        lengths = args.sequences, args.longest_prompt, args.longest_completion
        with RankPool(timeout_s=36_000.0) as worlds:
            for seed in args.seed:
                given = args.model, checkpoint, args.dtype, args.numerics, lengths, seed
                found = worlds.run(Layout(tensor=args.tensor), check, *given)[0]
                names = ("model", "tensor", "dtype", "numerics")
                print(json.dumps({name: getattr(args, name) for name in names} | {"seed": seed} | found), flush=True)


def opened(name: str, checkpoint: Path | None) -> tuple[ModelConfig, Source]:
    """A model and its weights."""
    if checkpoint is None:
        model = ModelConfig.model_validate(SMALL[name])
        return model, RandomWeights(model, 0, deviation=0.08)
    source = Checkpoint(checkpoint)
    return ModelConfig(**source.manifest["model"]), source


def check(
    groups: Groups,
    name: str,
    checkpoint: Path | None,
    dtype: str,
    numerics: Numerics,
    lengths: tuple[int, int, int],
    seed: int,
) -> dict[str, float]:
    """The mismatch, and what the engine did, on one rank of a tensor group."""
    model, source = opened(name, checkpoint)
    stage = build(model, groups, DTYPES[dtype], source, numerics)
    sequences, longest_prompt, longest_completion = lengths
    blocks = RUNNING // 3 * (longest_prompt + longest_completion) // 2 // 16 + 70
    engine = RolloutEngine(
        transformer_of(stage),
        EngineConfig(sequences=RUNNING, budget=384),
        decode=lambda tokens: "",
        blocks=[blocks] * len(kinds(model)),
    )
    draw = np.random.default_rng(seed)
    began = time.perf_counter()
    rollouts = written(engine, requests(draw, sequences, longest_prompt, longest_completion, model.vocabulary), draw)
    between = time.perf_counter()
    found = compare(reported(rollouts), rescored(stage, groups, rollouts, TEMPERATURE))
    return vars(found) | {
        "sequences": len(rollouts),
        "preemptions": engine.statistics.preemptions,
        "shared_prompt_tokens": engine.statistics.cached_prompt_tokens,
        "prompt_tokens": engine.statistics.prompt_tokens,
        "rollout_seconds": between - began,
        "training_seconds": time.perf_counter() - between,
    }


def requests(
    draw: np.random.Generator, sequences: int, longest_prompt: int, longest_completion: int, vocabulary: int
) -> list[Request]:
    """In random order; of each prompt's completions some come together and some much later."""
    prompts = [tuple(draw.integers(0, vocabulary, n).tolist()) for n in draw.integers(5, longest_prompt + 1, sequences)]
    found = []
    for number in range(sequences):
        sampling = SamplingParams(
            temperature=TEMPERATURE, exact_lengths=(int(draw.integers(1, longest_completion + 1)),)
        )
        found.append(Request(number, prompts[number // SAMPLES], sampling, 0, number))
    return [found[i] for i in draw.permutation(sequences)]


def written(engine: RolloutEngine, waiting: list[Request], draw: np.random.Generator) -> list[Rollout]:
    """The completions of requests that arrive at random times."""
    everything = {r.key: r for r in waiting}
    logp: dict[str | int, list[float]] = {key: [] for key in everything}
    tokens: dict[str | int, list[int]] = {key: [] for key in everything}
    while waiting or engine.has_work:
        for _ in range(min(len(waiting), int(draw.poisson(0.7)))):
            engine.add(waiting.pop())
        for token in engine.step() if engine.has_work else ():
            logp[token.key].append(token.logp)
            tokens[token.key].append(token.token)
    return [
        Completion(number, tuple(tokens[key]), tuple(logp[key]), "", "length", (0,)).with_prompt(
            Prompt(number, "", r.tokens, "")
        )
        for number, (key, r) in enumerate(everything.items())
    ]


def cost(name: str, checkpoint: Path | None, dtype: str) -> None:
    """Seconds of training, reading a prompt and decoding, in fast and in exact numerics."""
    groups = alone()
    sides = {numerics: trials(groups, name, checkpoint, dtype, numerics) for numerics in ("fast", "exact")}
    print(f"{name}, {dtype}, {torch.get_num_threads()} threads")
    for what in sides["fast"]:
        seconds: dict[str, list[float]] = {numerics: [] for numerics in sides}
        for turn in range(TURNS + 1):
            for numerics, each in sides.items():
                start = time.perf_counter()
                each[what]()
                if turn:
                    seconds[numerics].append(time.perf_counter() - start)
        fast, exact = (statistics.median(seconds[numerics]) for numerics in ("fast", "exact"))
        print(f"{what}: fast {fast * 1e3:.1f} ms, exact {exact * 1e3:.1f} ms, {exact / fast:.2f} times", flush=True)


def trials(
    groups: Groups, name: str, checkpoint: Path | None, dtype: str, numerics: Numerics
) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    model, source = opened(name, checkpoint)
    stage = build(model, groups, DTYPES[dtype], source, numerics)
    draw = np.random.default_rng(0)
    texts = draw.integers(0, model.vocabulary, (2, 513))
    rows = rows_for_ranks([sample(t[:1], t[1:], weight=1 / 1024) for t in texts], RowRules(budget=1024))[0]
    batches, transformer = DeviceRows(stage, groups, rows), transformer_of(stage)
    keys = iter(range(1 << 30))

    def engine_of(count: int, length: int, new: int) -> RolloutEngine:
        engine = RolloutEngine(transformer, EngineConfig(sequences=count), decode=lambda tokens: "")
        for _ in range(count):
            add(engine, length, new)
        return engine

    def add(engine: RolloutEngine, length: int, new: int) -> None:
        tokens = tuple(draw.integers(0, model.vocabulary, length).tolist())
        engine.add(Request(next(keys), tokens, SamplingParams(exact_lengths=(new,)), 0, 0))

    def read(engine: RolloutEngine) -> None:
        add(engine, 1000, 1)
        engine.step()

    def decode(engine: RolloutEngine) -> None:
        """8 steps; the first time, which does not count, the prompts as well."""
        while engine.statistics.generated_tokens < engine.statistics.running:
            engine.step()
        for _ in range(8):
            engine.step()

    def learn() -> None:
        run_forward_backward(stage, batches, scorer(groups, 1.0), loss, tokens=1024)
        transformer.zero_grad()

    def loss(scores_2K: Tensor, batch: DeviceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return nll(scores_2K[0], batch.loss_inputs)

    decoding = {count: engine_of(count, 256, 200) for count in (1, 8, 64)}
    return {
        "forward and backward, 2 × 512 tokens": learn,
        "prompt of 1,000 tokens": partial(read, engine_of(1, 5, 1)),
        **{f"8 steps of {n} sequences": partial(decode, engine) for n, engine in decoding.items()},
    }


if __name__ == "__main__":
    main()
