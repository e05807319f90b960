"""Every key of every method changes what is learned, or is refused in a sentence that names it."""

import re
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.model.training.config import OptimizerConfig
from lockstep.rl.algorithms.aggregation import updates_of
from lockstep.rl.algorithms.config import FlowConfig, PreferenceConfig, ReferenceConfig, RLConfig
from lockstep.rl.algorithms.methods import METHODS, Method
from lockstep.rl.algorithms.rewards import RewardConfig
from tests.rl.drawn import LIMIT, groups_of, parts_of, policy_of, total

OTHER: dict[str, tuple[Any, ...]] = {
    "advantage": ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gae", "best", "teacher"),
    "aggregation": ("tokens", "sequences", "constant"),
    "denominator": ("batch", "kept"),
    "gain": ("clipped", "cispo", "sapo", "dppo", "reinforce"),
    "ratio": ("token", "sequence", "sequence_token"),
    "clip_low": (0.03,),
    "clip_high": (0.02,),
    "clip_dual": (1.01,),
    "tau_pos": (2.0,),
    "tau_neg": (3.0,),
    "divergence": ("tv", "kl"),
    "kl_beta": (0.0, 0.3),
    "kl_estimator": ("k1", "k2", "k3"),
    "kl_place": ("loss", "reward"),
    "kl_target": (0.01,),
    "entropy": (0.1,),
    "proximal": ("rollout", "trainer"),
    "correction": ({"high": 1.01}, {"kind": "mask", "low": 0.99}),
    "overlong": ("drop",),
    "overlong_share": (0.6,),
    "accept_above": (1.0,),
    "discount": (0.5,),
    "gae_trace": (0.1,),
    "whiten_rewards": (True,),
    "value_clip": (None, 0.01),
    "epochs": (2,),
    "minibatches": (2,),
}
"""Values of each key, of which those are tried that a method does not have."""

CLIPS = {"clip_low", "clip_high", "clip_dual"}
OF_CRITICS = {"gae_trace", "whiten_rewards", "value_clip"}
OF_GATES = {"tau_pos", "tau_neg"}
REFUSED: dict[str, set[str]] = {
    "grpo": {"correction", "accept_above", "discount", "divergence", *OF_GATES, *OF_CRITICS},
    "dr_grpo": {"correction", "accept_above", "discount", "divergence", *OF_GATES, *OF_CRITICS},
    "rloo": {
        "correction",
        "accept_above",
        "discount",
        "ratio",
        "proximal",
        "epochs",
        "minibatches",
        "divergence",
        *CLIPS,
        *OF_GATES,
        *OF_CRITICS,
    },
    "reinforce_pp": {"correction", "accept_above", "divergence", *OF_GATES, *OF_CRITICS},
    "reinforce_pp_baseline": {"correction", "accept_above", "discount", "divergence", *OF_GATES, *OF_CRITICS},
    "gspo": {"accept_above", "discount", "gain", "ratio", "divergence", *CLIPS, *OF_GATES, *OF_CRITICS},
    "cispo": {"correction", "accept_above", "discount", "clip_dual", "divergence", *OF_GATES, *OF_CRITICS},
    "sapo": {"correction", "accept_above", "discount", "divergence", *CLIPS, *OF_CRITICS},
    "dppo": {"correction", "accept_above", "discount", "ratio", "clip_dual", *OF_GATES, *OF_CRITICS},
    "icepop": {
        "accept_above",
        "discount",
        "gain",
        "ratio",
        "proximal",
        "divergence",
        *CLIPS,
        *OF_GATES,
        *OF_CRITICS,
    },
    "dapo": {"correction", "accept_above", "discount", "divergence", *OF_GATES, *OF_CRITICS},
    "ppo": {"correction", "accept_above", "divergence", *OF_GATES},
    "rsft": {"correction", "discount", "ratio", "proximal", "divergence", *CLIPS, *OF_GATES, *OF_CRITICS},
    "distill": {"correction", "accept_above", "discount", "overlong_share", "divergence", *OF_GATES, *OF_CRITICS},
}
"""Keys that each method has no use for, beside its own defaults."""


def config(method: str, **keys: Any) -> RLConfig:
    given = {"method": method, "kl_beta": 0.1, "sampling": {"max_new_tokens": LIMIT}, **keys}
    return RLConfig.model_validate(given)


@cache
def behaviour(chosen: str) -> Any:
    """Gradients of policy and critic in the updates of a step, and what the next step begins with.

    For a policy near to where ratios start, and for one far from it.
    """
    config = RLConfig.model_validate_json(chosen)
    groups = groups_of(6)
    found: list[Any] = [config.scores, config.adapted(1.0).kl_beta, config.objective.entropy]
    objectives = [config.objective, *([config.critic_loss] if config.advantage == "gae" else [])]
    for samples in updates_of(parts_of(groups, config), config, 3):
        for objective, spread in product(objectives, (0.4, 1.6)):
            logp = policy_of(groups, 6, spread)
            loss, _ = total(samples, logp, objective, budget=1000)
            found.append(torch.autograd.grad(loss, logp)[0].numpy())
    return found


