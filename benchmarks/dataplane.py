"""What the driver of RL costs where everything else is as large as a cluster: real collector, learner and controller.

    python benchmarks/dataplane.py step --prompts 512 --samples 16 --tokens 8192
    python benchmarks/dataplane.py busy
    python benchmarks/dataplane.py wait

Engines, models and verifiers are simulated, in Ray processes of their own (`simulated.py`). `step` runs whole steps
of RL and prints the driver's processor time and memory. `busy` runs asynchronous RL over engines that sleep, with a
trainer three times as slow and three times as fast as they write, and prints the share of the time in which an engine
had work that it computed in: in the real rollout worker, and in one that runs inside of calls. `wait` prints what an
event costs where 1 to 256 engines are waited for.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Event, Thread
from typing import Any

import numpy as np
import psutil
import ray
import simulated

from lockstep.distributed.layout import Layout
from lockstep.model.training.config import TrainerConfig
from lockstep.rl.algorithms.config import FlowConfig, RLConfig
from lockstep.rl.algorithms.rewards import Rewards
from lockstep.rl.algorithms.samples import teaches
from lockstep.rl.collector.batch_scheduler import BatchScheduler
from lockstep.rl.collector.collector import Collector
from lockstep.rl.learner import Learner, Models
from lockstep.rl.remote import Processes, any_of, gather, start
from lockstep.rl.rollout.config import RolloutConfig, SamplingParams
from lockstep.rl.types import Prompt, own_logp
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.workers.worker_groups import ModelGroup, RolloutGroup, VerifierGroup

ROW = 16_384
"""Tokens of a row."""
ENGINES = 2
"""Of a run of `busy`, in processes of their own."""
PASS_S, SEQUENCES = 0.02, 16
"""Of such an engine."""


class Rollouts(RolloutGroup):
    """Teams of one simulated worker each."""

    def __init__(self, kind: type[Any], count: int, *given: Any) -> None:
        self._made = kind, given
        super().__init__(RolloutConfig(workers=count))

    def _team(self, number: int) -> list[Any]:
        kind, given = self._made
        return start(kind, Processes("rollout", [number], 1), *given)


class Verifiers(VerifierGroup):
    """Simulated verifiers."""

    def _worker(self, number: int) -> Any:
        return start(simulated.Verifier, Processes("verifier", [number], 1))[0]


class Policy(ModelGroup):
    """Simulated data ranks of a policy."""

    def __init__(self, ranks: int, seconds: float) -> None:
        self.layout, self._config = Layout(data=ranks), TrainerConfig(row_tokens=ROW)
        self.workers = start(simulated.Model, Processes("policy", range(ranks), 1), seconds)


def stack(rollouts: RolloutGroup, policy: ModelGroup, config: RLConfig) -> tuple[Collector, BatchScheduler, Learner]:
    """The parts of a driver, as `Controller` joins them."""
    collector = Collector(policy, rollouts, Verifiers(VerifierConfig()))
    learner = Learner(policy, Models(), collector.gather, 0, Rewards())
    prompts = [Prompt(n, simulated.WORD * 300, tuple(range(n, n + 300)), "4") for n in range(config.prompts_per_step)]
    stream = BatchScheduler(
        collector,
        lambda number: prompts[number % len(prompts)],
        config.flow,
        groups=config.prompts_per_step,
        samples=config.group_size,
        sampling=config.sampling,
        seed=1,
        reward=partial(learner.rewarded, config=config),
        teaches=partial(teaches, config=config),
    )
    learner.enter(config)
    learner.begin(config)
    return collector, stream, learner


def take_step(step: int, collector: Collector, stream: BatchScheduler, learner: Learner, config: RLConfig) -> float:
    """One step of RL; returns the mean of its log-probabilities, for which every column is read."""
    batch = stream.batch()
    learned = learner.learn(step, batch.groups, batch.teaching, config)
    collector.renew(finish=config.flow.in_waves)
    return float(np.mean([own_logp(s.rollout).mean() for group in learned.groups for s in group]))


def measure_step(arguments: argparse.Namespace) -> None:
    """Whole steps; processor time of the driver by `os.times`, and the most memory that it had of its own."""
    config = RLConfig(
        steps=10**6,
        prompts_per_step=arguments.prompts,
        group_size=arguments.samples,
        sampling=SamplingParams(max_new_tokens=arguments.tokens),
    )
    policy = Policy(arguments.ranks, 0.0)
    parts = stack(Rollouts(simulated.Columns, 2, 1e9, 64), policy, config)
    tokens = arguments.prompts * arguments.samples * arguments.tokens
    for step in range(1, arguments.steps + 1):
        began, used = time.perf_counter(), sum(os.times()[:2])
        with most_memory() as peak:
            take_step(step, *parts, config)
        spent, wall = sum(os.times()[:2]) - used, time.perf_counter() - began
        print(
            f"step {step}: {tokens:,} tokens in {wall:.0f} s of all roles on {os.cpu_count()} cores; driver: "
            f"{spent:.1f} s of processor ({1e6 * spent / tokens:.3f} µs a token, or 5% of what writes "
            f"{tokens / 20 / spent:,.0f} tokens/s), {peak[0] / 1e9:.2f} GB at most",
            flush=True,
        )


@contextmanager
def most_memory() -> Iterator[list[int]]:
    """The most memory of this process within a block, in bytes: what it has alone, and its part of what it shares."""
    process, peak = psutil.Process(), [0]

    def look() -> None:
        peak[0] = max(peak[0], process.memory_full_info().pss)

    with looking(look, 0.2):
        yield peak


@contextmanager
def looking(look: Callable[[], None], seconds: float) -> Iterator[None]:
    """Calls a function again and again within a block, from a thread."""
    over = Event()

    def run() -> None:
        while not over.wait(seconds):
            look()

    thread = Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def measure_busy(arguments: argparse.Namespace) -> None:
    """Share of the time in which an engine had work and computed, with engines in threads and inside of calls."""
    written = SEQUENCES * ENGINES / PASS_S
    config = RLConfig(
        steps=10**6,
        prompts_per_step=8,
        group_size=8,
        flow=FlowConfig(mode="asynchronous", max_staleness=4),
        sampling=SamplingParams(max_new_tokens=180),
    )
    usual = 8 * 8 * 100 / written
    for name, seconds in (("three times as slow", 3 * usual), ("three times as fast", usual / 3)):
        for kind in (simulated.Called, simulated.Asleep):
            shares = [busy_share(kind, seconds, config, arguments.steps) for _ in range(arguments.repeats)]
            print(f"trainer {name}, {kind.__name__}: busy {statistics.median(shares):.1%} of {shares}", flush=True)


def busy_share(kind: type[Any], seconds: float, config: RLConfig, steps: int) -> float:
    """Seconds in which engines computed, by those in which they had something to write."""
    rollouts, policy = Rollouts(kind, ENGINES, PASS_S, SEQUENCES), Policy(1, seconds)
    collector, stream, learner = stack(rollouts, policy, config)
    workers = [team[0] for team in rollouts.teams]
    take_step(1, collector, stream, learner, config)
    before = sum(gather([w.call(simulated.Asleep.seconds) for w in workers]))
    with worked(collector) as total:
        for step in range(2, steps + 2):
            take_step(step, collector, stream, learner, config)
            time.sleep(0.2)  # what a driver does of its own: it saves and reports
    computed = sum(gather([w.call(simulated.Asleep.seconds) for w in workers])) - before
    for worker in (*workers, *policy.workers):
        worker.end()
    return computed / total[0]


@contextmanager
def worked(collector: Collector) -> Iterator[list[float]]:
    """Seconds in which engines had requests that they had not handed in, added up over engines."""
    total, last, teams = [0.0], [time.perf_counter()], collector._rollouts._teams

    def look() -> None:
        now = time.perf_counter()
        total[0] += (now - last[0]) * sum(bool(team.unwritten) for team in teams)
        last[0] = now

    with looking(look, 0.002):
        yield total


def measure_wait(arguments: argparse.Namespace) -> None:
    """Microseconds of the driver for each event, by how many calls it waits for."""
    for count in (1, 4, 16, 64, 256):
        (sleeper,) = start(simulated.Sleeper, Processes("sleeper", [0], 1, together=count))
        calls = [sleeper.call(simulated.Sleeper.nap, 0.0) for _ in range(count)]
        events, spent = 0, 0.0
        while events < arguments.events:
            used = sum(os.times()[:2])
            ended = any_of(calls)
            spent += sum(os.times()[:2]) - used
            events += len(ended)
            calls = [call for call in calls if call not in ended]
            calls += [sleeper.call(simulated.Sleeper.nap, 0.01 * count) for _ in ended]
        print(f"{count:4d} engines: {1e6 * spent / events:.0f} µs of waiting an event", flush=True)
        sleeper.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    step = commands.add_parser("step")
    step.add_argument("--prompts", type=int, default=512)
    step.add_argument("--samples", type=int, default=16)
    step.add_argument("--tokens", type=int, default=8192)
    step.add_argument("--ranks", type=int, default=2)
    step.add_argument("--steps", type=int, default=2)
    step.set_defaults(run=measure_step)
    busy = commands.add_parser("busy")
    busy.add_argument("--steps", type=int, default=6)
    busy.add_argument("--repeats", type=int, default=3)
    busy.set_defaults(run=measure_busy)
    wait = commands.add_parser("wait")
    wait.add_argument("--events", type=int, default=3000)
    wait.set_defaults(run=measure_wait)
    arguments = parser.parse_args()
    ray.init("local", include_dashboard=False, log_to_driver=False, num_cpus=1)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
