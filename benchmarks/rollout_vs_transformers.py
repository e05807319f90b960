"""Completions by Lockstep's rollout engine and by `transformers.generate`, on the same prompts, of the same lengths.

What is measured: 64 completions of mixed lengths, one completion, shared prompts, and what a token costs as the context
grows. Both sides run in a process of their own, one after the other, in bf16 with the same threads and allocator
settings. The bound of a decoding step is what the matrix products of its shapes take, on packed weights that follow one
another as they do in a model, by whichever library is faster, and the bytes of keys and values over the memory's rate,
measured between steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from lockstep.cluster.conversion.convert import to_huggingface
from lockstep.model.config import Numerics
from lockstep.model.formats.registry import QUICKSTART_MODEL
from lockstep.model.ops.linear import PackedWeight, packed
from lockstep.rl.remote import ENVIRONMENT
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.loading import load_rollout_engine, to_lockstep
from lockstep.rl.rollout.protocol import Request

MANY, ALONE = 64, 64
CONTEXTS = (128, 512, 1024, 2048, 4096, 8000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["batch", "alone", "context", "group"], action="append")
    parser.add_argument("--rounds", type=int, default=3, help="both sides in turns; medians are printed")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    wanted = args.only or ["batch", "alone", "group", "context"]
    if args.side:
        print(json.dumps(SIDES[args.side](args.model, wanted)))
        return
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "lockstep": to_lockstep(QUICKSTART_MODEL, Path(folder) / "ours"),
            "transformers": to_huggingface(QUICKSTART_MODEL, Path(folder) / "theirs", dtype="bfloat16"),
        }
        rounds = [[child(side, models[side], wanted) for side in SIDES] for _ in range(args.rounds)]
    for name in ("batch", "alone"):
        if name in wanted:
            compare(name, rounds)
    if "group" in wanted:
        shared, separate = (statistics.median(ours["group"][i] for ours, _ in rounds) for i in range(2))
        print(f"8 prompts, 8 samples each: {shared:.2f} s; 64 prompts: {separate:.2f} s")
    if "context" in wanted:
        print("context | ms a token, with the cache | without")
        for rows in zip(*(ours["context"] for ours, _ in rounds), strict=True):
            print("{:7.0f} | {:8.1f} | {:8.1f}".format(*map(statistics.median, zip(*rows, strict=True))))


def compare(name: str, rounds: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Medians of rates and of each round's ratios."""
    rates = [(ours[name], theirs[name], ours[f"{name} decoding"], ours[f"{name} bound"]) for ours, theirs in rounds]
    speed, other, alone, bound = map(statistics.median, zip(*rates, strict=True))
    times, share = [a / b for a, b, _, _ in rates], [a / b for _, _, a, b in rates]
    print(f"{name}: Lockstep {speed:.0f} tokens/s, transformers {other:.0f}, {spread(times)} times")
    print(f"{name}: decoding alone {alone:.0f} tokens/s, {spread(share)} of the bound of {bound:.0f}")


