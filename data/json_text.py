"""JSON parsing that returns the error as a value instead of raising it, and keys as sentences name them."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

BARE = re.compile(r"[A-Za-z0-9_-]+")  # toml.io/en/v1.0.0#keys


@dataclass(frozen=True)
class Bad:
    """The reason why a row or a text cannot be used."""

    reason: str


def parsed_json(text: str) -> Any | Bad:
    """Parse JSON text; invalid JSON gives a `Bad` with the reason and the place."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        return Bad(f"not valid JSON ({error.msg} at {where})" if text.strip() else "the line is empty")
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        return Bad(f"not readable JSON ({error})")


def written_key(place: Iterable[str | int]) -> str:
    """A key as TOML writes it: `pretrain.data.blend[1].path`, and in quotes what is no bare key, as a line break."""
    written = (
        f"[{part}]" if isinstance(part, int) else f".{part if BARE.fullmatch(part) else json.dumps(part)}"
        for part in place
    )
    return "".join(written).removeprefix(".")


def encodable(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: it has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_characters(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which no encoding of Unicode has."""
    return text if encodable(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
