"""Compares what the processes of a run work with before its first step: package, settings, checkpoint and weights.

Nodes may have another version of the package, or another checkpoint at the same path. Ranks that hold the same slice of
a logical tensor must hold the same bits; different slices are compared by the manifest that they were read under.
"""

import os
import socket
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

import lockstep

_SOURCES = (".py", ".c", ".j2")


class RanksDiffer(ValueError):
    """Processes of one run work with different things; the message names them, their hosts and what differs."""


@dataclass(frozen=True)
class Loaded:
    """What a process works with."""

    host: str
    package: str
    settings: str = ""
    """Digest of the recipe's values that it was given."""
    manifest: str = ""
    """Digest of the manifest of the checkpoint that it loaded."""
    slices: Mapping[str, str] = field(default_factory=dict)
    """Digests of the weights that it loaded, by the logical slices that they are."""


def loaded(settings: str = "", manifest: str = "", slices: Mapping[str, str] | None = None) -> Loaded:
    """What this process works with."""
    return Loaded(socket.gethostname(), package_digest(), settings, manifest, slices or {})


def digest_of(*values: Any) -> str:
    """Digest of settings or of a manifest, by their repr: configurations are plain values."""
    return xxhash.xxh3_64_hexdigest(repr(values).encode())


@cache
def package_digest() -> str:
    """Version and digest of the sources of this package, as they are when a process first asks."""
    found, root = xxhash.xxh3_64(), Path(lockstep.__file__).parent
    for folder, folders, files in os.walk(root, followlinks=True):  # the rooms of a source tree are links
        folders.sort()
        for name in sorted(files):
            if name.endswith(_SOURCES):
                path = Path(folder, name)
                found.update(f"{path.relative_to(root)}\0".encode())
                found.update(path.read_bytes())
    try:
        return f"{version('lockstep')}, sources {found.hexdigest()}"
    except PackageNotFoundError:
        return f"sources {found.hexdigest()}"


Party = tuple[str, Loaded]
"""A process by its name, and what it works with."""


def check_agreement(parties: Sequence[Party], what: str = "checkpoint") -> None:
    """Whether processes that share a model, or a run, work with the same things.

    Args:
        what: names the checkpoint that they were to load.

    Raises:
        RanksDiffer: one sentence on the first difference.
    """
    _compare({_name(p): p[1].package for p in parties}, "run lockstep", "install one version on all hosts")
    _compare(
        {_name(p): p[1].settings for p in parties if p[1].settings},
        "were given settings of the recipe with digest",
        "start the run again with one recipe",
    )
    everywhere = f"let {what} be the same on all hosts"
    _compare(
        {_name(p): p[1].manifest for p in parties if p[1].manifest},
        "loaded weights under a manifest with digest",
        everywhere,
    )
    _compare_slices(parties, everywhere)


def _name(party: Party) -> str:
    return f"{party[0]} on {party[1].host}"


def _compare(values: Mapping[str, Hashable], have: str, remedy: str) -> None:
    common, others = _split(values)
    if others:
        raise RanksDiffer(
            f"{_listed(others)} {have} {values[others[0]]}, and {_listed(common)} {values[common[0]]}: {remedy}"
        )


def _compare_slices(parties: Sequence[Party], remedy: str) -> None:
    """Raise for the first slice that differs, with the number of others."""
    holders: dict[str, dict[str, str]] = {}
    for party in parties:
        for name, digest in party[1].slices.items():
            holders.setdefault(name, {})[_name(party)] = digest
    differing = {name: values for name, values in holders.items() if len(set(values.values())) > 1}
    if not differing:
        return
    first, values = next(iter(differing.items()))
    others = sorted(
        {each for held in differing.values() for each in _split(held)[1]}, key=list(map(_name, parties)).index
    )
    more = f" and {len(differing) - 1} more slices" if len(differing) > 1 else ""
    same = [holder for holder in values if holder not in others]
    raise RanksDiffer(f"{_listed(others)} loaded other bits of {first}{more} than {_listed(same)}: {remedy}")


def _split(values: Mapping[str, Hashable]) -> tuple[list[str], list[str]]:
    """Who has the most common value, the first one where several are as common; and who has another."""
    if not values:
        return [], []
    usual = Counter(values.values()).most_common(1)[0][0]
    return [n for n, v in values.items() if v == usual], [n for n, v in values.items() if v != usual]


def _listed(names: Sequence[str]) -> str:
    """Some of the names, and how many there are more."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
