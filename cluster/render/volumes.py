"""Volumes of pods and containers: what is mounted where, and whether the paths of a recipe lie on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from lockstep.cluster.recipe.paths import absolute_paths
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.render.nodes import RenderError


@dataclass(frozen=True)
class Volume:
    """A claim, a named volume or a folder of the host, and where it is mounted."""

    source: str
    path: PurePosixPath

    @classmethod
    def parse(cls, text: str) -> "Volume":
        """A volume from `SOURCE:PATH`.

        Raises:
            RenderError: when it is not of that form, or the path is not absolute.
        """
        source, _, path = text.rpartition(":")
        if not source or not path.startswith("/") or path == "/":
            raise RenderError(f"volume={text} is not of the form SOURCE:/path, such as shared:/shared")
        return cls(source, PurePosixPath(path))


def check_paths(recipe: Recipe, volumes: Sequence[Volume]) -> None:
    """Refuse a recipe that names paths which no volume has: containers do not see the folders of this machine.

    Raises:
        RenderError: names the key and the path.
    """
    for key, path in local_paths(recipe):
        if not any(PurePosixPath(path).is_relative_to(volume.path) for volume in volumes):
            mounted = ", ".join(str(volume.path) for volume in volumes) or "none is mounted"
            raise RenderError(
                f"{key}={path} is on no volume ({mounted}), and the nodes would not have it: mount one there, or set "
                f"{key} to a path below one"
            )


def local_paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys and values of a recipe that are absolute paths, as its relative ones have become."""
    yield "run", str(recipe.folder)
    for key, value in absolute_paths(recipe):
        if key != "run":
            yield key, value
