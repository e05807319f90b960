"""GRPO, RLOO, PPO and the other methods as values of one configuration; `docs/methods.md` has their equations."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lockstep.model.objectives.importance_ratio import Clip, Correction, Divergence, Gate, Level
from lockstep.model.objectives.kl import KL, Estimator
from lockstep.model.objectives.pair_loss import PairLoss
from lockstep.model.objectives.token_loss import Gain, TokenLoss
from lockstep.model.objectives.value_loss import ValueLoss

Aggregation = Literal["tokens", "sequences", "constant"]
Signal = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gae", "best", "teacher"]
Score = Literal["proximal", "reference", "value"]


class CorrectionConfig(BaseModel):
    """Importance-sampling correction of tokens for the policy that sampled them, truncated or masked.

    See `lockstep.model.objectives.importance_ratio.Correction`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["truncate", "mask"] = Field("truncate", description="lower ratios that are too high, or drop tokens")
    level: Literal["token", "sequence"] = Field("token", description="what the ratio is of")
    low: float = Field(0.0, ge=0, description="a mask drops ratios below")
    high: float | None = Field(2.0, gt=0, description="truncation lowers ratios to it, a mask drops those above")

    @model_validator(mode="after")
    def _has_bounds_of_its_kind(self) -> "CorrectionConfig":
        if self.kind == "truncate" and self.low:
            raise ValueError(f"low={self.low} is of kind='mask', and kind='truncate': leave it out")
        if self.high is not None and self.low >= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}, so that every token is dropped")
        return self

    @property
    def value(self) -> Correction:
        """The correction as the objective takes it."""
        return Correction(self.kind, self.level, self.low, math.inf if self.high is None else self.high)


class Method(BaseModel):
    """A method that learns from rollouts: its advantage, loss and aggregation; the defaults are GRPO's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    advantage: Signal = Field("grpo", description="grpo divides by the group's deviation")
    aggregation: Aggregation = Field("tokens", description="what the loss is a mean over")
    denominator: Literal["batch", "kept"] = Field(
        "batch", description="completions that it is a mean over: all that a step asks for, or those with a signal"
    )
    gain: Gain = Field(
        "clipped",
        description="PPO's clipped gain, CISPO's clipped weight, SAPO's gate, DPPO's mask, or plain policy gradient",
    )
    ratio: Level = Field("token", description="what the importance ratio is of")
    clip_low: float = Field(
        0.2, gt=0, le=1, description="the ratio is clipped below 1 less this; of dppo, the divergence of bad tokens"
    )
    clip_high: float = Field(
        0.2, gt=0, description="the ratio is clipped above 1 and this; of dppo, the divergence of good tokens"
    )
    clip_dual: float | None = Field(None, gt=1, description="bounds the gain of bad tokens from below")
    tau_pos: float = Field(1.0, gt=0, allow_inf_nan=False, description="temperature of sapo's gate for good tokens")
    tau_neg: float = Field(1.05, gt=0, allow_inf_nan=False, description="temperature of sapo's gate for bad tokens")
    divergence: Divergence = Field("tv", description="what dppo bounds: total variation, or KL in nats")
    kl_beta: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="weight of the KL to the policy that RL started from"
    )
    kl_estimator: Estimator = Field("k3", description="of the KL, from single samples (Schulman 2020)")
    kl_place: Literal["loss", "reward"] = Field("loss", description="where the KL is added")
    kl_target: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="KL, in nats a token, that kl_beta is adapted to"
    )
    entropy: float = Field(
        0.0, allow_inf_nan=False, description="weight of the policy's entropy, as a bonus in the loss"
    )
    proximal: Literal["rollout", "trainer"] = Field("rollout", description="whose log-probabilities ratios are to")
    correction: CorrectionConfig | None = Field(
        None, description="importance sampling for the policy that wrote the tokens; none when it is not there"
    )
    overlong: Literal["keep", "drop"] = Field("keep", description="whether completions that were cut off teach")
    overlong_share: float = Field(0.0, ge=0, le=1, description="last share of the limit, where the reward falls by 1")
    accept_above: float = Field(0.0, description="of rejection sampling: the reward that the best has to exceed")
    discount: float = Field(1.0, ge=0, le=1, description="γ of generalised advantages")
    gae_trace: float = Field(0.95, ge=0, le=1, description="λ of generalised advantages")
    whiten_rewards: bool = Field(False, description="bring the rewards of a batch to a deviation of 1")
    value_clip: float | None = Field(0.2, gt=0, description="how far an update moves a value")

    @property
    def kl(self) -> KL:
        """The KL penalty: its weight, its estimator, and whether it is in the loss or in the reward.

        Raises:
            ValueError: for an estimator whose gradient in the loss has a mean of 0.
        """
        return KL(self.kl_beta, self.kl_estimator, self.kl_place)

    @property
    def policy_loss(self) -> TokenLoss:
        """The policy loss, with importance ratios to the column `proximal_logp`."""
        rule = self.correction
        return TokenLoss(
            gain=self.gain,
            level=self.ratio,
            clip=Clip(self.clip_low, self.clip_high, self.clip_dual),
            gate=Gate(self.tau_pos, self.tau_neg),
            divergence=self.divergence,
            kl=self.kl,
            correction=None if rule is None else rule.value,
            entropy=self.entropy,
        )

    @property
    def critic_loss(self) -> ValueLoss:
        """The value loss of the critic, for methods that have one."""
        return ValueLoss(self.value_clip)


GRPO = Method()
DR_GRPO = Method(advantage="dr_grpo", aggregation="constant")
RLOO = Method(advantage="rloo", aggregation="constant", gain="reinforce", kl_place="reward", kl_estimator="k1")
REINFORCE_PP = Method(advantage="reinforce_pp", kl_place="reward", kl_estimator="k1")
REINFORCE_PP_BASELINE = Method(advantage="reinforce_pp_baseline", kl_estimator="k2")
GSPO = Method(aggregation="sequences", ratio="sequence", clip_low=3e-4, clip_high=4e-4, proximal="trainer")
CISPO = Method(gain="cispo", clip_low=1.0, clip_high=4.0)
SAPO = Method(aggregation="sequences", gain="sapo")
DPPO = Method(gain="dppo")
ICEPOP = Method(
    aggregation="sequences", proximal="trainer", correction=CorrectionConfig(kind="mask", low=0.5, high=5.0)
)
DAPO = Method(denominator="kept", clip_high=0.28, overlong_share=0.2)
PPO = Method(advantage="gae", kl_place="reward", kl_estimator="k1")
RSFT = Method(advantage="best", denominator="kept", gain="reinforce")
DISTILL = Method(advantage="teacher")

METHODS = {
    "grpo": GRPO,
    "dr_grpo": DR_GRPO,
    "rloo": RLOO,
    "reinforce_pp": REINFORCE_PP,
    "reinforce_pp_baseline": REINFORCE_PP_BASELINE,
    "gspo": GSPO,
    "cispo": CISPO,
    "sapo": SAPO,
    "dppo": DPPO,
    "icepop": ICEPOP,
    "dapo": DAPO,
    "ppo": PPO,
    "rsft": RSFT,
    "distill": DISTILL,
}
"""Methods that learn from rollouts, by the names that recipes use."""

SFT = TokenLoss(gain="reinforce", has_reference=False)
DPO = PairLoss("sigmoid", beta=0.1)
IPO = PairLoss("ipo", beta=0.1)
REWARD_MODEL = PairLoss("sigmoid")
RANKING_MODEL = PairLoss("plackett_luce")
"""Objectives of methods that learn from data."""
