"""JSON that may be broken: a value or a Bad."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bad:
    """A row without a usable text."""

    reason: str


def parsed_json(text: str) -> Any | Bad:
    """What a text of JSON says, or why it says nothing."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        return Bad(f"not valid JSON ({error.msg} at {where})" if text.strip() else "the line is empty")
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        return Bad(f"not readable JSON ({error})")


def encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
