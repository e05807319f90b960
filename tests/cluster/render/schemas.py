"""Published schemas of what is rendered, beside this file, each with its source, version and licence."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema


@cache
def schema(name: str) -> dict[str, Any]:
    """A JSON schema, which refuses keys that it does not know, as `kubectl` and `docker compose config` do."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name(f"{name}.json").read_text())["schema"]
    _close(found)
    return found


def check(name: str, document: Any) -> None:
    """Raises a ValidationError where a document is not one of a schema."""
    known = schema(name)
    jsonschema.Draft7Validator(known).validate(document)


def _close(part: Any) -> None:
    if isinstance(part, dict):
        if isinstance(part.get("properties"), dict) and "type" in part:
            open_ = part.get("x-kubernetes-preserve-unknown-fields") or "patternProperties" in part
            if not open_:
                part.setdefault("additionalProperties", False)
        for inner in part.values():
            _close(inner)
    elif isinstance(part, list):
        for inner in part:
            _close(inner)
