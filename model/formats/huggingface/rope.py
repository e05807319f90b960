"""Rotary positions in config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4)."""

import math
from typing import Any

from lockstep.model.config import UnknownModel, need, refuse
from lockstep.model.rope import LinearScaling, Llama3Scaling, Rope, Scaling, YarnScaling

Words = dict[str, Any]
"""A `config.json`, or part of one."""


def rope_from(given: Words, words: Words) -> Rope:
    """Read rotary positions from config.json.

    Args:
        given: its `rope_parameters` or `rope_scaling`.
        words: the whole file.

    Raises:
        UnknownModel: for a scaling that is not described in `model/rope.py`.
    """
    refuse("partial_rotary_factor", given.get("partial_rotary_factor", words.get("partial_rotary_factor", 1)) != 1)
    return Rope(theta=given.get("rope_theta") or words["rope_theta"], scaling=_scaling(given, words))


def _scaling(given: Words, words: Words) -> Scaling | None:
    kind = given.get("rope_type", given.get("type", "default"))
    context = words["max_position_embeddings"]
    original = words.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or context
    match kind:
        case "default":
            return None
        case "linear":
            need(given, "factor")
            return LinearScaling(factor=given["factor"])
        case "llama3":
            need(given, "factor", "low_freq_factor", "high_freq_factor")
            return Llama3Scaling(
                factor=given["factor"],
                low_frequency=given["low_freq_factor"],
                high_frequency=given["high_freq_factor"],
                original_context=original,
            )
        case "yarn":
            factor = given.get("factor") or context / original
            return YarnScaling(
                factor=factor,
                fast=given.get("beta_fast") or 32,
                slow=given.get("beta_slow") or 1,
                original_context=original,
                magnitude=_yarn_magnitude(given, factor),
                whole_pairs=given.get("truncate", True),
            )
    raise UnknownModel(f"rope scaling {kind!r} is not supported: use one of default, linear, llama3, yarn")


def _yarn_magnitude(given: Words, factor: float) -> float:
    """The paper's 0.1 · ln(factor) + 1, or what the checkpoint says instead (DeepSeek's mscale)."""

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if given.get("attention_factor") is not None:
        return given["attention_factor"]
    above, below = given.get("mscale"), given.get("mscale_all_dim")
    return magnitude(above) / magnitude(below) if above and below else magnitude(1)


def rope_words(rope: Rope | None) -> Words:
    """Write rotary positions as `rope_theta` and `rope_scaling`."""
    if rope is None:
        return {}
    scaling: Words | None = None
    match rope.scaling:
        case LinearScaling(factor=factor):
            scaling = {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as given:
            scaling = {
                "rope_type": "llama3",
                "factor": given.factor,
                "low_freq_factor": given.low_frequency,
                "high_freq_factor": given.high_frequency,
                "original_max_position_embeddings": given.original_context,
            }
        case YarnScaling() as given:
            scaling = {
                "rope_type": "yarn",
                "factor": given.factor,
                "beta_fast": given.fast,
                "beta_slow": given.slow,
                "original_max_position_embeddings": given.original_context,
                "attention_factor": given.magnitude,
            } | ({} if given.whole_pairs else {"truncate": False})
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
