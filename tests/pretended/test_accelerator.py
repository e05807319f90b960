"""On a pretended accelerator training, saving and rollouts mix no devices, wait no more than is listed, and agree.

The numbers are those of the same work on the CPU, bit for bit, where that computes as an accelerator does: without the
loops of `kernels.c`, by torch's attention whatever a document's length, and by its plain products.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lockstep.data.batch import TokenBatch
from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.tensors import digest, to_numpy
from lockstep.distributed.device import take_device
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.attention import packed
from lockstep.model.loading import build, transformer_of
from lockstep.model.objectives.objective import LossInputs, Report
from lockstep.model.objectives.token_loss import nll
from lockstep.model.ops import upcast
from lockstep.model.ops.cpu import kernels
from lockstep.model.training import device_batch
from lockstep.model.training import trainer as trainer_module
from lockstep.model.training.config import row_rules
from lockstep.model.training.device_batch import DeviceBatch, DeviceRows, to_device
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.protocol import Request
from lockstep.rl.weight_sync.shards import shards_of
from tests.distributed.test_parity import global_batch
from tests.model.training.test_optimizer_state import ADAMW, MODELS, Losses, check_equal, resumed, straight, trainer_of
from tests.pretended.device import Move, watched
from tests.pretended.worlds import PretendedPool

ROW = 48
"""Tokens of a row at most, of which each rank gets several."""


@dataclass(frozen=True)
class Training:
    """What some steps came to on a rank; the last was watched."""

    losses: list[tuple[float, float]]
    weights: list[str]
    """Digests of all parameters."""
    device: torch.device
    rows: int
    waits: Counter[str]
    moved: list[Move]


@contextmanager
def operations_of_an_accelerator() -> Iterator[None]:
    """Within this block a CPU computes as an accelerator does: no loops of a CPU, torch's products and attention."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(kernels, "usable", lambda *_: False))
        if not torch.cuda.is_available():
            stack.enter_context(patch.object(packed, "LONGEST_IN_FULL", 0))
            stack.enter_context(patch.object(upcast, "has_bf16_kernels", lambda: True))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def rows_of(groups: Groups, step: int) -> list[TokenBatch]:
    return rows_for_ranks(global_batch(61, step), row_rules(groups.layout, ROW))[groups.data_rank]


def step(trainer: Trainer, number: int) -> tuple[float, float]:
    result = trainer.step(rows_of(trainer.groups, number), nll, 1e-3)
    return result.values["loss"], result.grad_norm


def digests(trainer: Trainer) -> list[str]:
    with trainer.engine.whole_weights():
        return [digest(to_numpy(parameter)) for parameter in trainer.transformer.parameters()]


def trained(groups: Groups, name: str, dtype: str, steps: int = 3) -> Training:
    """From the second step on ZeRO-3 knows the order of modules, and fetches them ahead."""
    trainer = trainer_of(groups, name, dtype, ADAMW, RandomWeights(MODELS[name], seed=1))
    with operations_of_an_accelerator():
        losses = [step(trainer, number) for number in range(1, steps)]
        with watched() as watch:
            losses.append(step(trainer, steps))
    device = next(trainer.transformer.parameters()).device
    return Training(losses, digests(trainer), device, len(rows_of(groups, steps)), watch.waits, watch.moved)


OF_A_STEP = {
    "distributed.optimizer.grad_norm.PartNorms.squares: copy to the host": 1,  # for clipping, the result, all readers
    "distributed.engine.Engine._reduced: copy to the host": 2,  # sums and peaks that the objective reports
    "distributed.engine.Engine._most_memory: copy to the device": 1,
    "distributed.engine.Engine._most_memory: _local_scalar_dense": 1,
}
ZERO_2 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
ZERO_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
OF_A_ROW = {
    # Gradients are reduced on a stream of their own; the end of a backward pass waits for it.
    2: {f"{ZERO_2}.independent_gradient_partition_epilogue: synchronize": 1},
    3: {f"{ZERO_3}.independent_gradient_partition_epilogue: stream": 1},
}
OFFLOADED = {
    # DeepSpeed looks for overflows in each gradient of this rank's share, and waits for its copy to the host.
    (2, 0): {
        f"{ZERO_2}.update_offload_overflow_tracker: _local_scalar_dense": 19,
        f"{ZERO_2}._wait_for_offload_copies: event": 19,
    },
    (2, 1): {
        f"{ZERO_2}.update_offload_overflow_tracker: _local_scalar_dense": 21,
        f"{ZERO_2}._wait_for_offload_copies: event": 21,
    },
    # New weights, of each group of parameters.
    (3, 0): {f"{ZERO_3}._reassign_or_swap_out_partitioned_parameters: copy to the device": 2},
    (3, 1): {f"{ZERO_3}._reassign_or_swap_out_partitioned_parameters: copy to the device": 2},
}


