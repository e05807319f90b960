"""The configuration of training: optimizer, trainer and pretraining, and how batches are packed for a layout."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lockstep.data.corpus.loader import BlendPart, PretrainingConfig
from lockstep.data.corpus.sample_schedule import SampleSchedule
from lockstep.data.packing import RowRules
from lockstep.distributed.layout import Layout
from lockstep.model.config import ModelConfig
from lockstep.model.layers.recompute import Recompute
from lockstep.model.training.loss_spikes import SpikeConfig
from lockstep.model.training.lr_schedule import LearningRateSchedule
from lockstep.model.training.trainable import TrainableConfig


def given(config: BaseModel, *keys: str, defaults: BaseModel | None = None) -> list[str]:
    """Those of the keys that were given, and not as their defaults, which another value of the class may have."""
    usual = {key: getattr(defaults, key) if defaults else type(config).model_fields[key].default for key in keys}
    return [key for key in keys if key in config.model_fields_set and getattr(config, key) != usual[key]]


class OptimizerConfig(LearningRateSchedule):
    """AdamW, with or without Muon, and the learning rate of both: linear warm-up, then a schedule.

    Loshchilov & Hutter 2019; Jordan et al. 2024. Muon updates the matrices of attention, feed-forward layers and
    experts; embeddings, head, routers, norms and biases remain with AdamW.
    """

    kind: Literal["adamw", "muon"] = Field("adamw", description="what updates the matrices inside of blocks")
    beta1: float = Field(0.9, ge=0, lt=1, description="of AdamW: decay of the gradient's moving average")
    beta2: float = Field(0.95, ge=0, lt=1, description="of AdamW: decay of the squared gradient's moving average")
    epsilon: float = Field(1e-8, gt=0, description="of AdamW: added to the root of the squared gradient's average")
    momentum: float = Field(0.95, ge=0, lt=1, description="of Muon")
    weight_decay: float = Field(0.0, ge=0, description="for matrices only")
    clip_norm: float = Field(1.0, ge=0, description="bound of the gradient's global norm; 0 for none")
    gradient_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="in which gradients of a bf16 model are added up; bfloat16 takes half the memory"
    )

    @model_validator(mode="after")
    def _has_what_keys_need(self) -> "OptimizerConfig":
        schedules = "'linear', 'cosine' or 'stable'"
        for key, holds, needed in (
            ("momentum", self.kind == "muon", "kind='muon'"),
            ("decay_share", self.schedule == "stable", "schedule='stable'"),
            ("final_share", self.schedule != "constant", f"schedule={schedules}"),
        ):
            if not holds and given(self, key):
                raise ValueError(f"{key} is of {needed}: leave it out, or set that")
        return self


class TrainerConfig(BaseModel):
    """How a trainer packs rows, saves memory, compiles, and which parameters it trains."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    row_tokens: int = Field(
        2048, ge=1, description="tokens of a packed row, which is the micro-batch; longer groups are split"
    )
    recompute: Recompute = Field("none", description="activations to compute again in the backward pass: less memory")
    compile: bool = Field(False, description="let torch.compile fuse the blocks, where there is an accelerator")
    trainable: TrainableConfig = TrainableConfig()


