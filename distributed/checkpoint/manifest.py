"""Checks what a checkpoint's `manifest.json` says before anything is opened by it: names of files, arrays, numbers."""

import json
from collections.abc import Mapping
from typing import Any

from lockstep.distributed.checkpoint.file_names import checked_name, checked_names


class BadManifest(ValueError):
    """What is wrong in a manifest, as the end of a sentence about it."""


def parsed_manifest(text: str) -> dict[str, Any]:
    """Parse a manifest; what it must say depends on the version of its format, see `check_manifest`.

    Raises:
        BadManifest: when it is no JSON object.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadManifest(str(error)) from error
    if not isinstance(found, dict):
        raise BadManifest("it holds no JSON object")
    return found


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise unless files and arrays have names inside of the checkpoint, and arrays have shapes.

    Raises:
        BadName: for a name that leads out of the checkpoint.
        BadManifest: for anything else that cannot be.
    """
    checked_names(manifest.get("files"), "it")
    tensors = manifest.get("tensors")
    if not isinstance(tensors, dict):
        raise BadManifest("it lists no tensors")
    for name, entry in tensors.items():
        checked_name(name, "it")
        if not _is_entry(entry):
            raise BadManifest(f"it does not say shape, dtype and chunks of the array {name}")
    for key in ("step", "updates"):
        if not _is_count(manifest.get(key, 0)):
            raise BadManifest(f"{key} is {str(manifest[key])[:40]!r}, and must be a whole number")


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, chunk, digests = (entry.get(key) for key in ("shape", "chunk", "digests"))
    if not (isinstance(shape, list) and isinstance(chunk, list) and isinstance(digests, list)):
        return False
    sizes = len(shape) == len(chunk) and all(map(_is_count, [*shape, *chunk])) and 0 not in chunk
    return sizes and all(isinstance(digest, str) for digest in digests)


def _is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number that is not negative and fits into 63 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
