"""The forward pass that scores tokens: log-probabilities of targets, or the values of a value head."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.data.batch import TokenBatch
from lockstep.distributed.pipeline import Forward, Stage, run_forward
from lockstep.distributed.world.groups import Groups
from lockstep.model.layers.logprobs import token_scores
from lockstep.model.layers.value_head import ValueHead
from lockstep.model.training.device_batch import DeviceBatch, DeviceRows, longest_document, places_of
from lockstep.model.transformer import Transformer


def scorer(
    groups: Groups,
    temperature: float,
    *,
    entropy: bool = False,
    scores_of: Callable[..., tuple[Tensor, ...]] = token_scores,
) -> Forward:
    """Make the forward function of a transformer's stages; the last returns `token_scores` of a row, [2, K] or [3, K].

    With a value head it returns the values at the predictors, [1, K].

    Args:
        scores_of: what is computed instead of `token_scores`, from the same arguments.
    """

    def forward(module: nn.Module, batch: DeviceBatch, received: Tensor | None, chunk: int) -> Tensor:
        assert isinstance(module, Transformer)

        def scores(hidden_T1D: Tensor) -> Tensor:
            if isinstance(head := getattr(module, "head", None), ValueHead):
                return head(hidden_T1D[batch.predictors_K, 0])[None]
            found = scores_of(
                hidden_T1D[batch.predictors_K, 0],
                module.head_weight,
                batch.targets_K,
                vocabulary=module.model.vocabulary,
                group=groups.tensor,
                temperature=temperature,
                cap=module.model.logit_cap,
                numerics=module.numerics,
                entropy=entropy,
            )
            return torch.stack(found)

        return module(
            batch.tokens,
            batch.positions,
            batch.attend,
            received,
            chunk=chunk,
            finish=scores,
            sequences=batch.sequences,
            route=batch.route,
        )

    return forward


def score(stage: Stage, groups: Groups, rows: Sequence[TokenBatch], temperature: float) -> list[Tensor]:
    """Log-probabilities of each row's targets, or values at their predictors, [K], without gradients.

    On all but the last pipeline stage an empty list.
    """
    batches, tokens = DeviceRows(stage, groups, rows), longest_document(rows)
    found = run_forward(stage, batches, scorer(groups, temperature), tokens=tokens)
    return [whole_row(row, scores[0], groups) for row, scores in zip(rows, found, strict=False)]


def whole_row(row: TokenBatch, logp: Tensor, groups: Groups) -> Tensor:
    """The scores of the whole row, gathered from all context ranks."""
    if groups.layout.context == 1:
        return logp
    whole = logp.new_zeros(len(row.targets))
    whole[torch.from_numpy(np.isin(row.predictors, places_of(row, groups))).to(logp.device)] = logp
    dist.all_reduce(whole, group=groups.context)
    return whole
