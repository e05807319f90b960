"""The nodes that a job asks for, and whether a recipe can run on them; nothing is opened and no cluster is asked."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from lockstep.cluster.launch.placement import plan_placement
from lockstep.cluster.launch.plan import RunPlan
from lockstep.cluster.recipe.schema import Recipe


class RenderError(ValueError):
    """A job that cannot run as it was asked for; the message is one sentence."""


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind, the one with the head and the run's driver included."""

    count: int = 1
    cpus: int = 8
    gpus: int = 0
    memory: float | None = None
    """GiB of each; None where the scheduler's default holds."""


def check_fits(recipe: Recipe, nodes: Nodes) -> None:
    """Refuse nodes on which the processes of a recipe have no place.

    Raises:
        RenderError: says what is needed and what was asked for.
    """
    plan, roles = RunPlan.of(recipe), recipe.roles
    each = roles.policy.gpus or (1.0 if nodes.gpus else 0.0)
    tensor, groups = recipe.layout.tensor, plan.processes["policy"] // recipe.layout.tensor
    if each * tensor > nodes.gpus:
        raise RenderError(
            f"a group of layout.tensor={tensor} needs {each * tensor:g} GPU on one node, and nodes have gpus="
            f"{nodes.gpus}: ask for more, or lower layout.tensor or roles.policy.gpus"
        )
    if each and groups > (room := nodes.count * int(nodes.gpus // (each * tensor))):
        raise RenderError(
            f"the policy's {groups} groups of layout.tensor={tensor} need {each * tensor:g} GPU each, and nodes="
            f"{nodes.count} with gpus={nodes.gpus} have room for {room}: ask for more, or lower a degree of [layout]"
        )
    _check_bundles(plan_placement(roles, plan.processes).bundles, nodes)


def _check_bundles(bundles: Iterable[dict[str, float]], nodes: Nodes) -> None:
    """Whether what processes reserve can be laid on nodes, the largest first, each on the first that holds it."""
    free = [{"CPU": float(nodes.cpus), "GPU": float(nodes.gpus)} for _ in range(nodes.count)]
    for bundle in sorted(bundles, key=lambda each: (each.get("GPU", 0), each.get("CPU", 0)), reverse=True):
        place = next((node for node in free if all(node[kind] >= amount for kind, amount in bundle.items())), None)
        if place is None:
            reserved = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
            raise RenderError(
                f"a process that reserves {reserved} has no place left on nodes={nodes.count} with cpus={nodes.cpus} "
                f"and gpus={nodes.gpus}: ask for more, or lower what [roles] reserves"
            )
        for kind, amount in bundle.items():
            place[kind] -= amount


CLEAN_UP_S = 60
"""Seconds that the end of a run and of its Ray may take after the last checkpoint."""


def seconds_to_end(recipe: Recipe) -> int:
    """Seconds between the signal that tells a run to end and its being killed, so that its last save fits."""
    return math.ceil(recipe.checkpoints.grace) + CLEAN_UP_S


def check_goes_on(recipe: Recipe, attempts: str) -> None:
    """Refuse attempts after the first one where nothing is saved that they could go on from.

    Raises:
        RenderError: names the key to set.
    """
    if not recipe.checkpoints.every:
        raise RenderError(
            f"{attempts} with checkpoints.every=0 would begin with step 1 again after a node was lost: set "
            "checkpoints.every, or ask for none"
        )


def job_name(recipe: Recipe, longest: int) -> str:
    """The recipe's name as schedulers take it: small letters, digits and hyphens, with a letter first."""
    name = re.sub(r"[^a-z0-9]+", "-", recipe.name.lower()).strip("-")
    return (name if name[:1].isalpha() else f"run-{name}")[:longest].strip("-")
