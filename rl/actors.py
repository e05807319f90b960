"""Ray actors, each with one job: policy workers learn, rollout workers write, verifier workers judge.

A group of actors is what the controller sees. `gather` waits for all and fails with the first that fails, so that a
dead worker never leaves the others waiting unnoticed.
"""

import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from lockstep.data.batch import Sample, TokenBatch, rows_for_ranks
from lockstep.data.loader import PretrainingConfig, PretrainingData
from lockstep.data.schedule import SampleSchedule
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.saver import CheckpointConfig, Saver
from lockstep.distributed.engine import StepResult
from lockstep.distributed.groups import host_meeting, join, meeting_at
from lockstep.distributed.layout import Layout
from lockstep.distributed.trace import Trace
from lockstep.model.config import ModelConfig
from lockstep.model.flops import peak_flops
from lockstep.model.formats.recast import Recast
from lockstep.model.pretrain import PretrainConfig, Pretraining
from lockstep.model.train import (
    DTYPES,
    Objective,
    OptimizerConfig,
    Trainer,
    TrainerConfig,
    build,
    describe,
    row_rules,
)
from lockstep.rl.rollout.engine import load_rollout_engine
from lockstep.rl.rollout.sampler import SamplingConfig
from lockstep.rl.sync import Held, Shard, shards_of
from lockstep.rl.types import Prompt, Rollout
from lockstep.rl.verifiers.pool import VerifierPool
from lockstep.rl.verifiers.verdict import Verdict