class RetainConfig(BaseModel):
    """Continual learning: what keeps a model from forgetting what it learned before; none of it by default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    l2: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="λ of λ/2 · Σ (weight − old weight)², added to the loss"
    )
    ewc: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="λ of elastic weight consolidation: as l2, each weight by its Fisher information on old data",
    )
    fisher_samples: int = Field(64, ge=1, description="samples of old data that the Fisher information of ewc is over")
    replay: float = Field(0.0, ge=0, lt=1, description="share of each batch that is old data")

    @property
    def anchors(self) -> bool:
        """Whether weights are held near old ones."""
        return bool(self.l2 or self.ewc)

    def check_old(self, *, has_old: bool) -> None:
        """Raise ValueError where old data is needed and not there, or there and not needed."""
        needed = given(self, "ewc", "replay")
        if needed and not has_old:
            raise ValueError(f"{needed[0]} needs old data, and old is empty: name some")
        if has_old and not needed:
            raise ValueError("old is read by ewc and replay, and there is neither: give one of them, or leave it out")
        if given(self, "fisher_samples") and not self.ewc:
            raise ValueError(f"fisher_samples={self.fisher_samples} is of ewc, and ewc=0: give it, too")


class PretrainRetainConfig(RetainConfig):
    """Continual pretraining: what keeps a model from forgetting older corpora."""

    old: tuple[BlendPart, ...] = Field((), description="indexed datasets of what was learned before, and weights")

    @model_validator(mode="after")
    def _has_old_data_where_needed(self) -> "PretrainRetainConfig":
        self.check_old(has_old=bool(self.old))
        return self


class PretrainConfig(BaseModel):
    """Pretraining on text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=0, description="updates of the weights")
    samples_per_step: int = Field(32, ge=1, description="samples of data.length tokens in a global batch")
    optimizer: OptimizerConfig = OptimizerConfig()
    z_coefficient: float = Field(0.0, ge=0, description="of the loss that keeps logits small; PaLM took 1e-4")
    evaluate_every: int = Field(0, ge=0, description="steps between measurements of the held-out loss; 0 for the end")
    statistics_every: int = Field(
        0,
        ge=0,
        description="steps between metrics of each layer: norm of its gradient, size of its weights; 0 for none",
    )
    give_up_after: int = Field(3, ge=1, description="steps in a row without a finite gradient that end the run")
    spikes: SpikeConfig | None = Field(None, description="go back when the loss spikes; never when it is not there")
    data: PretrainingConfig | None = Field(None, description="what to read; random documents when it is not there")
    retain: PretrainRetainConfig | None = None

    @model_validator(mode="after")
    def _has_new_data_beside_old(self) -> "PretrainConfig":
        if self.retain and self.retain.old and not self.data:
            raise ValueError("retain.old is kept beside new text, and there is no data: give both, or leave it out")
        return self

    @property
    def schedule(self) -> SampleSchedule:
        """The samples that each step reads, as long as the run does not rewind."""
        return SampleSchedule(self.samples_per_step)

    @property
    def training_data(self) -> PretrainingConfig | None:
        """`data`, in which the share `retain.replay` of the samples is of the old blend."""
        if not self.data or not self.retain or not self.retain.replay:
            return self.data
        replay = Fraction(str(self.retain.replay))
        parts = [*_scaled(self.data.blend, 1 - replay), *_scaled(self.retain.old, replay)]
        return self.data.model_copy(update={"blend": tuple(parts)})

    @property
    def old_data(self) -> PretrainingConfig | None:
        """The old blend alone, cut into samples as `data` is; None where there is none."""
        old = self.retain.old if self.retain else ()
        return self.data.model_copy(update={"blend": old}) if self.data and old else None


def _scaled(parts: Iterable[BlendPart], share: Fraction) -> Iterator[BlendPart]:
    """The parts with weights that add up to a share."""
    weights = {part: Fraction(str(part.weight)) for part in parts}
    total = sum(weights.values())
    return (part.model_copy(update={"weight": float(weight / total * share)}) for part, weight in weights.items())


def row_rules(layout: Layout, budget: int, model: ModelConfig | None = None) -> RowRules:
    """How a global batch is packed into rows of at most `budget` tokens for a layout.

    Args:
        model: whose experts may have losses of whole documents, which are not split then; None for one without experts.
    """
    return RowRules(
        ranks=layout.replicas,
        budget=budget,
        splits=not (model and model.moe and model.moe.has_loss),
        multiple=layout.row_multiple,
        equal=layout.pipeline > 1,
        count=layout.pipeline if layout.virtual > 1 else 1,
        in_step=layout.in_step,
    )
