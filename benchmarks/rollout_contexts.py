"""What Lockstep's rollouts cost with shared prompts, and what a token costs as the context grows.

Measured: 8 samples of 8 prompts beside 64 prompts, all of 300 tokens; and single tokens behind long contexts, with the
KV cache and by a whole forward pass. `rollout_peers.py` compares batches and single completions with other engines.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch

from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.formats.registry import QUICKSTART_MODEL
from lockstep.rl.rollout.config import EngineConfig
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.loading import load_rollout_engine, to_lockstep
from rollout_engines.bound import seconds, start
from rollout_engines.environments import restart_as_worker
from rollout_engines.lockstep_engine import requests, run
from rollout_engines.work import SEQUENCES, Completion, prompt

CONTEXTS = (128, 512, 1024, 2048, 4096, 8000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["context", "group"], action="append")
    parser.add_argument("--rounds", type=int, default=3, help="medians are printed")
    args = parser.parse_args()
    restart_as_worker()
    with tempfile.TemporaryDirectory() as folder:
        model = to_lockstep(QUICKSTART_MODEL, Path(folder) / "model")
        engine, _ = load_rollout_engine(model, EngineConfig(cache_gib=2.0), dtype="bfloat16")
    seeds = iter(range(10**9))
    wanted = args.only or ["group", "context"]
    if "group" in wanted:
        shared, separate = (
            statistics.median(group(engine, n, next(seeds)) for _ in range(args.rounds)) for n in (8, SEQUENCES)
        )
        print(f"8 prompts, 8 samples each: {shared:.2f} s; {SEQUENCES} prompts: {separate:.2f} s")
    if "context" in wanted:
        print("context | ms a token, with the cache | without")
        for length in CONTEXTS:
            rounds = [costs(engine, length, next(seeds)) for _ in range(args.rounds)]
            print("{:7.0f} | {:8.1f} | {:8.1f}".format(length, *map(statistics.median, zip(*rounds, strict=True))))


def tokens(engine: RolloutEngine, length: int, seed: int) -> list[int]:
    return prompt(length, seed, engine.transformer.model.vocabulary)


def group(engine: RolloutEngine, count: int, seed: int) -> float:
    """Seconds of 64 completions of 16 tokens to so many prompts of 300."""
    prompts = [tokens(engine, 300, seed * SEQUENCES + i) for i in range(count)]
    asked: list[Completion] = [{"prompt": prompts[i % count], "new": 16} for i in range(SEQUENCES)]
    return seconds(partial(run, engine, asked))


@torch.inference_mode()
def costs(engine: RolloutEngine, context: int, seed: int) -> tuple[float, float]:
    """Milliseconds of a token after a context with the cache, and of a whole forward pass over the context."""
    read = tokens(engine, context, seed)
    start(engine, requests([{"prompt": read, "new": 12}]))
    cached = statistics.median(seconds(engine.step) for _ in range(10))
    while engine.has_work:
        engine.step()
    rows = torch.tensor(read)
    attend = DocumentAttention([[context]], rows.device)
    whole = seconds(lambda: engine.transformer(rows, torch.arange(context), attend))
    return 1000 * cached, 1000 * whole


if __name__ == "__main__":
    main()