def spread(ratios: Sequence[float]) -> str:
    """The median of some, and the least and the largest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def child(side: str, model: Path, wanted: Sequence[str]) -> dict[str, Any]:
    words = [sys.executable, __file__, "--side", side, "--model", str(model)]
    words += [word for name in wanted for word in ("--only", name)]
    line = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT).stdout
    found: dict[str, Any] = json.loads(line.strip().splitlines()[-1])
    return found


def lengths() -> list[tuple[int, int]]:
    """Tokens of each prompt and completion of the batch: from 8 to 134, and from 16 to 142."""
    return [(8 + 2 * (i * 37 % MANY), 16 + 2 * (i * 23 % MANY)) for i in range(MANY)]


def prompt(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(20, 49000, (length,), generator=generator).tolist())


def request(number: int, tokens: tuple[int, ...], new: int) -> Request:
    return Request(number, tokens, SamplingParams(max_new_tokens=new, exact_lengths=(new,)), 0, number)


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Of the fastest of some."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def ours(model: Path, wanted: Sequence[str]) -> dict[str, Any]:
    engine, _ = load_rollout_engine(model, EngineConfig(sequences=MANY, cache_gib=2.0), dtype="bfloat16")
    found: dict[str, Any] = {}
    run(engine, [request(0, prompt(20, 0), 8)])
    if "batch" in wanted:
        batch = [request(i, prompt(n, i), new) for i, (n, new) in enumerate(lengths())]
        found["batch"] = sum(new for _, new in lengths()) / seconds(lambda: run(engine, fresh(batch)), 2)
        found["batch decoding"], found["batch bound"] = decoding(engine, MANY, 128)
    if "alone" in wanted:
        found["alone"] = ALONE / seconds(lambda: run(engine, fresh([request(0, prompt(30, 0), ALONE)])), 3)
        found["alone decoding"], found["alone bound"] = decoding(engine, 1, 64)
    if "group" in wanted:
        found["group"] = [
            seconds(lambda n=n: run(engine, fresh([request(i, prompt(300, i % n), 16) for i in range(MANY)])), 2)
            for n in (8, MANY)
        ]
    if "context" in wanted:
        found["context"] = [(n, *costs(engine, n)) for n in CONTEXTS]
    return found


_seeds = iter(range(10**6, 10**9))


def fresh(requests: Sequence[Request]) -> list[Request]:
    """The requests with other first tokens, so that nothing is found in the cache that another run has left."""
    first = next(_seeds) % 40_000
    return [Request(r.key, (first + 20, *r.tokens[1:]), r.sampling, r.seed, r.sample) for r in requests]


def run(engine: RolloutEngine, requests: Sequence[Request]) -> None:
    for each in requests:
        engine.add(each)
    while engine.has_work:
        engine.step()


def decoding(engine: RolloutEngine, count: int, context: int) -> tuple[float, float]:
    """Tokens/s of passes that only decode, and the bound: products of these shapes, then keys and values once.

    Passes and what bounds them are measured in turns, since others on the machine take of its memory's rate.
    """
    for each in fresh([request(i, prompt(context, i), 40) for i in range(count)]):
        engine.add(each)
    while (
        engine.statistics.generated_tokens == 0
        or engine.statistics.waiting
        or any(s.known - s.cached > 1 for s in engine._scheduler.running)
    ):
        engine.step()
    model, weights, numbers = engine.transformer.model, weights_of(engine), torch.ones(128 << 20)
    work = [engine.step, numbers.sum, *products(weights, count)]
    times = [[seconds(each, 1) for each in work] for _ in range(24)]
    step, summed, *multiplied = (statistics.median(column) for column in zip(*times, strict=True))
    while engine.has_work:
        engine.step()
    rate = numbers.nbytes / summed
    if count == 1:
        multiplied.append(sum(weight.nbytes for weight in weights) / rate)
    held = 2 * model.layers * model.kv_heads * model.head_dim * 2
    return count / step, count / (min(multiplied) + count * (context + 12) * held / rate)


def weights_of(engine: RolloutEngine) -> list[torch.Tensor]:
    """The matrices that a pass multiplies with."""
    layers = [
        m
        for b in engine.transformer.blocks.values()
        for m in (b.attention.qkv, b.attention.out, b.mlp.gate_up, b.mlp.down)
    ]
    return [*(m.weight for m in layers), engine.transformer.head_weight]


def products(weights: Sequence[torch.Tensor], rows: int) -> list[Callable[[], Any]]:
    """All matrix products of a pass over so many rows, by oneDNN and by our kernels, where the machine has them."""
    inputs = [torch.randn(rows, weight.shape[1], dtype=weight.dtype) for weight in weights]

    @torch.inference_mode()
    def multiply(way: Sequence[PackedWeight | None]) -> None:
        for weight, x in zip(way, inputs, strict=True):
            assert weight
            weight(x)

    ways = [[packed(weight, numerics) for weight in weights] for numerics in get_args(Numerics)]
    return [partial(multiply, way) for way in ways if None not in way]


@torch.inference_mode()
def costs(engine: RolloutEngine, context: int) -> tuple[float, float]:
    """Milliseconds of a token after a context with the cache, and of a whole forward pass over the context."""
    from lockstep.model.attention.packed import DocumentAttention

    engine.add(fresh([request(0, prompt(context, 0), 12)])[0])
    start = engine.statistics.generated_tokens
    while engine.statistics.generated_tokens == start:
        engine.step()
    cached = statistics.median(seconds(engine.step, 1) for _ in range(10))
    while engine.has_work:
        engine.step()
    tokens = torch.tensor(prompt(context, 0))
    attend = DocumentAttention([[context]], tokens.device)
    whole = seconds(lambda: engine.transformer(tokens, torch.arange(context), attend), 1)
    return 1000 * cached, 1000 * whole


def theirs(model: Path, wanted: Sequence[str]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def run(prompts: Sequence[tuple[int, ...]], new: int) -> None:
        width = max(map(len, prompts))
        rows = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": True, "top_k": 0, "pad_token_id": 0}
        network.generate(rows, attention_mask=mask, **settings)

    found: dict[str, Any] = {}
    run([prompt(20, 0)], 4)
    if "batch" in wanted:  # it goes on until the longest is done; tokens behind a completion's end do not count
        prompts = [prompt(n, i) for i, (n, _) in enumerate(lengths())]
        new = [new for _, new in lengths()]
        found["batch"] = sum(new) / seconds(lambda: run(prompts, max(new)), 1)
    if "alone" in wanted:
        found["alone"] = ALONE / seconds(lambda: run([prompt(30, 0)], ALONE), 3)
    return found


SIDES = {"lockstep": ours, "transformers": theirs}

if __name__ == "__main__":
    main()