def expected(layout: Layout, rank: int, rows: int, experts: bool) -> Counter[str]:
    """The waits of a step that we know of, and who makes them."""
    waits = Counter(OF_A_STEP)
    if layout.pipeline > 1:  # megatron-core waits before and after what it exchanges
        waits["megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator._communicate: synchronize"] = rows + 1
        if rank == 0:  # only the last stage reports
            del waits["distributed.engine.Engine._reduced: copy to the host"]
    if experts:  # how many tokens each expert gets, or sends and gets: in each of two blocks
        waits["model.layers.moe.MoE._mixed: bincount"] = 2 * rows
        waits["model.layers.moe.MoE._visited: copy to the host"] = 2 * rows
    waits.update({who: count * rows for who, count in OF_A_ROW.get(layout.zero, {}).items()})
    if layout.offload:
        waits.update(OFFLOADED[layout.zero, rank])
        waits["distributed.optimizer.grad_norm.PartNorms.squares: copy to the device"] = 1  # sums of the host
    return waits


OPERATIONS_OF_A_ROW = 100
"""Fewer than the forward pass of a row launches, and more than its preparation does."""


def goes(training: Training) -> int:
    """How often rows were moved to the device: once for each, after the one before it has been computed."""
    times = [move.launched for move in training.moved if move.who == "model.training.device_batch.to_device"]
    return 1 + sum(later - earlier > OPERATIONS_OF_A_ROW for earlier, later in pairwise(times))


def problem(training: Training, layout: Layout, rank: int, experts: bool = False) -> str:
    """What is wrong with a rank's training, its numbers aside; empty where nothing is."""
    if training.device != torch.device("cuda", rank):
        return f"the model is on {training.device}"
    for move in training.moved:
        if not move.who.startswith("deepspeed.") and len(move.shape) > 1:
            return f"{move.who} moves {list(move.shape)} in {move.dtype}, and not a number for each token"
    if goes(training) != training.rows:
        return f"{training.rows} rows are moved in {goes(training)} goes"
    known = expected(layout, rank, training.rows, experts)
    if training.waits != known:
        return f"waits are new: {dict(training.waits - known)}, or gone: {dict(known - training.waits)}"
    return ""


TRAININGS = [
    ("dense", "float32", Layout(data=2, zero=0)),
    ("dense", "bfloat16", Layout(data=2, zero=3)),
    ("dense", "bfloat16", Layout(data=2, zero=2, offload=True)),
    ("dense", "bfloat16", Layout(data=2, zero=3, offload=True)),
    ("dense", "bfloat16", Layout(tensor=2, sequence=True)),
    ("dense", "bfloat16", Layout(pipeline=2)),
    ("dense", "bfloat16", Layout(context=2)),
    ("experts", "bfloat16", Layout(expert=2)),
]
MORE = [
    *(("dense", "float32", Layout(data=2, zero=zero)) for zero in (1, 2, 3)),
    *(("dense", "bfloat16", Layout(data=2, zero=zero)) for zero in (0, 1, 2)),
    ("experts", "float32", Layout(data=2, zero=0)),
    ("experts", "bfloat16", Layout(data=2, zero=3)),
]
TRAININGS += [pytest.param(*given, marks=pytest.mark.exhaustive) for given in MORE]


@pytest.mark.parametrize(("name", "dtype", "layout"), TRAININGS, ids=str)
def test_steps_are_those_of_the_cpu(
    worlds: RankPool, pretended: PretendedPool, name: str, dtype: str, layout: Layout
) -> None:
    there = pretended.run(layout, trained, name, dtype)
    for rank, (on_cpu, training) in enumerate(zip(worlds.run(layout, trained, name, dtype), there, strict=True)):
        assert training.losses == on_cpu.losses
        assert training.weights == on_cpu.weights
        assert training.rows > 1
        assert not problem(training, layout, rank, name == "experts")


def straight_on(groups: Groups, folder: Path, name: str) -> Losses:
    with operations_of_an_accelerator():
        return straight(groups, folder, name, "bfloat16", ADAMW)


def resumed_on(groups: Groups, source: Path, target: Path, name: str) -> Losses:
    with operations_of_an_accelerator():
        return resumed(groups, source, target, name, "bfloat16", ADAMW)


SAVED = [
    pytest.param("dense", Layout(data=2, zero=0), marks=pytest.mark.exhaustive),
    pytest.param("dense", Layout(data=2, zero=3), marks=pytest.mark.exhaustive),
    pytest.param("dense", Layout(data=2, zero=2, offload=True), marks=pytest.mark.exhaustive),
    ("dense", Layout(data=2, zero=3, offload=True)),
    ("experts", Layout(expert=2, zero=1)),
]


