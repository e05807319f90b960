"""A transformer and its optimizer as one thing that learns from rows of tokens: what every trainer process owns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.data.batch import Ints, TokenBatch, part, sequences_of
from lockstep.distributed.checkpoint.arrays import Chunk
from lockstep.distributed.checkpoint.reshard import WEIGHTS, whole_chunks
from lockstep.distributed.checkpoint.tensors import Piece, Source
from lockstep.distributed.context_parallel import held_places
from lockstep.distributed.device import local_device
from lockstep.distributed.engine import Engine
from lockstep.distributed.groups import Groups
from lockstep.distributed.optimizer.muon import Muon
from lockstep.distributed.optimizer.parameter_marks import experts_apart
from lockstep.distributed.pipeline import Forward, Loss, Stage, megatron_config, run_forward
from lockstep.distributed.step_result import StepResult
from lockstep.model.attention import Attend
from lockstep.model.columns import Columns, columns_of
from lockstep.model.config import Head, ModelConfig, Numerics
from lockstep.model.context import attention
from lockstep.model.heads import ValueHead, with_head
from lockstep.model.held import held_pieces, load, parts, pieces
from lockstep.model.logprobs import token_scores
from lockstep.model.loss import Objective, TokenLoss
from lockstep.model.moe import Sequences
from lockstep.model.names import LORA_B, is_adapter, is_projection, part_sizes
from lockstep.model.recipes import OptimizerConfig, TrainerConfig
from lockstep.model.trainable import freeze
from lockstep.model.transformer import Transformer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""What models can be computed in, by the names that recipes use."""


@dataclass(frozen=True)
class DeviceBatch:
    """This rank's part of a row of tokens on its device, with its attention and its predictions."""

    tokens: Tensor
    positions: Tensor
    predictors_K: Tensor
    targets_K: Tensor
    columns: Columns
    attend: Attend
    sequences: Sequences


def to_device(
    batch: TokenBatch, groups: Groups, kv_heads: int, device: torch.device, numerics: Numerics = "fast"
) -> DeviceBatch:
    """This rank's part of a row, as tensors."""
    attend = attention(batch.documents, groups, kv_heads, device, numerics)
    places = _places(batch, groups)
    local, (document_T, weight_D) = part(batch, places), sequences_of(batch)

    def tensor(name: str) -> Tensor:
        return torch.tensor(getattr(local, name)).to(device)

    return DeviceBatch(
        tokens=tensor("tokens"),
        positions=tensor("positions"),
        predictors_K=tensor("predictors"),
        targets_K=tensor("targets"),
        columns=columns_of(local, device, groups.context if groups.layout.context > 1 else None),
        attend=attend,
        sequences=Sequences(*(torch.tensor(column).to(device) for column in (document_T[places], weight_D))),
    )


def _places(batch: TokenBatch, groups: Groups) -> Ints:
    """Places of the row's tokens that this context rank computes."""
    if groups.layout.context == 1:
        return np.arange(len(batch.tokens))
    return held_places(len(batch.tokens), groups.layout.context, groups.context_rank).numpy()


def build(
    model: ModelConfig,
    groups: Groups,
    dtype: torch.dtype,
    source: Source,
    numerics: Numerics = "fast",
    *,
    head: Head | None = None,
) -> Stage:
    """This rank's stage of a transformer, filled from a source.

    Args:
        head: in the place of the head that the model has; see `lockstep.model.heads`.
    """
    model, source = with_head(model, source, head or model.head)
    config = megatron_config(groups, layers=model.layers, width=model.width, heads=model.heads, dtype=dtype)
    transformer = Transformer(model, groups, config, numerics).to(local_device(groups.rank))
    load(transformer, source)
    return Stage(transformer, config)


def transformer_of(stage: Stage) -> Transformer:
    """The transformer inside a stage."""
    assert isinstance(stage.module, Transformer)
    return stage.module


