"""The field `response_format` of request bodies, and the grammar of the answers that it asks for."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lockstep.cluster.serving.errors import Refused

SPACES = "( |\\n {0,32})?"
"""White space between the parts of JSON, a regular expression: none, a space, or a new line with its indentation. With
more than that, a model that has lost its way would write white space for ever."""


class SchemaBody(BaseModel):
    """The object `json_schema` of a response format; what `strict` says changes nothing, since all are kept to."""

    model_config = ConfigDict(strict=True, frozen=True)

    name: str = Field(min_length=1, max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(BaseModel):
    """What an answer has to be: text, a JSON object, or JSON of a schema."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaBody | None = None

    @property
    def lark(self) -> str | None:
        """The grammar of the answer; None where it may be any text.

        Raises:
            Refused: without the schema that the type asks for.
        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return f"start: {json_rule({'type': 'object'})}"
        if self.json_schema is None:
            raise Refused(400, "response_format.json_schema is missing", param="response_format.json_schema")
        return f"start: {json_rule(self.json_schema.schema_)}"

    @property
    def place(self) -> str:
        """The field that says what the answer has to be."""
        return "response_format" if self.json_schema is None else "response_format.json_schema.schema"


def json_rule(schema: dict[str, Any]) -> str:
    """The part of a grammar in llguidance's Lark format that stands for JSON of a schema."""
    return f"%json {json.dumps(schema | {'x-guidance': {'whitespace_pattern': SPACES}})}"
