"""KV cache: operations and seconds of one more token with and without a cache, and their exponents over the context.

Behind a context of n tokens, a decoder with a cache computes one token, which attends to n others; without one it
computes all n again, the i-th of which attends to i. Multiplications and additions are counted as twice the weights
in products for each token that is computed, and 4 · head_dim · heads · layers for each pair of tokens that attends
(Narayanan et al. 2021, equation 3, forward alone; a layer with a window counts the pairs inside). Exponents are slopes
of log(cost) over log(n): those of attention are 1 with a cache and 2 without. The products, whose part is constant with
a cache, hide that at short contexts, in the operations and in the seconds.
"""

import random
import time
from typing import Annotated

from pydantic import Field

from lockstep.cluster.evaluation.studies.study import Study, StudySettings, Subject, Values
from lockstep.model.config import ModelConfig
from lockstep.model.training.flops import training_flops
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.protocol import Request


class CacheSettings(StudySettings):
    """Settings of the study."""

    context: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (64, 128, 256, 512, 1024), min_length=1, description="tokens before the one whose cost is measured"
    )
    steps: int = Field(8, ge=1, description="tokens that are decoded with a cache, whose mean time counts")


def check(model: ModelConfig, settings: CacheSettings) -> None:
    """Raises ValueError for contexts beyond the model's."""
    most = max(settings.context) + settings.steps + 1
    if most > model.context:
        raise ValueError(
            f"a context of {max(settings.context)} with {settings.steps + 1} tokens behind it needs {most} positions, "
            f"and the model has {model.context}: give shorter ones, as in --set context={model.context // 2}"
        )


def measure(subject: Subject, settings: CacheSettings, context: float, seed: int) -> Values:
    """Decode behind a random text with the cache, and compute that text without what the cache holds of it."""
    model, length = subject.engine.transformer.model, int(context)
    drawn = random.Random(f"{seed} {length}")
    text = tuple(drawn.randrange(model.vocabulary) for _ in range(length))
    first, *cached = _seconds(subject.engine, text, settings.steps + 1)
    return operations(model, length) | {
        "milliseconds, cached": 1e3 * sum(cached) / len(cached),
        "milliseconds, uncached": 1e3 * first,
    }


def operations(model: ModelConfig, length: int) -> Values:
    """Operations of one more token behind so many, in attention and in all, with and without a cache."""
    a_pair, head = 4 * model.heads * model.head_dim, 2 * model.vocabulary * model.width
    body = training_flops(model, 0) / 3 - head
    windows = [model.window_of(layer) or length for layer in range(model.layers)]
    one = float(a_pair * sum(min(length, window) for window in windows))
    every = float(a_pair * sum(min(i, window) for window in windows for i in range(1, length + 1)))
    return {
        "attention, cached": one,
        "attention, uncached": every,
        "operations, cached": body + head + one,
        "operations, uncached": body * length + head + every,
    }


def _seconds(engine: RolloutEngine, text: tuple[int, ...], new: int) -> list[float]:
    """Seconds until each token of a completion, the first of which takes a pass over a text that no cache holds."""
    engine.forget()
    engine.add(Request("timed", text, SamplingParams(exact_lengths=(new,)), 0, 0))
    found, start = list[float](), time.perf_counter()
    while engine.has_work:
        if engine.step():
            end = time.perf_counter()
            found.append(end - start)
            start = end
    return found


OF_A_TOKEN = "operations per token"
STUDY = Study(
    settings=CacheSettings,
    axis="context",
    units={
        "attention, cached": OF_A_TOKEN,
        "attention, uncached": OF_A_TOKEN,
        "operations, cached": OF_A_TOKEN,
        "operations, uncached": OF_A_TOKEN,
        "milliseconds, cached": "per token",
        "milliseconds, uncached": "per token",
    },
    measure=measure,
    check=check,
    slopes=(
        "attention, cached",
        "attention, uncached",
        "operations, cached",
        "operations, uncached",
        "milliseconds, cached",
        "milliseconds, uncached",
    ),
)
