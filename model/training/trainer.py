"""The trainer of one rank: a transformer and its optimizer, which take steps on packed rows and score them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.data.batch import TokenBatch
from lockstep.distributed.checkpoint.arrays import Chunk
from lockstep.distributed.checkpoint.reshard import WEIGHTS, whole_chunks
from lockstep.distributed.checkpoint.tensors import Source
from lockstep.distributed.device import local_device
from lockstep.distributed.engine import Engine
from lockstep.distributed.optimizer.weight_penalty import Stiffness
from lockstep.distributed.pipeline import Forward, Loss, Stage
from lockstep.distributed.step_result import StepResult
from lockstep.distributed.world.groups import Groups
from lockstep.model.loading import transformer_of
from lockstep.model.objectives.objective import Objective
from lockstep.model.objectives.token_loss import TokenLoss, nll
from lockstep.model.state_dict import parts, pieces, pieces_by_parameter
from lockstep.model.training.config import OptimizerConfig, RetainConfig, TrainerConfig
from lockstep.model.training.device_batch import DeviceBatch, DeviceRows, longest_document
from lockstep.model.training.forward import score, scorer
from lockstep.model.training.optimizer import configure, optimizer_of
from lockstep.model.training.trainable import freeze
from lockstep.model.weights.names import LORA_B, is_adapter, part_sizes


class Trainer:
    """One rank of a trained model (policy, critic or reward model): takes optimizer steps on rows, scores rows."""

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
            temperature: divides the logits, as in sampling.
        """
        config = config or TrainerConfig()
        self.stage, self.groups = stage, groups
        self.transformer = transformer_of(stage)
        self.transformer.recompute = config.recompute
        freeze(self.transformer.model, pieces_by_parameter(self.transformer), config.trainable)
        if config.compile and local_device(groups.rank).type != "cpu":
            self.transformer.compile_blocks()
        self._temperature = temperature
        self.engine = Engine(
            stage,
            groups,
            optimizer_of(self.transformer, groups, optimizer),
            clip_norm=optimizer.clip_norm,
            parts=parts(self.transformer),
            tied=self.transformer.tied_over_stages,
            gradient_dtype=getattr(torch, optimizer.gradient_dtype),
        )

    def enter_phase(self, optimizer: OptimizerConfig, temperature: float) -> None:
        """Sets what a phase of a run trains with; weights and the optimizer's moments stay.

        Args:
            optimizer: of the kind that the trainer was made with.
            temperature: divides the logits, as in sampling.
        """
        self._temperature = temperature
        configure(self.engine.reconfigured(clip_norm=optimizer.clip_norm), optimizer)

    def _scorer(self, *, entropy: bool = False) -> Forward:
        return scorer(self.groups, self._temperature, entropy=entropy)

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
            reference: a reference model, whose log-probabilities replace those in the rows; its tokens go where its
                own routers send them.

        Returns:
            The result; where rows have recorded experts with `routing_differs`, the share of pairs of a token and a
            layer whose recorded set of experts is not the one that the router chooses.
        """
        device, replays = next(self.transformer.parameters()).device, rows[0].experts is not None
        differing = torch.zeros(2, dtype=torch.int64, device=device) if replays else None
        batches, tokens = DeviceRows(self.stage, self.groups, rows, (), differing), longest_document(rows)
        if reference is not None:
            own = replace(batches, rows=[replace(row, experts=None) for row in rows])
            scores = self.engine.evaluate(reference, own, self._scorer(), tokens=tokens)
            batches = replace(batches, reference_logp=[score[0] for score in scores])
        loss = _loss(objective, z_coefficient)
        wants_entropy = isinstance(objective, TokenLoss) and objective.entropy != 0
        forward = self._scorer(entropy=wants_entropy)
        result = self.engine.step(batches, forward, loss, tokens=tokens, learning_rate=learning_rate)
        if differing is None:
            return result
        dist.all_reduce(differing)  # of all ranks; each tensor rank counts the same
        differs, known = differing.tolist()
        return replace(result, values=result.values | {"routing_differs": differs / max(known, 1)})

    def remember(self, batches: Iterable[tuple[Sequence[TokenBatch], int]], tokens: int) -> None:
        """Take the weights as they are for old ones, and estimate their Fisher information for EWC.

        F = (1 / tokens) Σ (∂ log p(sample) / ∂θ)² over samples of old data: the diagonal of the empirical Fisher
        information, per token, so that old data weighs as much as new data where λ is 1 (Kirkpatrick et al. 2017).

        Args:
            batches: this data rank's rows of each global batch, which is one sample with weights that add up to 1, and
                the number of tokens that are predicted in it.
            tokens: of all samples.
        """
        self.engine.keep_weights()
        for rows, count in batches:
            found, longest = DeviceRows(self.stage, self.groups, rows), longest_document(rows)
            self.engine.square(found, self._scorer(), _loss(nll), tokens=longest, scale=count**2 / tokens)

    def hold(self, config: RetainConfig) -> None:
        """Hold the weights near those that `remember`, or a checkpoint, has: add the penalty in all steps from now on.

        Raises:
            MissingOldWeights: when there are none.
        """
        self.engine.penalty.pull(Stiffness(config.l2, config.ewc))

    def statistics(self, result: StepResult) -> dict[str, float]:
        """Metrics by part of the model: the gradient norm of a step, and the root mean square of the current weights.

        All ranks call this; `part_sizes` has the names of the parts.
        """
        sizes = part_sizes(self.transformer.model)
        scales = {part: norm / math.sqrt(sizes[part]) for part, norm in self.engine.weight_norms().items()}
        groups = {"grad_norm": result.grad_norms, "weight_rms": scales}
        return {f"{name}/{part}": value for name, values in groups.items() for part, value in values.items()}

    def chunks(self, *, state: bool) -> list[Chunk]:
        """The chunks of a checkpoint that this rank writes; all ranks call this together.

        Args:
            state: include the optimizer state.
        """
        kept = self.engine.flat_shards()
        weights = (replace(each, values={WEIGHTS: each.values[WEIGHTS]}) for each in kept)
        return whole_chunks(kept if state else weights, pieces_by_parameter(self.transformer))

    def restore(self, source: Source) -> None:
        """Load the optimizer state of the checkpoint that the model's weights came from."""
        self.engine.restore(source, pieces_by_parameter(self.transformer))

    @property
    def base(self) -> Stage:
        """The base model of the adapters, sharing weights: a reference while nothing else is trained; see `is_base`."""
        return Stage(self.transformer.without_adapters(), self.stage.config)

    def is_base(self) -> bool:
        """Whether `base` is and stays the current policy: its adapters are new, and they alone are trained.

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
        """The metrics that an objective reports over a global batch, without an update; `rows` are this data rank's."""
        batches = DeviceRows(self.stage, self.groups, rows)
        return self.engine.measure(batches, self._scorer(), _loss(objective), tokens=longest_document(rows))

    def score(self, rows: Sequence[TokenBatch], stage: Stage | None = None) -> list[Tensor]:
        """See `forward.score`; of another model than the trained one where `stage` is given."""
        return score(stage or self.stage, self.groups, rows, self._temperature)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and activations."""
        return next(self.transformer.parameters()).dtype


def _loss(objective: Objective, z_coefficient: float = 0.0) -> Loss:
    """The objective and the z loss."""

    def loss(scores: Tensor, batch: DeviceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = replace(batch.loss_inputs, entropy=scores[2]) if len(scores) > 2 else batch.loss_inputs
        value, report = objective(scores[0], inputs)
        if not z_coefficient:
            return value, report
        z_loss = (batch.loss_inputs.weight * scores[1].square()).sum()
        return value + z_coefficient * z_loss, report | {"z_loss": z_loss.detach()}

    return loss