ENVIRONMENT = {
    # torch gives large tensors back to the kernel after each operation and faults them in again; a heap that is kept
    # halves the time of everything that is bound by memory.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
    "KINETO_LOG_LEVEL": "99",  # the profiler would print when it starts and stops
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What worker processes are started with."""

GRACE_S = 3.0
"""After the first failure, how long others may take to be heard."""


class WorkerFailed(RuntimeError):
    """A worker raised or died; the message begins with which."""


@dataclass(frozen=True)
class Worker:
    """An actor and its name in logs and errors."""

    name: str
    handle: Any


def gather(calls: Sequence[tuple[Worker, Any]]) -> list[Any]:
    """Results of (worker, call) pairs in order, failing as soon as one of them fails.

    Raises:
        WorkerFailed: names the worker and carries its own error.
    """
    wait_for(calls)
    return [ray.get(call) for _, call in calls]


def wait_for(calls: Sequence[tuple[Worker, Any]]) -> None:
    """As `gather`, but leaves the results where they are."""
    names = {call: worker.name for worker, call in calls}
    waiting = list(names)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, fetch_local=False)
        if all(_error(call) is None for call in done):
            continue
        # The peers of a worker that died fail, too, and may do so first: the death is the cause.
        more = ray.wait(waiting, num_returns=len(waiting), timeout=GRACE_S, fetch_local=False)[0] if waiting else []
        errors = {call: error for call in [*done, *more] if (error := _error(call)) is not None}
        cause = min(errors, key=lambda call: isinstance(errors[call], ray.exceptions.RayTaskError))
        died = "" if isinstance(errors[cause], ray.exceptions.RayTaskError) else " died"
        words = re.sub("\x1b\\[[0-9;]*m", "", str(errors[cause]))  # Ray colours them wherever they go
        raise WorkerFailed(f"{names[cause]}{died}: {words}") from errors[cause]


def _error(call: Any) -> Exception | None:
    try:
        ray.get(call)
    except ray.exceptions.RayError as error:
        return error
    return None


class _Named:
    """An actor whose log lines say who speaks and at which step."""

    def __init__(self, role: str, rank: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.role, self.rank, self.step = role, rank, 0
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(self._tag)
        self.log = logging.getLogger("lockstep")
        self.log.handlers, self.log.propagate = [handler], False
        self.log.setLevel(logging.INFO)

    def _tag(self, record: logging.LogRecord) -> bool:
        record.msg = f"[{self.role} {self.rank} step {self.step}] {record.levelname.lower()}: {record.msg}"
        return True

    def pid(self) -> int:
        """Process number of this actor."""
        return os.getpid()


@ray.remote(max_restarts=0, num_cpus=0)
class PolicyWorker(_Named):
    """One rank of the trainer's world."""

    def __init__(self, layout: Layout, rank: int, threads: int, config: TrainerConfig) -> None:
        super().__init__("policy", rank, threads)
        self.layout, self.config = layout, config
        self.trace: Trace | None = None

    def host(self) -> tuple[str, int]:
        """Host the ranks' meeting; returns this node's address and the port."""
        address = ray.util.get_node_ip_address()
        self._meeting = host_meeting(address)
        return address, self._meeting.port

    def start(
        self, address: str, port: int, checkpoint: Path, dtype: str, optimizer: OptimizerConfig, temperature: float
    ) -> None:
        """Join the world and fill this rank's part of the model."""
        groups = join(self.layout, rank=self.rank, meeting=meeting_at(address, port))
        source = manager.Checkpoint(checkpoint)
        self.model = ModelConfig(**source.manifest["model"])
        self.tokenizer_files = source.files
        stage = build(
            self.model, groups, DTYPES[dtype], Recast(source, self.model, dtype) if dtype == "float32" else source
        )
        self.trainer = Trainer(stage, groups, optimizer, temperature=temperature, config=self.config)
        self.reference: Any = None
        self.log.info("ready with %s", self.layout)

    def begin_phase(self, *, keep_reference: bool) -> None:
        """Forget the optimizer's moments; with `keep_reference`, remember the weights as they are now."""
        self.trainer.engine.forget()
        if keep_reference:
            with self.trainer.engine.whole_weights():
                here = Held(self.trainer.transformer)
            self.reference = build(self.model, self.trainer.groups, self.trainer.dtype, here)

    def update(self, step: int, rows: list[TokenBatch], objective: Objective, learning_rate: float) -> StepResult:
        """One gradient step from this data rank's rows, compared with the reference where one is kept."""
        self.step = step
        return self._ended(self.trainer.step(rows, objective, learning_rate, self.reference))

    def restore(self, checkpoint: Path) -> None:
        """Take over the optimizer's state of the checkpoint that this rank started from."""
        self.trainer.restore(manager.Checkpoint(checkpoint))

    def open_text(
        self, config: PretrainConfig, data: PretrainingConfig, seed: int, done: int, samples: SampleSchedule
    ) -> None:
        """Open the text to train on, after so many steps, and begin to read ahead."""
        tokenizer = Tokenizer(self.tokenizer_files).digest if self.tokenizer_files else None
        text = PretrainingData(data, seed=seed, vocabulary=self.model.vocabulary, tokenizer=tokenizer)
        rules = row_rules(self.layout, self.config.row_tokens)
        self._pretraining = Pretraining(self.trainer, config, text, rules, done, samples)

    def pretrain(self, step: int) -> StepResult:
        """One gradient step on text."""
        self.step = step
        return self._ended(self._pretraining.step(step))

    def text(self, method: str, *args: Any) -> Any:
        """What a method of `Pretraining` returns."""
        return getattr(self._pretraining, method)(*args)

    def open_trace(self, folder: Path) -> None:
        """Trace the steps from here on; see `Trace`."""
        self.trace = Trace(folder / f"rank-{self.rank}.json")

    def close_trace(self) -> bool:
        """Whether there is a trace."""
        trace, self.trace = self.trace, None
        return trace is not None and trace.close()

    def _ended(self, result: StepResult) -> StepResult:
        """The result of a step, which ends here."""
        if self.trace:
            self.trace.step()
        return result

    def peak_flops(self) -> float:
        """Operations per second of this rank's matrix products, while the others measure theirs."""
        return peak_flops(self.trainer.dtype, next(self.trainer.transformer.parameters()).device)

    def shards(self) -> list[Shard]:
        """The pieces of the weights that this rank owns."""
        with self.trainer.engine.whole_weights():
            return shards_of(self.trainer.transformer)

    def open_checkpoints(self, folder: Path, config: CheckpointConfig) -> None:
        """Be ready to save into a folder."""
        processes = self.layout.processes
        self.saver = Saver(folder, config, rank=self.rank, ranks=processes, barrier=torch.distributed.barrier)

    def save(self, step: int, manifest: dict[str, Any], state: bool, best: bool) -> None:
        """Begin to write this rank's part of a checkpoint, with the optimizer's state or without."""
        trainer = self.trainer
        said = describe(self.model, self.layout) | {"updates": trainer.engine.updates} | manifest
        wait = not self.saver.config.asynchronous
        self.saver.save(step, trainer.chunks(state=state), said, self.tokenizer_files, wait=wait, best=best)

    def saved(self) -> None:
        """Return when this rank's part of the last checkpoint is on disk."""
        self.saver.wait()


@ray.remote(max_restarts=0, num_cpus=0)
class RolloutWorker(_Named):
    """A whole model with a KV cache that writes completions."""

    def __init__(self, rank: int, threads: int) -> None:
        super().__init__("rollout", rank, threads)

    def start(self, checkpoint: Path, dtype: str, slots: int, length: int) -> None:
        """Load the model as weight version 0."""
        self.engine = load_rollout_engine(checkpoint, dtype=dtype, slots=slots, length=length)[0]
        self.log.info("ready with %d slots", slots)

    def receive(self, version: int, *shards: list[Shard]) -> None:
        """Take over new weights."""
        self.engine.receive(version, [s for part in shards for s in part])
        self.step = version

    def generate(self, prompts: list[Prompt], sampling: SamplingConfig, samples: int, seed: int) -> list[Rollout]:
        """Completions of all prompts."""
        return list(self.engine.generate(prompts, sampling, samples=samples, seed=seed))


@ray.remote(max_restarts=0, num_cpus=0)
class VerifierWorker(_Named):
    """A pool of processes that judge answers and can be killed."""

    def __init__(self, rank: int, processes: int, deadline_s: float) -> None:
        super().__init__("verifier", rank, 1)
        self.pool = VerifierPool(processes, deadline_s)

    def grade(self, pairs: list[tuple[str, str]]) -> list[Verdict]:
        """Verdicts on (response, answer) pairs."""
        return self.pool.grade(pairs)

    def close(self) -> None:
        """End the pool's processes."""
        self.pool.close()


class Policy:
    """The trainer's world."""

    def __init__(self, layout: Layout, *, threads: int, trainer: TrainerConfig) -> None:
        self.layout, self._config = layout, trainer
        self.workers = [
            Worker(f"policy {rank}", _actor(PolicyWorker, threads).remote(layout, rank, threads, trainer))
            for rank in range(layout.processes)
        ]

    def start(
        self, checkpoint: Path, dtype: str, optimizer: OptimizerConfig, temperature: float
    ) -> list[tuple[Worker, Any]]:
        """Calls that load the checkpoint, to be gathered."""
        address, port = gather([(self.workers[0], self.workers[0].handle.host.remote())])[0]
        return [
            (w, w.handle.start.remote(address, port, checkpoint, dtype, optimizer, temperature)) for w in self.workers
        ]

    def begin_phase(self, *, keep_reference: bool) -> None:
        """See `PolicyWorker.begin_phase`."""
        gather([(w, w.handle.begin_phase.remote(keep_reference=keep_reference)) for w in self.workers])

    def call(self, method: str, *args: Any) -> list[Any]:
        """What a method of `PolicyWorker` returns on every rank."""
        return gather([(w, getattr(w.handle, method).remote(*args)) for w in self.workers])

    def update(self, step: int, samples: Sequence[Sample], objective: Objective, learning_rate: float) -> StepResult:
        """One gradient step on a global batch."""
        layout = self.layout
        rows = rows_for_ranks(samples, row_rules(layout, self._config.row_tokens))
        calls = [
            (w, w.handle.update.remote(step, rows[layout.data_rank(rank)], objective, learning_rate))
            for rank, w in enumerate(self.workers)
        ]
        return gather(calls)[0]

    def shards(self) -> list[Any]:
        """References to every rank's pieces of the weights."""
        calls = [(w, w.handle.shards.remote()) for w in self.workers]
        wait_for(calls)
        return [call for _, call in calls]


class Rollouts:
    """Rollout workers that share the prompts."""

    def __init__(self, workers: int, *, threads: int) -> None:
        self.workers = [
            Worker(f"rollout {rank}", _actor(RolloutWorker, threads).remote(rank, threads)) for rank in range(workers)
        ]
        self.version = 0

    def start(self, checkpoint: Path, dtype: str, slots: int, length: int) -> list[tuple[Worker, Any]]:
        """Calls that load the checkpoint, to be gathered."""
        return [(w, w.handle.start.remote(checkpoint, dtype, slots, length)) for w in self.workers]

    def receive(self, shards: list[Any]) -> None:
        """Give every worker the next version of the weights."""
        self.version += 1
        gather([(w, w.handle.receive.remote(self.version, *shards)) for w in self.workers])

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, samples: int, seed: int) -> list[Rollout]:
        """Completions of all prompts, in the order of (prompt, sample)."""
        count = len(self.workers)
        calls = [
            (w, w.handle.generate.remote(list(prompts[i::count]), sampling, samples, seed))
            for i, w in enumerate(self.workers)
            if prompts[i::count]
        ]
        found = [rollout for part in gather(calls) for rollout in part]
        order = {p.index: i for i, p in enumerate(prompts)}
        return sorted(found, key=lambda r: (order[r.prompt.index], r.sample))


class Verifiers:
    """Verifier workers that share the answers."""

    def __init__(self, workers: int, processes: int, deadline_s: float) -> None:
        self.workers = [
            Worker(
                f"verifier {rank}",
                _actor(VerifierWorker, 1).remote(rank, processes, deadline_s),
            )
            for rank in range(workers)
        ]

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts on (response, answer) pairs, in order."""
        count = len(self.workers)
        calls = [(w, w.handle.grade.remote(list(pairs[i::count]))) for i, w in enumerate(self.workers)]
        verdicts: list[Any] = [None] * len(pairs)
        for i, part in enumerate(gather(calls)):
            verdicts[i::count] = part
        return verdicts

    def close(self) -> None:
        """End all grading processes."""
        gather([(w, w.handle.close.remote()) for w in self.workers])


def _actor(kind: Any, threads: int) -> Any:
    """The actor class, to be started in a process with this many threads."""
    return kind.options(runtime_env={"env_vars": ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}})


def threads_for(processes: int) -> int:
    """Threads of each of `processes` that work at the same time on this machine."""
    return max(1, (os.cpu_count() or 1) // processes)
