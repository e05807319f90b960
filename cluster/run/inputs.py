"""Checks before the first step that each node of a cluster has the files which a run's workers read there.

The driver reads all other inputs itself, and what workers need of those it writes into the run's folder.
"""

from pathlib import Path

import ray

from lockstep.cluster.recipe.paths import input_paths, missing
from lockstep.cluster.recipe.schema import Recipe
from lockstep.rl.remote import on_node

READ_BY_WORKERS = ("pretrain.data.", "pretrain.retain.old[")
"""How keys begin of paths that the trainer's processes read themselves, wherever they are."""


class MissingInput(ValueError):
    """A file or folder that a recipe names, and a node does not have."""

    def __init__(self, node: str, key: str, path: Path) -> None:
        super().__init__(
            f"the node {node} has no {path}, which {key} names: put it there, or on storage that all nodes share"
        )


def check_inputs(recipe: Recipe) -> None:
    """Ask all nodes of the cluster for the files that workers read.

    Raises:
        MissingInput: names the first node that lacks one.
    """
    paths = {key: path for key, path in input_paths(recipe).items() if key.startswith(READ_BY_WORKERS)}
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if not paths or len(nodes) < 2:
        return
    asked = [on_node(node["NodeID"], missing, paths) for node in nodes]
    for node, lacking in zip(nodes, ray.get(asked), strict=True):
        for key, path in lacking.items():
            raise MissingInput(node["NodeManagerAddress"], key, path)
