"""The work that every engine is given: prompts of random tokens, and exactly as many new tokens for each.

Loads the standard library alone, so that every environment can have it.
"""

import random
from typing import Any, TypedDict

SEQUENCES, ALONE = 64, 64
REPEATS = {"batch": 2, "alone": 3}
"""Times that each kind of work is done in one process, of which the fastest counts."""


class Completion(TypedDict):
    """What is asked for, and how much of it."""

    prompt: list[int]
    new: int


class Job(TypedDict):
    """What a child process is given, as a file of JSON."""

    model: str
    """A checkpoint of ours, a Hugging Face folder or an OpenVINO folder: what the engine reads."""
    dtype: str
    threads: int
    passes: int
    """Decoding passes that are compared with their bound, where the engine is ours; 0 leaves this out."""
    settings: dict[str, Any]
    """Of the engine."""
    warm_up: list[Completion]
    work: dict[str, list[list[Completion]]]
    """For each kind of work the completions that run together, once for each time that it is done."""


def lengths(count: int) -> list[tuple[int, int]]:
    """Tokens of each prompt and completion; for 64 from 8 to 134, and from 16 to 142."""
    return [(8 + 2 * (i * 37 % count), 16 + 2 * (i * 23 % count)) for i in range(count)]


def prompt(length: int, seed: int, vocabulary: int) -> list[int]:
    """Random tokens behind the first twenty, which are control tokens in many vocabularies."""
    draw = random.Random(seed)
    return [draw.randrange(20, vocabulary) for _ in range(length)]


def work(vocabulary: int, count: int) -> dict[str, list[list[Completion]]]:
    """A batch of `count` completions of mixed lengths, and one alone; no two prompts begin alike."""
    seeds = iter(range(10**9))

    def asked(length: int, new: int) -> Completion:
        return {"prompt": prompt(length, next(seeds), vocabulary), "new": new}

    sizes = {"batch": lengths(count), "alone": [(30, ALONE)]}
    return {kind: [[asked(*size) for size in sizes[kind]] for _ in range(n)] for kind, n in REPEATS.items()}
