"""Recipe sections of preference tuning and reinforcement learning, as pydantic models."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lockstep.model.objectives.kl import adapted
from lockstep.model.objectives.pair_loss import PairLoss
from lockstep.model.objectives.token_loss import TokenLoss
from lockstep.model.training.config import OptimizerConfig, given
from lockstep.rl.algorithms.advantage import overlong
from lockstep.rl.algorithms.effects import check_effects
from lockstep.rl.algorithms.methods import DPO, IPO, METHODS, RANKING_MODEL, REWARD_MODEL, Method, Score
from lockstep.rl.algorithms.supervised import is_due
from lockstep.rl.rollout.config import SamplingParams


class FlowConfig(BaseModel):
    """How generation and training take turns: synchronous, one step off-policy, or asynchronous up to a staleness."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["synchronous", "one_step_off", "asynchronous"] = Field(
        "synchronous", description="write, then learn; write the next batch while learning; or write on through it all"
    )
    max_staleness: int = Field(
        4, ge=1, description="versions between the weights behind a sample and those that learn from it, asynchronous"
    )

    dynamic_sampling: bool = Field(
        False, description="ask for other prompts in the place of those whose completions all fare alike"
    )
    most: float = Field(
        4.0, ge=1, description="with dynamic_sampling, prompts that a step asks for at most, in prompts_per_step"
    )

    release: bool = Field(
        False, description="between writing and learning, give memory back to the other: for roles that share devices"
    )

    @property
    def staleness(self) -> int:
        """The bound on staleness: versions between the weights that wrote a sample and those that learn from it."""
        return {"synchronous": 0, "one_step_off": 1, "asynchronous": self.max_staleness}[self.mode]

    @model_validator(mode="after")
    def _has_what_keys_need(self) -> "FlowConfig":
        for key, needs in (("max_staleness", "mode"), ("most", "dynamic_sampling")):
            if given(self, key) and needs not in self.model_fields_set:
                raise ValueError(f"{key}={getattr(self, key)} has no effect while {needs} is not given: give it, too")
        return self

    @model_validator(mode="after")
    def _releases_between_phases(self) -> "FlowConfig":
        if self.release and self.mode != "synchronous":
            raise ValueError(
                f"with mode={self.mode} rollouts and learning use memory at the same time: set release=false"
            )
        return self

    @property
    def in_waves(self) -> bool:
        """Whether groups are requested only when all earlier ones are complete, so that no timing changes a result."""
        return self.mode != "asynchronous"


PREFERENCE_KEYS = {"beta": "dpo and ipo", "smoothing": "dpo"}
"""Keys of the methods that train the policy, and which these are."""


class PreferenceConfig(BaseModel):
    """Preference tuning (DPO, IPO) or training of a reward model, on pairs or rankings of answers.

    They come from a file, or are the policy's own completions, compared by their verdicts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["dpo", "ipo", "reward_model", "ranking_model"] = Field(
        "dpo", description="dpo and ipo tune the policy; the others train a reward model, on pairs or on rankings"
    )
    steps: int = Field(100, ge=0, description="updates of the weights")
    groups_per_step: int = Field(32, ge=1, description="prompts, each with the answers that are compared")
    beta: float = Field(0.1, gt=0, description="weight of the KL that dpo and ipo are regularised by")
    smoothing: float = Field(0.0, ge=0, lt=0.5, description="of dpo: the probability that a preference is wrong")
    source: Annotated[str, Path] = Field(
        "", description="a file of preferences; empty for pairs of the policy's own completions"
    )
    on_bad: Literal["stop", "skip"] = Field("stop", description="stop at a bad row of source, or skip and count it")
    chat: bool = Field(True, description="put the prompts of source into the tokenizer's chat template")
    prompts: int = Field(256, ge=1, description="without source: training problems that the policy answers")
    completions: int = Field(8, ge=2, description="without source: of each")
    pairs: int = Field(1, ge=1, description="without source: a correct and an incorrect completion, of each at most")
    sampling: SamplingParams = SamplingParams()
    held_out: int = Field(32, ge=0, description="comparisons that are not learned from; accuracy is measured on them")
    evaluate_every: int = Field(0, ge=0, description="steps between these measurements; 0 for the last step alone")
    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="after")
    def _ranks_what_it_can(self) -> "PreferenceConfig":
        for key in ("beta", "smoothing") if self.judged else ("smoothing",) if self.method == "ipo" else ():
            if given(self, key):
                raise ValueError(f"{key} is of {PREFERENCE_KEYS[key]}, and method={self.method!r}: leave it out")
        return self

    @model_validator(mode="after")
    def _has_what_keys_need(self) -> "PreferenceConfig":
        for key in given(self, *(("prompts", "completions", "pairs", "sampling") if self.source else ("chat",))):
            rule = "of the policy's own completions" if self.source else "of a file"
            raise ValueError(f"{key} is {rule}, and source={self.source!r}: leave one of them out")
        if self.evaluate_every and not self.held_out:
            raise ValueError(f"evaluate_every={self.evaluate_every} has nothing to measure: held_out=0")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature=0 writes the same completion again and again: set one above 0")
        return self

    def measures_at(self, step: int) -> bool:
        """Whether the held-out comparisons are measured after this step."""
        return is_due(step, self.steps, self.evaluate_every)

    @property
    def judged(self) -> bool:
        """Whether a reward model is trained, whose score is the value at the last token; otherwise the policy is."""
        return self.method in ("reward_model", "ranking_model")

    @property
    def phase(self) -> str:
        """The phase's name in records: `reward` where a reward model is trained, `preference` where the policy is."""
        return "reward" if self.judged else "preference"

    @property
    def objective(self) -> PairLoss:
        """The pair loss of the method."""
        chosen = {"dpo": DPO, "ipo": IPO, "reward_model": REWARD_MODEL, "ranking_model": RANKING_MODEL}[self.method]
        return chosen if self.judged else replace(chosen, beta=self.beta, smoothing=self.smoothing)