def differ(one: RLConfig, other: RLConfig) -> bool:
    a, b = (behaviour(each.model_dump_json()) for each in (one, other))
    return len(a) != len(b) or not all(map(alike, a, b))


def alike(one: Any, other: Any) -> bool:
    """Up to rounding."""
    return np.allclose(one, other, rtol=1e-4, atol=1e-6) if isinstance(one, np.ndarray) else bool(one == other)


def test_every_key_is_tried() -> None:
    assert OTHER.keys() - {"epochs", "minibatches"} == Method.model_fields.keys()


def tried(method: str, **keys: Any) -> RLConfig | str:
    """The configuration, or the sentence that refuses it."""
    try:
        return config(method, **keys)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("method", METHODS)
def test_a_key_changes_what_is_learned_or_is_refused(method: str) -> None:
    usual, refused = config(method), set()
    for key, value in ((key, value) for key, values in OTHER.items() for value in values):
        if value == getattr(usual, key):
            continue
        changed = tried(method, **{key: value})
        if isinstance(changed, str):
            assert key in changed
            refused.add(key)
        elif not differ(changed, usual):
            other = {"overlong": "drop"}
            assert key not in other
            assert differ(config(method, **{key: value}, **other), config(method, **other)), f"{key}={value}"
    by_value = {"advantage", "kl_estimator", "kl_place", *({"gain"} - REFUSED[method])}
    assert refused - by_value == REFUSED[method]


