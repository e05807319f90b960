"""The schema of a recipe: one TOML file, composed of the configurations that stand beside the code they configure.

Any key can be overridden as `section.key=value`. What is wrong is said in one sentence that names the key, what was
given, what is allowed and the nearest valid key.
"""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lockstep.cluster.recipe.model_source import SourceConfig
from lockstep.cluster.recipe.roles import RolesConfig
from lockstep.data.tasks.mixture import MixedTask, NamedTask
from lockstep.data.tasks.task import TaskConfig
from lockstep.data.tasks.user_function import LLM_JUDGE
from lockstep.distributed.checkpoint.saver import CheckpointConfig
from lockstep.distributed.checkpoint.storage import Folder, Storage, is_url, storage_of
from lockstep.distributed.layout import Layout
from lockstep.model.training.config import PretrainConfig, TrainerConfig, given
from lockstep.rl.algorithms.config import PreferenceConfig, RLConfig
from lockstep.rl.algorithms.methods import CorrectionConfig
from lockstep.rl.algorithms.rewards import OverlongTerm, RewardConfig, Rewards
from lockstep.rl.algorithms.supervised import SupervisedConfig
from lockstep.rl.environments.config import EnvironmentConfig
from lockstep.rl.rollout.config import INEXACT, RolloutConfig
from lockstep.rl.verifiers.config import VerifierConfig

RATIO_KEYS = frozenset({"proximal", "correction", "gain", "ratio", "clip_low", "clip_high", "clip_dual"})
"""Keys of [rl] that say what importance ratios are to and how they are bounded."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EvaluationConfig(_Section):
    """Accuracy on held-out problems, before and after each phase, and between steps of RL."""

    max_new_tokens: int = Field(64, ge=1, description="tokens of an answer at most")
    every: int = Field(0, ge=0, description="steps of RL after which it is measured, too; the best stays as `best`")
    patience: int = Field(
        0, ge=0, description="RL ends after so many of these measurements in a row without a new best; 0: it does not"
    )
    samples: int = Field(0, ge=0, description="completions of each problem that are drawn beside the greedy one")
    pass_at: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1,), description="k for which pass@k is estimated from the samples"
    )
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="at which samples are drawn")
    tasks: tuple[NamedTask, ...] = ()
    best: str = Field(
        "",
        description="the task whose accuracy says which checkpoint is the best, and when RL ends; empty for the "
        "accuracy over all that is trained on",
    )

    @model_validator(mode="after")
    def _trains_on_no_task_of_its_own(self) -> "EvaluationConfig":
        for each in self.tasks:
            if found := given(each, "pass_rates", "pass_rate", "curriculum"):
                raise ValueError(f"{found[0]} is of problems that are trained on, and {each.name} is not: leave it out")
        return self

    @model_validator(mode="after")
    def _measures_what_it_says(self) -> "EvaluationConfig":
        if self.patience and not self.every:
            raise ValueError(f"patience={self.patience} counts measurements between steps: give every, too")
        drawn = given(self, "pass_at", "temperature")
        if drawn and not self.samples:
            raise ValueError(f"{drawn[0]} is of samples, and samples=0: give it, too")
        if self.samples and max(self.pass_at, default=0) > self.samples:
            raise ValueError(f"pass_at={list(self.pass_at)} asks for more than samples={self.samples}: draw as many")
        return self


class RecipeTask(MixedTask):
    """One task of several, with a name, a weight and perhaps a reward of its own, in the place of [reward]."""

    reward: RewardConfig | None = None


class RecoveryConfig(_Section):
    """What a run does about workers that stop, and about the death of a model's rank."""

    stopped_after: float = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds after which a worker whose process is stopped, as by SIGSTOP, is ended and counts as dead",
    )
    restarts: int = Field(
        3,
        ge=0,
        description="how often within an hour the run begins again from its newest whole checkpoint, in the same "
        "layout, when a rank of a model has died; 0 ends it then",
    )