class ReferenceConfig(BaseModel):
    """The reference policy of the KL: a version of the policy, fixed or renewed, its moving average, or none.

    Where nothing of it is given, there is one where `kl_beta` is above 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none", "version", "average"] = Field("version", description="a version of the policy, or an average")
    every: int = Field(0, ge=0, description="steps after which the version is a new one; 0 for that of the start")
    decay: float = Field(0.99, gt=0, lt=1, description="what the average keeps of itself at each step")

    @model_validator(mode="after")
    def _has_keys_of_its_kind(self) -> "ReferenceConfig":
        for key in given(self, "every", "decay"):
            kind = {"every": "version", "decay": "average"}[key]
            if self.kind != kind:
                raise ValueError(f"{key} is of kind={kind!r}, and kind={self.kind!r}: leave it out")
        return self

    @property
    def moves(self) -> bool:
        """Whether the reference changes during RL."""
        return self.kind == "average" or (self.kind == "version" and self.every > 0)


class RLConfig(Method):
    """Reinforcement learning by one of `METHODS`, which gives the defaults of the keys of `Method`."""

    method: Literal[
        "grpo",
        "dr_grpo",
        "rloo",
        "reinforce_pp",
        "reinforce_pp_baseline",
        "gspo",
        "cispo",
        "sapo",
        "dppo",
        "icepop",
        "dapo",
        "ppo",
        "rsft",
        "distill",
    ] = Field("grpo", description="gives the keys from advantage to value_clip that are not given; shown are grpo's")
    steps: int = Field(100, ge=0, description="batches of rollouts to learn from")
    prompts_per_step: int = Field(32, ge=1, description="prompts of a batch, each with group_size completions")
    group_size: int = Field(8, ge=1, description="completions of each prompt")
    epochs: int = Field(1, ge=1, description="how often a step learns from its samples")
    minibatches: int = Field(1, ge=1, description="updates of an epoch")
    reference: ReferenceConfig = ReferenceConfig()
    flow: FlowConfig = FlowConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sampling: SamplingParams = SamplingParams()

    @model_validator(mode="after")
    def _method_gives_defaults(self) -> "RLConfig":
        chosen = METHODS[self.method]
        vars(self).update({k: getattr(chosen, k) for k in Method.model_fields if k not in self.model_fields_set})
        if not self.kl.beta and not self.reference.model_fields_set:
            vars(self)["reference"] = ReferenceConfig(kind="none")
        self._check()
        check_effects(self)
        return self

    def _check(self) -> None:
        compares = self.advantage in ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")
        if compares and self.group_size < 2:
            raise ValueError(
                f"advantage={self.advantage!r} compares completions of a prompt, and group_size={self.group_size}: "
                "make it 2 or more"
            )
        if self.kl.beta and self.reference.kind == "none":
            raise ValueError(
                "reference.kind='none' leaves nothing to measure a KL to: set kl_beta=0, or keep a reference"
            )

    @property
    def ratio_is_one(self) -> bool:
        """Whether every importance ratio is 1, because a step makes one update from where ratios start."""
        return self.proximal == "trainer" and self.one_update

    @property
    def regularised(self) -> bool:
        """Whether the loss has a term that needs no reward: a KL or an entropy."""
        return bool(self.kl.in_loss or self.entropy)

    @property
    def compares_kl(self) -> bool:
        """Whether a group's rollouts are compared by rewards less the KL of each."""
        return bool(self.kl.in_reward) and self.advantage not in ("gae", "reinforce_pp", "teacher")

    def punishment(self, length: int) -> float:
        """What the method takes off the reward of a completion of so many tokens, see `overlong`; 0 or less."""
        limit = self.sampling.max_new_tokens
        return overlong(length, limit, self.overlong_share * limit) if self.overlong_share else 0.0

    @property
    def one_update(self) -> bool:
        """Whether a step makes a single update of its samples."""
        return self.epochs == self.minibatches == 1

    @property
    def scores(self) -> frozenset[Score]:
        """The estimates of each token that the method needs before an update: log-probabilities and values."""
        needed: set[Score] = set()
        if self.proximal == "trainer" and not self.one_update:
            needed.add("proximal")
        if self.kl.in_reward or self.advantage == "teacher":
            needed.add("reference")
        if self.advantage == "gae":
            needed.add("value")
        return frozenset(needed)

    @property
    def objective(self) -> TokenLoss:
        """The policy loss; with proximal=trainer and one update a step, its ratios are to the policy as it is."""
        start: Literal["now", "column"] = "now" if self.ratio_is_one else "column"
        return replace(self.policy_loss, proximal=start, has_reference=self.reference.kind != "none")

    def adapted(self, measured_kl: float) -> "RLConfig":
        """The configuration of the next step; with kl_target, kl_beta follows the measured KL (Ziegler et al. 2019)."""
        if self.kl_target is None:
            return self
        return self.model_copy(update={"kl_beta": adapted(self.kl_beta, measured_kl, self.kl_target)})
