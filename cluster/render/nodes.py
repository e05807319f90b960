"""The nodes that a job asks for, and whether a recipe can run on them; nothing is opened and no cluster is asked."""

import math
import re
from dataclasses import dataclass

from lockstep.cluster.launch.capacity import Node
from lockstep.cluster.launch.placement import PlacementError, check, plan_placement
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
    plan = plan_placement(RunPlan.of(recipe), devices=nodes.gpus > 0)
    there = {"CPU": float(nodes.cpus), "GPU": float(nodes.gpus)}
    try:
        check(plan, [Node("", "", f"node {number}", there) for number in range(nodes.count)])
    except PlacementError as error:
        raise RenderError(f"nodes={nodes.count} with cpus={nodes.cpus} and gpus={nodes.gpus}: {error}") from error


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
