"""Completions of a task's prompts, and the share of them that is correct."""

from collections.abc import Sequence

from lockstep.cluster.evaluation.accuracy import Estimate, estimate_accuracy, tally
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.output_processor import generate
from lockstep.rl.rollout.protocol import Engine
from lockstep.rl.types import Prompt, Rollout
from lockstep.rl.verifiers.judge import Judge


def answers(
    engine: Engine, prompts: Sequence[Prompt], *, temperature: float, max_new_tokens: int, samples: int, seed: int
) -> list[Rollout]:
    """Sample completions of prompts of one task; see `generate`."""
    sampling = SamplingParams(
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        stop=prompts[0].stop,  # those of the task, and so of all its prompts
        stop_tokens=prompts[0].stop_tokens,
    )
    return list(generate(engine, prompts, sampling, samples=samples, seed=seed))


def accuracy_of(judge: Judge, rollouts: Sequence[Rollout]) -> Estimate:
    """The share of graded completions that are correct; NaN where none is graded."""
    return estimate_accuracy([tally([verdict.outcome for verdict in judge.grade([r.submission() for r in rollouts])])])