class Recipe(_Section):
    """Everything that a run depends on, validated."""

    name: str = Field("run", description="what the run is called, in its records and where {name} stands")
    seed: int = Field(0, ge=0, description="of problems, samples, random weights and the order of data")
    run: Annotated[str, Path] = Field(
        "runs/{name}", description="the folder that the run leaves; {name} stands for the recipe's name"
    )
    checkpoints: CheckpointConfig = CheckpointConfig()
    model: SourceConfig = SourceConfig()
    reward: RewardConfig = RewardConfig()
    task: TaskConfig = TaskConfig()
    tasks: tuple[RecipeTask, ...] = ()
    layout: Layout = Layout()
    trainer: TrainerConfig = TrainerConfig()
    rollout: RolloutConfig = RolloutConfig()
    roles: RolesConfig = RolesConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    verifier: VerifierConfig = VerifierConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    pretrain: PretrainConfig | None = None
    supervised: SupervisedConfig | None = None
    preference: PreferenceConfig | None = None
    rl: RLConfig | None = None

    @model_validator(mode="after")
    def _has_one_kind_of_training(self) -> "Recipe":
        if self.pretrain and (self.supervised or self.preference or self.rl):
            raise ValueError(
                "a recipe trains on text, with [pretrain], or on problems, with [supervised], [preference] and [rl]"
            )
        return self

    @model_validator(mode="after")
    def _has_one_task_or_several(self) -> "Recipe":
        if self.tasks and self.task != TaskConfig():
            raise ValueError(
                "a recipe has one task, with [task], or a mixture of several, with [[tasks]]: leave one out"
            )
        names = [each.name for each in (*self.tasks, *self.evaluation.tasks)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two of tasks are called {twice}: give each a name of its own")
        if (best := self.evaluation.best) and best not in names:
            known = f"of {', '.join(names)}" if names else "where there are [[tasks]] or [[evaluation.tasks]]"
            raise ValueError(f"evaluation.best={best!r} is no task: name one {known}, or leave it out")
        shared = [(each.chat, each.chat_template_kwargs) for each in self.all_tasks]
        if self.environment.kind != "none" and any(each != shared[0] for each in shared):
            raise ValueError(
                "an environment speaks one template with all tasks: make chat and chat_template_kwargs of tasks equal"
            )
        return self

    @model_validator(mode="after")
    def _has_steps_for_its_curricula(self) -> "Recipe":
        name = next((each.curriculum for each in self.mixture if each.curriculum), "")
        if name and not self.rl:
            raise ValueError(
                f"task.curriculum={name!r} weighs problems in the steps of [rl], which is not there: add it"
            )
        return self

    @property
    def mixture(self) -> tuple[TaskConfig, ...]:
        """The tasks that the run learns from: those of the mixture, or the one that there is."""
        return self.tasks or (self.task,)

    @property
    def all_tasks(self) -> tuple[TaskConfig, ...]:
        """These, and those that are evaluated alone."""
        return (*self.mixture, *self.evaluation.tasks)

    @property
    def rewards(self) -> Rewards:
        """The rewards of the run's tasks."""
        return Rewards(self.reward, {each.name: each.reward for each in self.tasks if each.reward})

    @model_validator(mode="after")
    def _corrects_for_an_inexact_engine(self) -> "Recipe":
        """Truncated importance sampling by default where the rollouts' log-probabilities are not the trainer's.

        A recipe that says what its ratios are to, or how they are bounded, is left as it is.
        """
        rl = self.rl
        if self.rollout.engine in INEXACT and rl and rl.method != "rsft" and not RATIO_KEYS & rl.model_fields_set:
            corrected = {"proximal": "trainer", "correction": CorrectionConfig()}
            vars(self)["rl"] = rl.model_copy(update=corrected)
        return self

    @model_validator(mode="after")
    def _has_an_engine_that_can(self) -> "Recipe":
        engine = self.rollout.engine
        if engine in INEXACT and self.model.numerics == "exact":
            raise ValueError(
                f"model.numerics='exact' gives rollouts and training the same bits, which rollout.engine={engine!r} "
                "does not: set one of them otherwise"
            )
        if engine == "vllm" and self.rl and self.rl.flow.release:
            raise ValueError("rl.flow.release=true has no effect on rollout.engine='vllm', which keeps its memory")
        return self

    @model_validator(mode="after")
    def _has_one_order_of_sums(self) -> "Recipe":
        exact, degrees = self.model.numerics == "exact", (self.rollout.tensor, self.layout.tensor)
        if exact and self.trainer.compile:
            raise ValueError(
                "trainer.compile=true lets a compiler order sums, which model.numerics='exact' fixes: set one of them"
            )
        if exact and self.rl and degrees[0] != degrees[1]:
            raise ValueError(
                f"rollout.tensor={degrees[0]} and layout.tensor={degrees[1]} add up other parts, "
                "and model.numerics='exact' needs the same ones: make them equal"
            )
        return self

    @model_validator(mode="after")
    def _punishes_length_once(self) -> "Recipe":
        for punished in self._overlong_terms:
            if self.rl and self.rl.overlong_share and punished.weight:
                raise ValueError(
                    f"rl.overlong_share={self.rl.overlong_share} and reward.overlong.weight={punished.weight} punish "
                    "the same length twice: make one of them 0"
                )
        return self

    @property
    def _overlong_terms(self) -> list[OverlongTerm]:
        rewards = self.rewards
        return [each.overlong for each in (rewards.run, *rewards.own.values())]

    @model_validator(mode="after")
    def _punishes_lengths_that_occur(self) -> "Recipe":
        rl = self.rl
        if not rl or self.environment.kind != "none":
            return self
        for punished in self._overlong_terms:
            free = punished.maximum - punished.cache
            if punished.weight and free >= rl.sampling.max_new_tokens:
                raise ValueError(
                    f"reward.overlong begins behind {free} tokens, maximum less cache, and rl.sampling.max_new_tokens="
                    f"{rl.sampling.max_new_tokens}: lower reward.overlong.maximum"
                )
        return self

    @model_validator(mode="after")
    def _has_one_optimizer(self) -> "Recipe":
        tuned = None if self.preference and self.preference.judged else self.preference
        phases = {"supervised": self.supervised, "preference": tuned, "rl": self.rl}
        for key in ("kind", "gradient_dtype"):
            given = {name: getattr(phase.optimizer, key) for name, phase in phases.items() if phase}
            if len(set(given.values())) > 1:
                said = " and ".join(f"{name}.optimizer.{key}={value!r}" for name, value in given.items())
                raise ValueError(f"{said}: a run has one optimizer for its policy; make them equal")
        return self

    @model_validator(mode="after")
    def _has_gradients_of_its_dtype(self) -> "Recipe":
        phases = {
            "pretrain": self.pretrain,
            "supervised": self.supervised,
            "preference": self.preference,
            "rl": self.rl,
        }
        for name, phase in (phases | {"roles.critic": self.roles.critic}).items():
            if self.model.dtype == "float32" and phase and phase.optimizer.gradient_dtype == "bfloat16":
                raise ValueError(
                    f"{name}.optimizer.gradient_dtype='bfloat16' has no effect on a model in float32: leave it out, "
                    "or set model.dtype='bfloat16'"
                )
        return self

    @model_validator(mode="after")
    def _has_no_idle_role(self) -> "Recipe":
        if self.rl:
            trains_reward = bool(self.preference and self.preference.judged)
            has_environment = self.environment.kind != "none"
            self.roles.check_uses(self.rl, trains_reward=trains_reward, has_environment=has_environment)
        return self

    @model_validator(mode="after")
    def _has_entries_to_score(self) -> "Recipe":
        other = next((each.grader for each in self.all_tasks if each.grader != "gym"), None)
        if self.environment.kind == "gym" and other:
            raise ValueError(
                f"environment.kind='gym' scores entries of reasoning-gym, and task.grader={other!r} gives "
                "answers: set task.grader='gym'"
            )
        return self

    @model_validator(mode="after")
    def _has_the_judge_that_it_asks(self) -> "Recipe":
        grades = any(each.grader == LLM_JUDGE for each in self.all_tasks)
        asked = grades or any(LLM_JUDGE in terms.values() for terms in self.rewards.user_functions.values())
        if asked and not self.verifier.llm_judge:
            raise ValueError("llm_judge is asked for scores, and there is none: give verifier.llm_judge url and model")
        if self.verifier.llm_judge and not asked:
            raise ValueError(
                "verifier.llm_judge is asked for nothing: set task.grader='llm_judge', or give [[reward.functions]] "
                "with function='llm_judge'"
            )
        return self

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run.replace("{name}", self.name))

    @property
    def saves(self) -> Storage:
        """The storage of the policy's checkpoints."""
        at = self.checkpoints.at.replace("{name}", self.name)
        return storage_of(at) if is_url(at) else Folder((Path(at) if at else self.folder / "checkpoints").absolute())
