"""Attributes on parameters that tell DeepSpeed and gradient norms which are experts and which are copies."""

from collections.abc import Iterable
from typing import Any

from torch import nn

EXPERTS = "ep_size_0"
"""DeepSpeed's name for the group of parameters that differ over the expert axis; it insists on such a number."""


def replicate(parameter: nn.Parameter) -> None:
    """Mark a copy of a parameter that another stage owns, so that the gradient norm counts it once."""
    parameter.ds_pipe_replicated = True  # type: ignore[attr-defined]


def as_expert(parameter: nn.Parameter) -> None:
    """Mark a parameter that differs over the expert axis, so that it is reduced over its own replicas only."""
    parameter.allreduce, parameter.group_name = False, EXPERTS  # type: ignore[attr-defined]


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether `as_expert` marked the parameter."""
    return not getattr(parameter, "allreduce", True)


def experts_apart(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """An optimizer's parameter groups with experts in groups of their own, as DeepSpeed needs them; none is empty."""
    found = []
    for group in groups:
        experts = [p for p in group["params"] if is_expert(p)]
        others = [p for p in group["params"] if not is_expert(p)]
        found += [group | {"params": others}, group | {"params": experts, "moe": True, "name": EXPERTS}]
    return [group for group in found if group["params"]]
