"""Decoding with prompt-lookup speculation and without it, on text that repeats and on text that does not.

Two engines on the same weights (SmolLM2-135M in bf16) decode the same requests in turns; what is timed begins when all
requests have their first token. `copy` goes on greedily with a program that the prompt has twice and begins again,
`words` draws answers to word problems at temperature 1, and `noise` goes on from random tokens at temperature 1, where
nothing repeats. The ratio is that of the two times of a round; the median of all rounds is printed, with the least and
the largest. Completions have a fixed length, so that both engines draw as many tokens. What is drawn is compared: in
exact numerics tokens and log-probabilities have to be the same bits.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.world.groups import alone
from lockstep.model.formats.registry import QUICKSTART_MODEL
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.loading import load_rollout_engine, to_lockstep
from lockstep.rl.rollout.protocol import Request, TokenOutput
from rollout_engines.environments import restart_as_worker

Clock = Callable[[], float]

NEW = 128
"""Tokens of each completion."""

PROGRAM = """def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


def variance(values):
    center = mean(values)
    total = 0.0
    for value in values:
        total += (value - center) ** 2
    return total / (len(values) - 1)
"""
WORDS = (
    "A baker sells {0} loaves in the morning and twice as many in the afternoon. Each loaf costs {1} dollars. How much "
    "does the baker earn on that day? Explain each step."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["copy", "words", "noise"], action="append")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 32], help="completions at the same time")
    parser.add_argument("--speculate", type=int, default=8, help="tokens on trial at most")
    parser.add_argument("--numerics", choices=["fast", "exact"], default="fast")
    parser.add_argument("--rounds", type=int, default=7, help="both engines in turns; medians are printed")
    parser.add_argument("--processor", action="store_true", help="processor time on one thread, beside other work")
    args = parser.parse_args()
    clock = time.process_time if args.processor else time.perf_counter
    if args.processor:
        torch.set_num_threads(1)
    restart_as_worker()
    with tempfile.TemporaryDirectory() as folder:
        model = to_lockstep(QUICKSTART_MODEL, Path(folder) / "ours")
        configs = [EngineConfig(sequences=64, speculate=k) for k in (0, args.speculate)]
        settings = {"dtype": "bfloat16", "groups": alone(), "numerics": args.numerics}
        opened = [load_rollout_engine(model, config, **settings) for config in configs]
    engines, tokenizer = [engine for engine, _ in opened], opened[0][1]
    print("text, completions | times as fast | tokens a pass | on trial, right | tokens that differ, with their bits")
    for name in args.only or ["copy", "words", "noise"]:
        for count in args.counts:
            print(compared(f"{name}, {count}", engines, requests(name, count, tokenizer), args.rounds, clock))


def requests(name: str, count: int, tokenizer: Tokenizer) -> list[Request]:
    """So many requests of one kind of text, each with another prompt."""
    generator = torch.Generator().manual_seed(0)
    if name == "copy":
        text = "\n".join([PROGRAM, PROGRAM, PROGRAM[: PROGRAM.index("for")]])
        asked = [tokenizer.encode_prompt(f"# Listing {i + 1}\n{text}") for i in range(count)]
    elif name == "words":
        said = [WORDS.format(11 + i, 2 + i % 7) for i in range(count)]
        asked = [tokenizer.encode_chat([{"role": "user", "content": each}]) for each in said]
    else:
        asked = torch.randint(20, 49000, (count, 100), generator=generator).tolist()
    sampling = SamplingParams(temperature=float(name != "copy"), max_new_tokens=NEW, exact_lengths=(NEW,))
    return [Request(i, tuple(each), sampling, 0, i) for i, each in enumerate(asked)]


def compared(name: str, engines: Sequence[RolloutEngine], asked: Sequence[Request], rounds: int, clock: Clock) -> str:
    """A row of the table."""
    (_, plain, _), (_, speculated, passes) = (timed(engine, asked, clock) for engine in engines)  # and warms up
    before = engines[1].statistics
    times = [[timed(engine, asked, clock)[0] for engine in engines] for _ in range(rounds)]
    now = engines[1].statistics
    ratios = [without / given for without, given in times]
    trials, right = now.proposed_tokens - before.proposed_tokens, now.accepted_tokens - before.accepted_tokens
    pairs = list(zip(plain, speculated, strict=True))
    tokens, bits = sum(a[0] != b[0] for a, b in pairs), sum(a != b for a, b in pairs)
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    rate = (NEW - 1) / passes
    return f"{name:10} | {spread} | {rate:.2f} | {trials / rounds:.0f}, {right / rounds:.0f} | {tokens}, {bits}"


def timed(engine: RolloutEngine, asked: Sequence[Request], clock: Clock) -> tuple[float, list[tuple[int, float]], int]:
    """Seconds from the pass that gave the last first token on, all tokens with their log-probabilities, and passes."""
    engine.forget()
    found: dict[str | int, list[tuple[int, float]]] = {request.key: [] for request in asked}
    for each in asked:
        engine.add(each)
    start, passes = clock(), 0
    while engine.has_work:
        start, passes = (start, passes + 1) if all(found.values()) else (clock(), 0)
        for output in engine.step():
            if isinstance(output, TokenOutput):
                found[output.key].append((output.token, output.logp))
    return clock() - start, [each for drawn in found.values() for each in drawn], passes


if __name__ == "__main__":
    main()
