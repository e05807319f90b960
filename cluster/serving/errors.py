"""Errors that clients receive, in the JSON format of OpenAI's API."""

import json
from typing import Any

from pydantic import ValidationError

SHOWN = 60
"""Number of characters of a wrong value that an error repeats."""


class Refused(Exception):
    """A request that is refused with an HTTP status and a message.

    Args:
        status: HTTP status.
        param: the field of the body that is wrong, if one is.
        code: a machine-readable name of the error.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that the client receives."""
        kinds = {429: "rate_limit_error", 401: "authentication_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def unsupported(param: str) -> Refused:
    """The error for a field that would change the completion and is not supported."""
    return Refused(400, f"{param} is not supported: leave it out", param=param, code="unsupported_parameter")


def invalid(error: ValidationError, names: dict[str, str] | None = None) -> Refused:
    """The error for the first field of a body that fails validation.

    Args:
        names: of fields that have other names in the client's body.
    """
    first = error.errors(include_url=False)[0]
    place = [str(part) if str(part).isprintable() else json.dumps(part) for part in first["loc"]]
    param = ".".join((names or {}).get(part, part) for part in place) or None
    reason = str(first.get("ctx", {}).get("error", "")) or first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is not JSON: {reason}", code="invalid_json")
    if first["type"] == "missing":
        return Refused(400, f"{param} is missing", param=param)
    shown = repr(first["input"])
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"
    return Refused(400, f"{param or 'the body'}={shown} is not allowed: {reason}", param=param)
