"""Computes the sequences of a forward pass that failed again, one at a time, so that only those end that fail again.

An exception does not say whose tokens it is about. Whatever the failed pass has written is overwritten, and keys and
values of all that ran are computed again from the first token on: no sequence learns that there was a failure.
"""

import logging
import traceback
from collections.abc import Callable, Iterable

from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.model_runner import ModelRunner
from lockstep.rl.rollout.protocol import Output, Request
from lockstep.rl.rollout.scheduling.plan import Plan, SequenceState
from lockstep.rl.rollout.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

NEUTRAL = 0
"""A token that every vocabulary has."""


def one_by_one(
    error: Exception,
    scheduler: Scheduler,
    runner: ModelRunner,
    compute: Callable[[Plan], list[Output]],
    fail: Callable[[SequenceState, Exception], Output],
) -> list[Output]:
    """Compute what the last plan was to compute, each sequence by itself; who finds no room now waits.

    Args:
        error: that the pass of that plan raised.
        compute: runs a pass, and returns its outputs.
        fail: ends a sequence that cannot go on, and returns its output.

    Raises:
        Exception: `error`, where a pass of one neutral token fails, too. The model or its device is broken then, and no
            sequence is to blame: none has ended.
    """
    running = [(sequence, sequence.cached) for sequence in scheduler.running]
    log.warning("a pass of %d sequences failed: each is computed again by itself", len(running), exc_info=error)
    traceback.clear_frames(error.__traceback__)  # the tensors of the pass, whose memory may have been what was lacking
    doubtful = _blocks(scheduler, (sequence for sequence, _ in running))
    scheduler.restart()
    runner.clear(doubtful)
    if not _works(scheduler, runner):
        raise error
    found: list[Output] = []
    for sequence, cached in running:
        try:
            found += _computed(sequence, cached, scheduler, compute)
        except Exception as own:
            found.append(fail(sequence, own))
    return found


def _computed(
    sequence: SequenceState, cached: int, scheduler: Scheduler, compute: Callable[[Plan], list[Output]]
) -> list[Output]:
    """Outputs of passes over a sequence alone, until so many of its tokens are cached or it has an output."""
    while plan := scheduler.plan_alone(sequence):
        found = compute(plan)
        if found or plan.chunks[0].start + plan.chunks[0].count >= cached:
            return found
    return []


def _works(scheduler: Scheduler, runner: ModelRunner) -> bool:
    """Whether a pass of one token can be computed."""
    probe = SequenceState(Request("probe", (NEUTRAL,), SamplingParams(), 0, 0, draws=False))
    scheduler.waiting.append(probe)
    plan = scheduler.plan_alone(probe)
    assert plan is not None, "nothing runs, and a pool has a block"
    try:
        runner.run(plan)
    except Exception:
        return False
    finally:
        runner.clear(scheduler.discard(probe))
    return True


def _blocks(scheduler: Scheduler, sequences: Iterable[SequenceState]) -> list[list[int]]:
    """For each kind of layer the blocks that sequences hold."""
    tables = [sequence.tables for sequence in sequences]
    return [[block for table in tables for block in table[kind] if block >= 0] for kind in range(len(scheduler.pools))]