@pytest.mark.parametrize(("name", "layout"), SAVED, ids=str)
def test_checkpoints_are_those_of_the_cpu_and_training_goes_on_from_them(
    worlds: RankPool, pretended: PretendedPool, tmp_path: Path, name: str, layout: Layout
) -> None:
    kinds = {"master", "exp_avg", "exp_avg_sq"}
    losses = pretended.run(layout, straight_on, tmp_path / "there", name)
    assert losses == worlds.run(layout, straight_on, tmp_path / "here", name)
    check_equal(Checkpoint(tmp_path / "there"), Checkpoint(tmp_path / "here"), kinds)
    assert pretended.run(layout, resumed_on, tmp_path / "there", tmp_path / "again", name) == losses
    check_equal(Checkpoint(tmp_path / "there"), Checkpoint(tmp_path / "again"), kinds)


def undone(groups: Groups) -> list[tuple[tuple[float, float], list[str]]]:
    """A step, and the same once more after it has been undone."""
    trainer = trainer_of(groups, "dense", "bfloat16", ADAMW, RandomWeights(MODELS["dense"], seed=1))
    step(trainer, 1)
    snapshot = trainer.engine.snapshot()
    first = step(trainer, 2), digests(trainer)
    snapshot.restore()
    return [first, (step(trainer, 2), digests(trainer))]


@pytest.mark.parametrize("layout", [Layout(data=2, zero=2, offload=True), Layout(data=2, zero=3)], ids=str)
def test_steps_can_be_undone(pretended: PretendedPool, layout: Layout) -> None:
    for first, again in pretended.run(layout, undone):
        assert first == again


@dataclass(frozen=True)
class Served:
    """What a rollout engine came to with the weights of a policy, and the waits of each part of it."""

    digest: str
    outputs: list[Any]
    waits: dict[str, Counter[str]]


def served(groups: Groups) -> Served:
    """Weights of a policy after a step go to a rollout engine, which reads prompts and decodes."""
    trainer = trainer_of(groups, "dense", "float32", ADAMW, RandomWeights(MODELS["dense"], seed=1))
    transformer = transformer_of(build(MODELS["dense"], groups, torch.float32, RandomWeights(MODELS["dense"], seed=2)))
    engine = RolloutEngine(transformer, EngineConfig(sequences=3, length=60, cache_gib=0.001), decode=str)
    draws = SamplingParams(max_new_tokens=4), SamplingParams(max_new_tokens=5, top_p=0.9, temperature=0.7)
    requests = [Request(key, tuple(range(1, 2 + 9 * key)), draws[key % 2], seed=key, sample=0) for key in range(3)]
    waits: dict[str, Counter[str]] = {}
    parts: list[Any] = [None] * groups.layout.processes
    with operations_of_an_accelerator():
        step(trainer, 1)
        with watched() as watch, trainer.engine.whole_weights():
            shards = shards_of(trainer.transformer)
        waits["sending"] = watch.waits
        torch.distributed.all_gather_object(parts, shards)
        with watched() as watch:
            engine.receive(1, [*chain(*parts)])
        waits["receiving"] = watch.waits
        for request in requests:
            engine.add(request)
        outputs = []
        for name in ("prefill", "decode"):
            with watched() as watch:
                outputs += engine.step()
            waits[name] = watch.waits
        while engine.has_work:
            outputs += engine.step()
    return Served(engine.weights_digest(), outputs, waits)


TENSORS = 58
"""Logical tensors of the model."""
OF_DRAWING = {
    # Options of requests: rows of a kind, uniform numbers, temperatures.
    "rl.rollout.sampling.sampler.draw: copy to the device": 6,
    "rl.rollout.sampling.sampler._picked: copy to the device": 2,
    "rl.rollout.sampling.sampler._uniform: copy to the device": 2,
    "rl.rollout.sampling.sampler._truncated: copy to the device": 2,
    "rl.rollout.sampling.sampler._over_temperature: copy to the device": 1,
    "rl.rollout.sampling.sampler._bounds: copy to the device": 1,
    "rl.rollout.sampling.parallel_sampler.ParallelSampler._policy: copy to the device": 8,
    # Whether activations are numbers, whether there is a token to draw, and how many make up top_p.
    "rl.rollout.sampling.prompt_scorer.PromptScorer.__call__: copy to the host": 1,
    "rl.rollout.sampling.sampler._are_numbers: _local_scalar_dense": 2,
    "rl.rollout.sampling.sampler._nucleus: _local_scalar_dense": 1,
    # Tokens and their log-probabilities under policy and sampling.
    "rl.rollout.sampling.draws.reported: copy to the host": 3,
}
GATHERED = {"deepspeed.runtime.zero.partition_parameters.Init._allgather_params_coalesced: synchronize": 1}
OF_SENDING = [GATHERED | {"distributed.checkpoint.tensors.to_numpy: copy to the host": TENSORS}, GATHERED]
"""The first rank owns all weights."""
WAITS_OF_ROLLOUTS = {
    "receiving": {
        "rl.weight_sync.receiver._write: copy to the device": TENSORS,
        "distributed.checkpoint.tensors.to_numpy: copy to the host": TENSORS,  # read back for the digests
    },
    "prefill": OF_DRAWING,
    "decode": OF_DRAWING,
}


