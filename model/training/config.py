"""The configuration of training: optimizer, trainer and pretraining, and how batches are packed for a layout."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lockstep.data.corpus.loader import PretrainingConfig
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

    @property
    def schedule(self) -> SampleSchedule:
        """The samples that each step reads, as long as the run does not rewind."""
        return SampleSchedule(self.samples_per_step)


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
