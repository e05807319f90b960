"""Refuses settings of RL that would do nothing beside the others, or something else than they say.

A key is checked where it was given and its value is not its method's default. A key whose own switch was given, and is
off, only waits: `kl_estimator` may stand beside `kl_beta = 0`, and `flow.most` beside `flow.dynamic_sampling = false`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from lockstep.model.training.config import given
from lockstep.rl.algorithms.methods import METHODS, Method
from lockstep.rl.rollout.config import SamplingParams


@dataclass(frozen=True)
class _Requirement:
    """What keys of a method need to have an effect."""

    keys: tuple[str, ...]
    holds: Callable[[Any], bool]
    """Of an `RLConfig`, which imports this module."""
    words: str


_PER_TOKEN = ("gae", "teacher", "reinforce_pp")
"""Signals of which the tokens of a completion have one each: there a ratio of 1 still has a gradient of its own."""
_RATIO_IS_ONE = "with proximal='trainer' and one update a step every ratio is 1: set proximal='rollout', or more epochs"
_REQUIREMENTS = (
    _Requirement(
        ("clip_low", "clip_high", "clip_dual", "ratio"),
        lambda c: c.gain != "reinforce",
        "gain='reinforce' has no importance ratio: set gain='clipped' or 'cispo'",
    ),
    _Requirement(("clip_dual",), lambda c: c.gain == "clipped", "it bounds the gain 'clipped' alone"),
    _Requirement(
        ("clip_low", "clip_high"),
        lambda c: c.gain != "sapo",
        "gain='sapo' has a gate in the place of bounds: set tau_pos and tau_neg",
    ),
    _Requirement(("tau_pos", "tau_neg"), lambda c: c.gain == "sapo", "it is of gain='sapo'"),
    _Requirement(("divergence",), lambda c: c.gain == "dppo", "it is of gain='dppo'"),
    _Requirement(
        ("gain", "ratio"),
        lambda c: c.gain != "dppo" or c.ratio == "token",
        "the divergence of gain='dppo' is of a token: set ratio='token'",
    ),
    _Requirement(
        ("clip_low", "clip_high", "clip_dual", "tau_pos", "tau_neg", "divergence"),
        lambda c: not c.ratio_is_one,
        _RATIO_IS_ONE,
    ),
    _Requirement(("gain", "ratio"), lambda c: not c.ratio_is_one or c.advantage in _PER_TOKEN, _RATIO_IS_ONE),
    _Requirement(
        ("proximal",),
        lambda c: c.gain != "reinforce" or c.correction is not None,
        "gain='reinforce' has no importance ratio: set gain='clipped', or a correction",
    ),
    _Requirement(
        ("correction",),
        lambda c: c.proximal == "trainer",
        "it weighs tokens by π_proximal / π_behaviour, which is 1 with proximal='rollout': set proximal='trainer'",
    ),
    _Requirement(
        ("proximal",),
        lambda c: c.proximal == "trainer" or c.correction is None,
        "the method's correction is by π_proximal / π_behaviour, which would be 1: leave it out, or set method='grpo'",
    ),
    _Requirement(("accept_above",), lambda c: c.advantage == "best", "it is of advantage='best'"),
    _Requirement(
        ("discount",), lambda c: c.advantage in ("gae", "reinforce_pp"), "it is of advantage='gae' and 'reinforce_pp'"
    ),
    _Requirement(
        ("gae_trace", "whiten_rewards", "value_clip"), lambda c: c.advantage == "gae", "it is of advantage='gae'"
    ),
    _Requirement(
        ("overlong_share",), lambda c: c.advantage != "teacher", "a teacher judges tokens, and rewards do not count"
    ),
    _Requirement(
        ("kl_estimator", "kl_place"), lambda c: bool(c.kl_beta) or "kl_beta" in c.model_fields_set, "kl_beta is 0"
    ),
)


def check_effects(config: Any) -> None:
    """Raises where a key of a method, of sampling, flow or reference would not do what it says.

    Raises:
        ValueError: names the key, what it was and what it needs.
    """
    for requirement in _REQUIREMENTS:
        if not requirement.holds(config):
            for key in given(config, *requirement.keys, defaults=METHODS[config.method]):
                raise ValueError(f"{key}={_shown(config, key)} has no effect: {requirement.words}")
    _check_off_policy(config)
    _check_switches(config)
    if config.advantage != "best":
        check_sampling(config.sampling)


def _shown(config: Method, key: str) -> str:
    value = getattr(config, key)
    return "{…}" if isinstance(value, BaseModel) else repr(value)


def _check_off_policy(config: Any) -> None:
    """A gain without a ratio to the behaviour policy is right for samples of the current policy only.

    Rejection sampling is likelihood, whoever wrote what it accepts.
    """
    if config.advantage == "best":
        return
    if config.gain == "reinforce" and not config.one_update:
        raise ValueError(
            f"gain='reinforce' is for samples of the current policy, and epochs={config.epochs} with "
            f"minibatches={config.minibatches} learns from them after an update: set both to 1, or gain='clipped'"
        )
    if (
        config.flow.staleness
        and config.correction is None
        and (config.gain == "reinforce" or config.proximal == "trainer")
    ):
        key = "gain='reinforce'" if config.gain == "reinforce" else "proximal='trainer'"
        raise ValueError(
            f"with flow.mode={config.flow.mode!r} samples are of older weights, which {key} does not see: set "
            "proximal='trainer' with a correction, proximal='rollout' with gain='clipped', or flow.mode='synchronous'"
        )


def _check_switches(config: Any) -> None:
    if config.kl_target is not None and not config.kl_beta:
        raise ValueError(
            f"kl_target={config.kl_target} multiplies kl_beta, and 0 stays 0: set kl_beta to what it begins with, "
            "such as 0.05"
        )
    if config.kl.in_reward and config.advantage == "teacher":
        raise ValueError(
            "kl_place='reward' has no effect: a teacher judges tokens, and rewards do not count; set kl_place='loss'"
        )
    if config.flow.dynamic_sampling and config.advantage == "teacher":
        raise ValueError("flow.dynamic_sampling=true has no effect: with advantage='teacher' every group teaches")
    if config.minibatches > config.prompts_per_step:
        raise ValueError(
            f"minibatches={config.minibatches} divide the groups of a step, and prompts_per_step="
            f"{config.prompts_per_step}: lower the first, or raise the second"
        )


def check_sampling(sampling: SamplingParams) -> None:
    """Raises where completions are not drawn from the policy whose log-probabilities are learned from.

    These are over the whole vocabulary, with the temperature; the support that a token was drawn among is not replayed.
    """
    if sampling.temperature == 0:
        raise ValueError("sampling.temperature=0 writes the same completion again and again: set one above 0")
    reshaping = ("top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias")
    for key in given(sampling, *reshaping, "min_new_tokens", "exact_lengths"):
        raise ValueError(
            f"sampling.{key}={getattr(sampling, key)} draws from another distribution than the policy that learns, "
            "whose log-probabilities are over the whole vocabulary: leave it out, or set method='rsft'"
        )
    for key in given(sampling, "logprobs", "support"):
        raise ValueError(f"sampling.{key}={getattr(sampling, key)} has no effect in RL: leave it out")
