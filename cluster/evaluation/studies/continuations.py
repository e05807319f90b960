"""Log-probabilities of given continuations by a rollout engine."""

from collections.abc import Sequence

from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.protocol import Engine, FailedOutput, PromptOutput, Request


def log_likelihoods(engine: Engine, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    """log P(continuation | prompt) of each pair of token ids: a sum over the continuation's tokens, in nats.

    The engine must be idle.

    Raises:
        PromptTooLong: before anything runs.
        ValueError: for a prompt without tokens, or one that the engine could not compute.
    """
    requests = [
        Request(i, (*prompt, *continuation), SamplingParams(), 0, i, prompt_logprobs=0, draws=False)
        for i, (prompt, continuation) in enumerate(pairs)
    ]
    for request in requests:
        engine.check(request)
    for request in requests:
        engine.add(request)
    found = dict[int, float]()
    while engine.has_work:
        for output in engine.step():
            if isinstance(output, FailedOutput):
                raise ValueError(f"a continuation could not be computed: {output.reason}")
            assert isinstance(output, PromptOutput)
            behind = output.scores[len(pairs[int(output.key)][0]) :]
            found[int(output.key)] = sum(score.logp or 0.0 for score in behind)
    return [found[i] for i in range(len(pairs))]
