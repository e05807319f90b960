"""Draws tokens inside of vLLM with the sampler of this package, as one of vLLM's custom logits processors.

vLLM's own sampler has a random generator for each request, so that what it draws depends on how often it was asked, and
it reports log-probabilities without the temperature. The processor draws from the logits as the model left them, by
(seed, sample, position), and leaves vLLM nothing to choose: the drawn token's logit becomes infinite.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from lockstep.rl.rollout.protocol import Request
from lockstep.rl.rollout.sampling.draws import Drawn, EndTokens, reported, rows_of
from lockstep.rl.rollout.sampling.sampler import Row, draw_isolated
from lockstep.rl.rollout.scheduling.plan import Place

NUMBER = "lockstep"
"""Key of `SamplingParams.extra_args` that holds a request's number on the board."""


class DrawingSequence(Protocol):
    """A request that vLLM works on, and its tokens so far."""

    request: Request
    tokens: list[int]


class Board:
    """What the adapter and the processor in the same process tell each other, by numbers of requests."""

    def __init__(self, ends: EndTokens) -> None:
        self.ends = ends
        self.sequences: dict[int, DrawingSequence] = {}
        """From the adapter: who draws."""
        self.drawn: dict[int, Drawn | Exception] = {}
        """From the processor: what each drew last, or why it could not."""

    def draw(self, logits_BV: Tensor, number_of: Mapping[int, int]) -> None:
        """Draw a token for each row whose request is on the board, and make its logit infinite.

        Args:
            number_of: numbers of requests by their rows.
        """
        rows = [row for row in range(len(logits_BV)) if number_of.get(row) in self.sequences]
        if not rows:
            return
        numbers = [number_of[row] for row in rows]
        drawing = [self.sequences[number] for number in numbers]
        asked = rows_of([Place(sequence.request, sequence.tokens) for sequence in drawing], self.ends)
        picked = logits_BV if len(rows) == len(logits_BV) else logits_BV[rows]
        draw, failed = draw_isolated(picked, asked)
        reports = reported(asked, draw, failed, picked, _policy(picked, draw.tokens, asked))
        self.drawn.update(zip(numbers, reports, strict=True))
        logits_BV[rows, draw.tokens] = float("inf")


def _policy(logits_BV: Tensor, tokens_B: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens under the policy and the log-sum-exp below them, [B] each."""
    temperatures = torch.tensor([row.policy_temperature for row in rows], device=logits_BV.device)
    scaled = logits_BV.float() / temperatures[:, None]
    log_sums = scaled.logsumexp(-1)
    return scaled.gather(1, tokens_B[:, None])[:, 0] - log_sums, log_sums


class DrawingProcessor(LogitsProcessor):
    """The logits processor that vLLM makes for its batch; `processor_for` gives it a board."""

    board: ClassVar[Board]

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._number_of: dict[int, int] = {}

    def is_argmax_invariant(self) -> bool:
        """It decides the argmax; see vLLM's `LogitsProcessor`."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow requests through the rows of vLLM's batch."""
        process_dict_updates(self._number_of, batch_update, lambda params, *_: (params.extra_args or {}).get(NUMBER))

    def apply(self, logits: Tensor) -> Tensor:
        """Draw from logits [B, V] in fp32, which nothing has changed before."""
        self.board.draw(logits, self._number_of)
        return logits


def processor_for(board: Board) -> type[DrawingProcessor]:
    """A class of logits processors that draw for the requests of a board."""
    return type("DrawingProcessorOfBoard", (DrawingProcessor,), {"board": board})