SENTENCES: dict[str, tuple[dict[str, Any], str]] = {
    "a gate with bounds": ({"method": "sapo", "clip_high": 0.3}, "clip_high=0.3 has no effect: gain='sapo' has a gate"),
    "a gate of clips": ({"tau_neg": 2.0}, "tau_neg=2.0 has no effect: it is of gain='sapo'"),
    "a divergence of ratios": ({"divergence": "kl"}, "divergence='kl' has no effect: it is of gain='dppo'"),
    "a divergence of sequences": (
        {"method": "gspo", "gain": "dppo", "epochs": 2},
        "gain='dppo' has no effect: the divergence of gain='dppo' is of a token",
    ),
    "a mask of what is 1": (
        {"method": "icepop", "proximal": "rollout"},
        "proximal='rollout' has no effect: the method's correction",
    ),
    "a correction of nothing": ({"correction": {}}, "correction={…} has no effect: it weighs tokens"),
    "reused samples without a ratio": ({"method": "rloo", "epochs": 2}, "learns from them after an update"),
    "parts without a ratio": ({"gain": "reinforce", "minibatches": 4}, "epochs=1 with minibatches=4"),
    "stale samples without a ratio": (
        {"method": "rloo", "flow": {"mode": "asynchronous"}},
        "gain='reinforce' does not",
    ),
    "one step off": ({"gain": "reinforce", "flow": {"mode": "one_step_off"}}, "samples are of older weights"),
    "stale samples, own ratios": ({"method": "gspo", "flow": {"mode": "asynchronous"}}, "proximal='trainer' does not"),
    "a target of nothing": ({"kl_target": 0.1}, "0 stays 0: set kl_beta"),
    "a target of a beta of 0": ({"kl_target": 0.1, "kl_beta": 0.0}, "0 stays 0"),
    "an estimator of nothing": ({"kl_estimator": "k2"}, "kl_beta is 0"),
    "KL off a teacher's reward": ({"method": "distill", "kl_beta": 0.1, "kl_place": "reward"}, "rewards do not count"),
    "sampling for a teacher": ({"method": "distill", "flow": {"dynamic_sampling": True}}, "every group teaches"),
    "most of nothing": ({"flow": {"most": 2.0}}, "dynamic_sampling is not given"),
    "stale by itself": ({"flow": {"max_staleness": 2}}, "mode is not given"),
    "more parts than groups": ({"minibatches": 8, "prompts_per_step": 4}, "minibatches=8"),
    "an average that is renewed": ({"reference": {"kind": "average", "every": 3}}, "every is of kind='version'"),
    "a version that decays": ({"reference": {"decay": 0.5}}, "decay is of kind='average'"),
    "truncation below": ({"proximal": "trainer", "correction": {"low": 0.5}}, "low=0.5 is of kind='mask'"),
    "a mask of everything": (
        {"proximal": "trainer", "correction": {"kind": "mask", "low": 2.0, "high": 2.0}},
        "every token is dropped",
    ),
    "greedy": ({"sampling": {"temperature": 0}}, "the same completion again and again"),
    "top_p": ({"sampling": {"top_p": 0.9}}, "sampling.top_p=0.9 draws from another distribution"),
    "top_p with its support": ({"sampling": {"top_p": 0.9, "support": True}}, "sampling.top_p=0.9"),
    "support": ({"sampling": {"support": True}}, "sampling.support=True has no effect"),
    **{
        key: ({"method": method, "sampling": {key: value}}, f"sampling.{key}=")
        for method, key, value in (
            ("dapo", "top_k", 20),
            ("ppo", "min_p", 0.1),
            ("rloo", "repetition_penalty", 1.1),
            ("gspo", "frequency_penalty", 0.5),
            ("cispo", "presence_penalty", 0.5),
            ("grpo", "logit_bias", {3: -1.0}),
            ("distill", "min_new_tokens", 4),
            ("grpo", "logprobs", 2),
        )
    },
    "no number": ({"kl_beta": float("inf")}, "finite"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_what_would_do_nothing_or_something_else_is_refused(name: str) -> None:
    keys, words = SENTENCES[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        RLConfig.model_validate(keys)


ALLOWED: dict[str, dict[str, Any]] = {
    "rejection sampling may draw as it likes": {"method": "rsft", "sampling": {"top_p": 0.9, "top_k": 40}},
    "and learn again": {"method": "rsft", "epochs": 3, "flow": {"mode": "asynchronous"}},
    "a correction sees who wrote": {
        "method": "rloo",
        "proximal": "trainer",
        "correction": {"high": 2.0},
        "flow": {"mode": "asynchronous", "max_staleness": 2},
    },
    "decoupled PPO": {"proximal": "trainer", "correction": {"high": None}, "epochs": 2},
    "what waits for its switch": {
        "kl_beta": 0.0,
        "kl_estimator": "k2",
        "flow": {"dynamic_sampling": False, "most": 2.0, "mode": "synchronous", "max_staleness": 2},
    },
    "clips that act": {"method": "gspo", "clip_high": 1e-3, "epochs": 2},
    "levels that act": {"method": "ppo", "proximal": "trainer", "ratio": "sequence"},
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_has_a_meaning_is_taken_and_can_be_written_down(name: str) -> None:
    chosen = RLConfig.model_validate(ALLOWED[name])
    assert RLConfig.model_validate(chosen.model_dump()) == chosen


@pytest.mark.parametrize("method", METHODS)
def test_without_kl_there_is_no_reference(method: str) -> None:
    plain = RLConfig.model_validate({"method": method})
    assert plain.reference.kind == "none"
    assert not plain.objective.has_reference
    assert ("reference" in plain.scores) == (method == "distill")
    assert RLConfig.model_validate({"method": method, "kl_beta": 0.1}).reference.kind == "version"
    measured = RLConfig.model_validate({"method": method, "reference": {"kind": "version"}})
    assert measured.objective.has_reference, "one that is asked for is there to measure"


@pytest.mark.parametrize(
    ("kind", "keys", "words"),
    [
        (PreferenceConfig, {"method": "reward_model", "beta": 0.3}, "beta is of dpo and ipo"),
        (PreferenceConfig, {"method": "ranking_model", "smoothing": 0.1}, "smoothing is of dpo"),
        (PreferenceConfig, {"method": "ipo", "smoothing": 0.1}, "smoothing is of dpo"),
        (PreferenceConfig, {"source": "pairs.jsonl", "pairs": 4}, "pairs is of the policy's own completions"),
        (PreferenceConfig, {"source": "pairs.jsonl", "sampling": {"top_p": 0.5}}, "sampling is of the policy's own"),
        (PreferenceConfig, {"chat": False}, "chat is of a file"),
        (PreferenceConfig, {"held_out": 0, "evaluate_every": 5}, "nothing to measure"),
        (PreferenceConfig, {"sampling": {"temperature": 0}}, "the same completion"),
        (RewardConfig, {"format": {"pattern": ".*"}}, "pattern is given and weight is not"),
        (RewardConfig, {"overlong": {"maximum": 8, "cache": 4}}, "weight is not"),
        (RewardConfig, {"length": {"weight": 1.0, "low": 9, "high": 3}}, "low=9 is above high=3"),
        (ReferenceConfig, {"kind": "none", "every": 5}, "every is of kind='version'"),
        (FlowConfig, {"most": 3.0}, "dynamic_sampling is not given"),
        (OptimizerConfig, {"momentum": 0.9}, "momentum is of kind='muon'"),
        (OptimizerConfig, {"schedule": "cosine", "decay_share": 0.5}, "decay_share is of schedule='stable'"),
        (OptimizerConfig, {"final_share": 0.1}, "final_share"),
    ],
)
def test_sections_refuse_what_has_no_effect(kind: Any, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        kind.model_validate(keys)
    assert kind.model_validate(kind.model_validate({}).model_dump()) == kind.model_validate({})