def test_rollouts_are_those_of_the_cpu(worlds: RankPool, pretended: PretendedPool) -> None:
    layout = Layout(data=2, zero=3)
    on_cpu = worlds.run(layout, served)
    for rank, (there, here) in enumerate(zip(pretended.run(layout, served), on_cpu, strict=True)):
        assert there.digest == here.digest
        assert there.outputs == here.outputs
        assert len(there.outputs) == 4 + 5 + 4
        assert there.waits == WAITS_OF_ROLLOUTS | {"sending": OF_SENDING[rank]}


Plant = Callable[[Groups], AbstractContextManager[Any]]


def trained_with(groups: Groups, plant: Plant) -> str:
    """What is found of a fault that all ranks have: an error, or what `problem` says."""
    with plant(groups):
        try:
            return problem(trained(groups, "dense", "float32", steps=1), groups.layout, groups.rank)
        except (RuntimeError, ValueError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            take_device(groups.rank)


@contextmanager
def another_current_device(groups: Groups) -> Iterator[None]:
    """Nobody sets the device, which is another rank's."""
    torch.cuda.set_device(1 - groups.rank)
    os.environ["LOCAL_RANK"] = str(1 - groups.rank)
    yield


@contextmanager
def global_rank_as_local(groups: Groups) -> Iterator[None]:
    """On the second host of two, with two devices each."""
    os.environ["LOCAL_RANK"] = str(groups.rank + 2)
    yield


def rows_elsewhere(groups: Groups) -> AbstractContextManager[Any]:
    """Rows are moved to the device of another rank."""

    def moved(row: TokenBatch, groups: Groups, kv_heads: int, device: torch.device, *args: Any) -> DeviceBatch:
        return to_device(row, groups, kv_heads, torch.device("cuda", 1 - groups.rank), *args)

    return patch.object(device_batch, "to_device", moved)


def mask_of_the_host(groups: Groups) -> AbstractContextManager[Any]:
    """The mask of each document, queries x keys in fp32, is made on the host."""
    make = packed._SegmentBatch._bias

    def made(batch: Any, window: int | None, dtype: torch.dtype) -> Tensor:
        first_N, last_N, batch._biases = batch._first_N, batch._last_N, {}
        batch._first_N, batch._last_N = first_N.cpu(), last_N.cpu()
        mask = make(batch, window, torch.float32).to(first_N.device).to(dtype)
        batch._first_N, batch._last_N, batch._biases = first_N, last_N, {}
        return mask

    return patch.object(packed._SegmentBatch, "_bias", made)


def all_rows_at_once(groups: Groups) -> AbstractContextManager[Any]:
    """All rows of a step are moved before the first is computed."""
    return patch.object(trainer_module, "DeviceRows", lambda *args: list(DeviceRows(*args)))


def loss_that_is_read(groups: Groups) -> AbstractContextManager[Any]:
    """Somebody reads the loss of each micro-batch."""
    loss = nll

    def read(logp_K: Tensor, inputs: LossInputs) -> tuple[Tensor, Report]:
        value, report = loss(logp_K, inputs)
        return value * float(value > 0), report

    return patch.object(sys.modules[__name__], "nll", read)


def without_fault(groups: Groups) -> AbstractContextManager[Any]:
    return nullcontext()


FAULTS = [
    (without_fault, ""),
    (another_current_device, "cuda:"),
    (global_rank_as_local, "invalid device ordinal"),
    (rows_elsewhere, "cuda:"),
    (mask_of_the_host, "in torch.float32, and not a number for each token"),
    (all_rows_at_once, "goes"),
    (loss_that_is_read, "waits are new"),
]


@pytest.mark.parametrize(("plant", "found"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_faults_are_found(pretended: PretendedPool, plant: Plant, found: str) -> None:
    for said in pretended.run(Layout(data=2, zero=1), trained_with, plant):
        assert (found in said) if found else not said, said
