"""Names that one file of a checkpoint gives to others: relative, and inside of their folder, or refused.

Manifests, indexes and trackers come from strangers. A name such as `../../x` in one of them would have a conversion
read or write outside of its folder, so every reader passes such names through here before it opens anything.
"""

import re
from collections import Counter
from pathlib import Path

LONGEST, LONGEST_PART = 1024, 255
"""Bytes of a name, and between two slashes of it: what file systems and object stores allow."""

_STRANGE = re.compile(r"[\\\x00-\x1f\x7f]|://|^[A-Za-z]:")
"""Backslashes, control characters, URLs and Windows' drives."""


class BadName(ValueError):
    """A name in a file that leads out of its folder, or is none."""


def checked_name(name: object, giver: object) -> str:
    """Return a relative name that a file gives, if it stays inside of its folder.

    Args:
        giver: the file or folder that gives it, for the error.

    Raises:
        BadName: for what is no text, absolute, `.` or `..` anywhere, too long for a file system, or not portable.
    """
    if not isinstance(name, str) or not _is_inside(name):
        said = repr(name)
        said = said if len(said) < 80 else f"{said[:77]}…"
        raise BadName(f"{giver} names {said}: a name must be relative and stay inside of its folder, so get it anew")
    return name


def checked_names(names: object, giver: object) -> list[str]:
    """Return a list of names, each of them checked and there once.

    Raises:
        BadName: as `checked_name`, and for what is no list or has a name twice.
    """
    if not isinstance(names, list):
        raise BadName(f"{giver} has {type(names).__name__} where a list of file names was needed: get it anew")
    found = [checked_name(name, giver) for name in names]
    for name, times in Counter(found).items():
        if times > 1:
            raise BadName(f"{giver} names {name!r} {times} times: each file must be named once")
    return found


def path_inside(folder: Path, name: object, giver: object) -> Path:
    """The path of a file that a file gives; a link on the way leads to nowhere outside of the folder.

    Links into the `blobs` of the Hugging Face Hub's cache are followed: snapshots there consist of them.

    Raises:
        BadName: as `checked_name`, and for a link that leads out.
    """
    path = folder / checked_name(name, giver)
    base = folder.resolve()
    blobs = base.parent.parent / "blobs" if base.parent.name == "snapshots" else base
    try:
        real = path.resolve()
    except RuntimeError as error:  # Python's word for links in a circle
        raise BadName(f"{path} is a link that leads back to itself: put the file itself there") from error
    if not (real.is_relative_to(base) or real.is_relative_to(blobs)):
        raise BadName(f"{path} is a link that leads out of {folder}, to {real}: put the file itself there")
    return path


def _is_inside(name: str) -> bool:
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return False
    parts = encoded.split(b"/")
    fits = len(encoded) <= LONGEST and max(map(len, parts)) <= LONGEST_PART
    return fits and not _STRANGE.search(name) and not {b"", b".", b".."} & {*parts}