def optimizer_of(transformer: Transformer, groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of what a stage trains."""
    trained = [p for p in transformer.parameters() if p.requires_grad]
    matrices: dict[nn.Parameter, list[Piece]] = {}
    for parameter, piece in pieces(transformer):
        if parameter.requires_grad and is_projection(piece.name):
            matrices.setdefault(parameter, []).append(piece)
    if config.kind == "adamw" or not matrices:
        return adamw(trained, config)
    layers: dict[str, list[nn.Parameter]] = {}
    for parameter, (piece, *_) in matrices.items():
        layers.setdefault(piece.name.split(".")[2], []).append(parameter)
    rule = {"lr": config.learning_rate, "momentum": config.momentum, "weight_decay": config.weight_decay}
    by_layer = experts_apart([{"params": parameters, **rule} for parameters in layers.values()])
    return Muon(by_layer, matrices, adamw([p for p in trained if p not in matrices], config), groups)


def adamw(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW; scales are not decayed."""
    decayed = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay}
    plain = {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}
    return torch.optim.AdamW(
        experts_apart((decayed, plain)),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


class Trainer:
    """One rank of the policy: scores rows and learns from them."""

    def __init__(
        self,
        stage: Stage,
        groups: Groups,
        optimizer: OptimizerConfig,
        *,
        temperature: float = 1.0,
        config: TrainerConfig | None = None,
    ) -> None:
        """
        Args:
            temperature: divides the logits, as it did when the tokens were sampled.
        """
        config = config or TrainerConfig()
        self.stage, self.groups = stage, groups
        self.transformer = transformer_of(stage)
        self.transformer.recompute = config.recompute
        freeze(self.transformer.model, held_pieces(self.transformer), config.trainable)
        if config.compile and local_device(groups.rank).type != "cpu":
            self.transformer.compile_blocks()
        self._temperature, self._forward = temperature, scorer(groups, temperature)
        self._forward_with_entropy = scorer(groups, temperature, entropy=True)
        self.engine = Engine(
            stage,
            groups,
            optimizer_of(self.transformer, groups, optimizer),
            clip_norm=optimizer.clip_norm,
            parts=parts(self.transformer),
            tied=self.transformer.tied_over_stages,
        )

    def step(
        self,
        rows: Sequence[TokenBatch],
        objective: Objective,
        learning_rate: float,
        reference: Stage | None = None,
        z_coefficient: float = 0.0,
    ) -> StepResult:
        """One update from this data rank's rows of a global batch.

        Args:
            z_coefficient: adds coefficient · Σ weight · (log Σ exp logits)² to the objective, which keeps logits from
                drifting (de Brébisson & Vincent 2016; PaLM, Chowdhery et al. 2022, section 5).
            reference: a second model, whose log-probabilities become the reference's.
        """
        batches, tokens = rows_of(self.stage, self.groups, rows), _longest(rows)
        if reference is not None:
            scores = self.engine.evaluate(reference, batches, self._forward, tokens=tokens)
            batches = [_with_reference(b, s[0]) for b, s in zip(batches, scores, strict=False)] or batches
        loss = _loss(objective, z_coefficient)
        wants_entropy = isinstance(objective, TokenLoss) and objective.entropy != 0
        forward = self._forward_with_entropy if wants_entropy else self._forward
        return self.engine.step(batches, forward, loss, tokens=tokens, learning_rate=learning_rate)

    def statistics(self, result: StepResult) -> dict[str, float]:
        """By part of the model: the norm of a step's gradient and the root mean square of the weights as they are now.

        All ranks call this; `part_sizes` has the names of the parts.
        """
        sizes = part_sizes(self.transformer.model)
        scales = {part: norm / math.sqrt(sizes[part]) for part, norm in self.engine.weight_norms().items()}
        groups = {"grad_norm": result.grad_norms, "weight_rms": scales}
        return {f"{name}/{part}": value for name, values in groups.items() for part, value in values.items()}

    def chunks(self, *, state: bool) -> list[Chunk]:
        """What this rank writes of a checkpoint; all ranks call this together.

        Args:
            state: of the optimizer, too.
        """
        kept = self.engine.kept()
        weights = (replace(each, values={WEIGHTS: each.values[WEIGHTS]}) for each in kept)
        return whole_chunks(kept if state else weights, held_pieces(self.transformer))

    def restore(self, source: Source) -> None:
        """Take over the optimizer's state of a checkpoint whose weights the model was built with."""
        self.engine.restore(source, held_pieces(self.transformer))

    @property
    def base(self) -> Stage:
        """The model that the adapters were added to, as long as nothing else learns, without a copy: see `is_base`."""
        return Stage(self.transformer.without_adapters(), self.stage.config)

    def is_base(self) -> bool:
        """Whether the policy is what `base` will still be later on: its adapters are new, and they alone learn.

        All ranks call this together.
        """
        if self.transformer.model.lora is None:
            return False
        with self.engine.whole_weights(), torch.no_grad():
            changes = [p.any() for p, piece in pieces(self.transformer) if piece.name.endswith(LORA_B)]
        learns = [piece.name for p, piece in pieces(self.transformer) if p.requires_grad]
        kept = all(map(is_adapter, learns)) and not any(changes)
        found = torch.tensor(int(kept), device=next(self.transformer.parameters()).device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return bool(found)

    def measure(self, rows: Sequence[TokenBatch], objective: Objective) -> dict[str, float]:
        """What an objective reports over this data rank's rows of a global batch and all others', without an update."""
        batches = rows_of(self.stage, self.groups, rows)
        return self.engine.measure(batches, self._forward, _loss(objective), tokens=_longest(rows))

    def score(self, rows: Sequence[TokenBatch], stage: Stage | None = None) -> list[Tensor]:
        """See `score`; of another model than the one that learns where `stage` is given."""
        return score(stage or self.stage, self.groups, rows, self._temperature)

    @property
    def dtype(self) -> torch.dtype:
        """What parameters and activations are computed in."""
        return next(self.transformer.parameters()).dtype


def scorer(groups: Groups, temperature: float, *, entropy: bool = False) -> Forward:
    """The forward pass of a transformer's stages; the last returns `token_scores` of a row, [2, K], or [3, K].

    With a value head it returns the values at the predictors, [1, K].
    """

    def forward(module: nn.Module, batch: DeviceBatch, received: Tensor | None, chunk: int) -> Tensor:
        assert isinstance(module, Transformer)

        def scores(hidden_T1D: Tensor) -> Tensor:
            if isinstance(head := getattr(module, "head", None), ValueHead):
                return head(hidden_T1D[batch.predictors_K, 0])[None]
            found = token_scores(
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
        )

    return forward


def score(stage: Stage, groups: Groups, rows: Sequence[TokenBatch], temperature: float) -> list[Tensor]:
    """log p of the tokens that count in each row, or the values at their predictors, [K], as a trainer computes them.

    On all but the last pipeline stage an empty list.
    """
    found = run_forward(stage, rows_of(stage, groups, rows), scorer(groups, temperature), tokens=_longest(rows))
    return [_whole(row, scores[0], groups) for row, scores in zip(rows, found, strict=False)]


def _whole(row: TokenBatch, logp: Tensor, groups: Groups) -> Tensor:
    """The row's scores from those of every context rank."""
    if groups.layout.context == 1:
        return logp
    whole = logp.new_zeros(len(row.targets))
    whole[torch.from_numpy(np.isin(row.predictors, _places(row, groups))).to(logp.device)] = logp
    dist.all_reduce(whole, group=groups.context)
    return whole


def rows_of(stage: Stage, groups: Groups, rows: Sequence[TokenBatch]) -> list[DeviceBatch]:
    """This rank's parts of rows, on the device of a stage."""
    transformer = transformer_of(stage)
    device = next(transformer.parameters()).device
    return [to_device(row, groups, transformer.model.kv_heads, device, transformer.numerics) for row in rows]


def _loss(objective: Objective, z_coefficient: float = 0.0) -> Loss:
    """The objective and the z loss."""

    def loss(scores: Tensor, batch: DeviceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        columns = replace(batch.columns, entropy=scores[2]) if len(scores) > 2 else batch.columns
        value, report = objective(scores[0], columns)
        if not z_coefficient:
            return value, report
        z_loss = (batch.columns.weight * scores[1].square()).sum()
        return value + z_coefficient * z_loss, report | {"z_loss": z_loss.detach()}

    return loss


def _longest(rows: Sequence[TokenBatch]) -> int:
    return max(len(row.tokens) for row in rows)


def _with_reference(batch: DeviceBatch, logp_K: Tensor) -> DeviceBatch:
    return replace(batch, columns=replace(batch.columns, reference_logp=logp_K))
