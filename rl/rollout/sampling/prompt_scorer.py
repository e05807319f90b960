"""Scores prompts in the passes that compute them: the log-probability of each token, given those before it.

They are computed as those of drawn tokens are, so that in exact numerics they are the trainer's bits. Logits exist for
a few tokens at a time, however long a prompt is.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from lockstep.model.layers.logprobs import CHUNKS
from lockstep.rl.rollout.model_runner import ModelRunner
from lockstep.rl.rollout.protocol import PromptOutput, Score
from lockstep.rl.rollout.sampling.parallel_sampler import ParallelSampler
from lockstep.rl.rollout.scheduling.plan import Chunk, Failures


class PromptScorer:
    """Collects the scores of sequences that ask for `prompt_logprobs`, and says when prompts have been computed."""

    def __init__(self, runner: ModelRunner, sampler: ParallelSampler) -> None:
        self._runner, self._sampler = runner, sampler

    def __call__(self, chunks: Sequence[Chunk], hidden_TD: Tensor, failures: Failures) -> list[PromptOutput]:
        """Read the activations of a pass; returns what prompts report whose last chunk was in it.

        Args:
            failures: sequences are added whose activations are not numbers, or that cannot be scored.
        """
        found, lengths = [], [chunk.length for chunk in chunks]
        finite_T = hidden_TD.isfinite().all(-1).cpu()  # all at once: an accelerator would be waited for each time
        for chunk, hidden_LD, finite_L in zip(chunks, hidden_TD.split(lengths), finite_T.split(lengths), strict=True):
            try:
                self._read(chunk, hidden_LD[: chunk.count], bool(finite_L[: chunk.count].all()))
            except Exception as error:
                failures[chunk.sequence] = error
            else:
                found += [_reported(chunk)] if _reports(chunk) else []
        return found

    def _read(self, chunk: Chunk, hidden_LD: Tensor, finite: bool) -> None:
        if not finite:
            raise FloatingPointError("the model's activations are not numbers")
        scores = chunk.sequence.scores
        if scores is not None:
            scores += [] if scores else [Score(chunk.sequence.request.tokens[0], None)]
            scores += self._scores(chunk, hidden_LD)

    def _scores(self, chunk: Chunk, hidden_LD: Tensor) -> Iterator[Score]:
        """Scores of the tokens that stand behind those of a chunk."""
        request, size = chunk.sequence.request, CHUNKS[self._runner.transformer.numerics]
        targets = request.tokens[chunk.start + 1 : chunk.start + chunk.count + 1]
        for first in range(0, len(targets), size):
            part = targets[first : first + size]
            yield from self._sampler.scores(self._runner.logits(hidden_LD[first : first + len(part)]), part, request)


def _reports(chunk: Chunk) -> bool:
    sequence = chunk.sequence
    return chunk.ends and (sequence.scores is not None or not sequence.request.draws)


def _reported(chunk: Chunk) -> PromptOutput:
    """The scores of a prompt, which are reported once."""
    sequence, request = chunk.sequence, chunk.sequence.request
    scores, sequence.scores = sequence.scores or (), None
    return PromptOutput(request.key, tuple(scores), None if request.draws else "length")
