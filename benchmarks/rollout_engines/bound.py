"""What bounds a decoding pass of Lockstep: the matrix products of its shapes, and its keys and values read once."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypedDict, get_args

import torch
import torch.nn.functional as F

from lockstep.model.config import Numerics
from lockstep.model.ops.linear import packed
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.protocol import Request

Product = Callable[[torch.Tensor], Any]


class Decoding(TypedDict):
    """Tokens a second of passes that only decode."""

    speed: float
    bound: float


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def decoding(engine: RolloutEngine, requests: Sequence[Request], context: int, passes: int) -> Decoding:
    """Time decoding passes and what bounds them in turns, since others on the machine take of its memory's rate.

    Products are computed on packed weights that follow one another as they do in the model, by whichever library is
    faster; for one completion the weights are read, if the memory allows that faster. Keys and values, and such
    weights, take their bytes over the rate of a sum over 512 MB.

    Args:
        requests: all of one length, to be run together.
        context: tokens of each prompt.
        passes: how many are timed; medians count.
    """
    start(engine, requests)
    count, weights, numbers = len(requests), weights_of(engine), torch.ones(128 << 20)
    work = [engine.step, numbers.sum, *products(weights, count)]
    times = [[seconds(each) for each in work] for _ in range(passes)]
    step, summed, *multiplied = (statistics.median(column) for column in zip(*times, strict=True))
    while engine.has_work:
        engine.step()
    rate = numbers.nbytes / summed
    if count == 1:
        multiplied.append(sum(weight.nbytes for weight in weights) / rate)
    model = engine.transformer.model
    held = 2 * model.layers * model.kv_heads * model.head_dim * weights[0].itemsize
    read = count * (context + passes // 2) * held / rate
    return {"speed": count / step, "bound": count / (min(multiplied) + read)}


def start(engine: RolloutEngine, requests: Sequence[Request]) -> None:
    """Run requests until all prompts have been read."""
    for each in requests:
        engine.add(each)
    before = engine.statistics.generated_tokens
    while (
        engine.statistics.generated_tokens == before
        or engine.statistics.waiting
        or any(s.known - s.cached > 1 for s in engine._scheduler.running)
    ):
        engine.step()


def weights_of(engine: RolloutEngine) -> list[torch.Tensor]:
    """The matrices that a pass multiplies with."""
    layers = [
        m
        for b in engine.transformer.blocks.values()
        for m in (b.attention.qkv, b.attention.out, b.mlp.gate_up, b.mlp.down)
    ]
    return [*(m.weight for m in layers), engine.transformer.head_weight]


def products(weights: Sequence[torch.Tensor], rows: int) -> list[Callable[[], Any]]:
    """All matrix products of a pass over so many rows: by torch, and by oneDNN and our kernels where they pack."""
    inputs = [torch.randn(rows, weight.shape[1], dtype=weight.dtype) for weight in weights]

    @torch.inference_mode()
    def multiply(way: Sequence[Product]) -> None:
        for product, x in zip(way, inputs, strict=True):
            product(x)

    ways: list[list[Product]] = [[partial(F.linear, weight=weight) for weight in weights]]
    for numerics in get_args(Numerics):
        copies = [packed(weight, numerics) for weight in weights]
        ways += [[copy for copy in copies if copy]] if all(copies) else []
    return [partial(multiply, way) for way in ways]
