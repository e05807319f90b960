"""Lockstep's rollout engine, as a child process, and what bounds its decoding passes."""

from collections.abc import Sequence
from pathlib import Path

import torch

from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.loading import load_rollout_engine
from lockstep.rl.rollout.protocol import Request, TokenOutput
from rollout_engines.bound import Decoding, decoding
from rollout_engines.child import measured, read_job, show
from rollout_engines.work import Completion, Job, prompt

CONTEXTS = {"batch": 128, "alone": 64}
"""Tokens of the prompts behind which decoding passes are compared with their bound."""
UNUSED = 10**9
"""Seeds from here on are of no prompt of the work."""


def requests(asked: Sequence[Completion]) -> list[Request]:
    """Requests that draw at temperature 1 and end at their length, whatever they say."""
    return [
        Request(i, tuple(c["prompt"]), SamplingParams(max_new_tokens=c["new"], exact_lengths=(c["new"],)), 0, i)
        for i, c in enumerate(asked)
    ]


def run(engine: RolloutEngine, asked: Sequence[Completion]) -> list[Sequence[int]]:
    """The tokens of completions that run together."""
    for each in requests(asked):
        engine.add(each)
    drawn: dict[str | int, list[int]] = {i: [] for i in range(len(asked))}
    while engine.has_work:
        for output in engine.step():
            if isinstance(output, TokenOutput):
                drawn[output.key].append(output.token)
    return list(drawn.values())


def passes(engine: RolloutEngine, job: Job) -> dict[str, Decoding]:
    """Decoding passes of as many completions as each kind of work has, and their bound."""
    vocabulary, found = engine.transformer.model.vocabulary, {}
    for kind, times in job["work"].items():
        prompts = [prompt(CONTEXTS[kind], UNUSED + i, vocabulary) for i in range(len(times[0]))]
        asked: list[Completion] = [{"prompt": tokens, "new": job["passes"] + 16} for tokens in prompts]
        found[kind] = decoding(engine, requests(asked), CONTEXTS[kind], job["passes"])
    return found


def main() -> None:
    job = read_job()
    torch.set_num_threads(job["threads"])
    config = EngineConfig(sequences=max(map(len, job["work"]["batch"])), cache_gib=2.0)
    engine, _ = load_rollout_engine(Path(job["model"]), config, dtype=job["dtype"])
    report = measured(job, lambda asked: run(engine, asked), ["lockstep", "torch"])
    show(report | ({"passes": passes(engine, job)} if job["passes"] else {}))


if __name__ == "__main__":
    main()
