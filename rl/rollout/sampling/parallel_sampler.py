"""Samples next tokens from vocabulary-parallel logits, such that all tensor ranks get the same tokens."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.model.layers.logprobs import reduced
from lockstep.model.ops.exact.reductions import gathered
from lockstep.model.transformer import Transformer
from lockstep.rl.rollout.protocol import Request, Score
from lockstep.rl.rollout.sampling.draws import Drawn, EndTokens, reported, rows_of
from lockstep.rl.rollout.sampling.sampler import Row, draw_isolated, likeliest
from lockstep.rl.rollout.scheduling.plan import Place


class ParallelSampler:
    """Samples from the logits of a transformer; the ranks of its tensor group make the same calls."""

    def __init__(self, transformer: Transformer) -> None:
        self._transformer, self._group = transformer, transformer.groups.tensor
        self.ends = EndTokens(transformer.model)

    def __call__(self, places: Sequence[Place], local_BV: Tensor) -> list[Drawn | Exception]:
        """Draw a token for each place, from one row each of logits [B, V/tensor].

        Returns:
            What was drawn, or an error where nothing can be.
        """
        whole_BV = self._whole(local_BV)
        rows = rows_of(places, self.ends)
        drawn, failed = draw_isolated(whole_BV, rows)
        drawn = replace(drawn, tokens=self._agreed(drawn.tokens))
        policy = self._policy(local_BV, drawn.tokens, [row.policy_temperature for row in rows])
        return reported(rows, drawn, failed, whole_BV, policy)

    def scores(self, local_KV: Tensor, targets_K: Sequence[int], request: Request) -> list[Score]:
        """Log-probabilities of given tokens under the policy, from one row each of logits [K, V/tensor]."""
        asked = Row(request.sampling.model_copy(update={"logprobs": request.prompt_logprobs}), 0.0)
        targets = torch.tensor(targets_K, device=local_KV.device)
        logp, log_sums = self._policy(local_KV, targets, [asked.policy_temperature] * len(targets_K))
        top: Sequence[tuple[tuple[int, float], ...]] = [()] * len(targets_K)
        if asked.sampling.logprobs:
            top = [likeliest(*row, asked) for row in zip(self._whole(local_KV), log_sums, strict=True)]
        return [Score(*each) for each in zip(targets_K, logp.tolist(), top, strict=True)]

    @property
    def _first_row(self) -> int:
        """Number of the first token of this rank's part of the vocabulary."""
        return self._transformer.groups.tensor_rank * len(self._transformer.head_weight)

    def _whole(self, local_BV: Tensor) -> Tensor:
        """Logits [B, V] of the whole vocabulary, on all tensor ranks."""
        if self._group.size() > 1:
            local_BV = torch.cat(gathered(local_BV, self._group), dim=1)
        return local_BV[:, : self._transformer.model.vocabulary]

    def _agreed(self, tokens_B: Tensor) -> Tensor:
        """The first tensor rank's draws, on all ranks: other processors might round in other ways."""
        if self._group.size() > 1:
            dist.broadcast(tokens_B, dist.get_global_rank(self._group, 0), group=self._group)
        return tokens_B

    def _policy(self, local_BV: Tensor, tokens_B: Tensor, temperatures: list[float]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of tokens under the policy and the log-sum-exp below them, [B] each, as in training."""
        local_tokens = tokens_B - self._first_row
        logp, log_sums = (torch.empty(len(tokens_B), device=local_BV.device) for _ in range(2))
        for temperature in dict.fromkeys(temperatures):
            rows = [i for i, t in enumerate(temperatures) if t == temperature]
            part = local_BV if len(rows) == len(local_BV) else local_BV[rows]
            log_sum, at_target = reduced(part, local_tokens[rows], temperature, self._group, self._transformer.numerics)
            logp[rows], log_sums[rows] = at_target - log_sum, log_sum
        return logp, log_sums
