"""What a client is told when something is wrong, in the shape of OpenAI's API."""

from typing import Any

from pydantic import ValidationError

SHOWN = 60
"""Characters of a wrong value that are repeated."""


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        param: the field that is wrong, if it is one.
        code: for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """As the client reads it."""
        kinds = {429: "rate_limit_error", 401: "authentication_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def unsupported(param: str) -> Refused:
    """A field that would change the answer, and that is not supported."""
    return Refused(400, f"{param} is not supported: leave it out", param=param, code="unsupported_parameter")


def invalid(error: ValidationError, names: dict[str, str] | None = None) -> Refused:
    """The first thing that is wrong with a body.

    Args:
        names: of fields, where the client knows them by other names.
    """
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    param = ".".join((names or {}).get(part, part) for part in place) or None
    reason = str(first.get("ctx", {}).get("error", "")) or first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is not JSON: {reason}", code="invalid_json")
    if first["type"] == "missing":
        return Refused(400, f"{param} is missing", param=param)
    shown = repr(first["input"])
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"
    return Refused(400, f"{param or 'the body'}={shown} is not allowed: {reason}", param=param)
