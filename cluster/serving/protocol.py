"""Request bodies of the OpenAI endpoints, validated by pydantic, with a few more sampling fields of the engine.

Fields that cannot change a completion are ignored. Fields that would change it and are not supported are refused, as
are fields that nobody knows: an answer that silently leaves out what was asked for is worse than none.
"""

import difflib
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError

from lockstep.cluster.serving.chat_messages import Message
from lockstep.cluster.serving.errors import Refused, invalid, unsupported
from lockstep.cluster.serving.structured.response_format import ResponseFormat
from lockstep.cluster.serving.structured.tools import ToolBody, ToolUse, choice
from lockstep.rl.rollout.config import LONGEST, SamplingParams

IGNORED = {
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
"""OpenAI's fields that are ignored, since they change no completion."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
}
"""OpenAI's fields that are not supported, with the values, beside null, that change nothing and are accepted."""

STOPS, STOP_LENGTH = 16, 512
"""The most stop strings of a request, and the most characters of each."""

STOP_TOKENS = 128
"""The most of a request."""

TOOLS = 128
"""The most of a request."""

SHOWN_NAME = 80
"""Characters that an error repeats of a name that nobody knows."""

ALIKE = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
)
"""Fields that `SamplingParams`, which says what they may be, has under the same name."""

OTHERWISE = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_tokens": "stop_token_ids"}
"""Fields of `SamplingParams` that bodies have under other names."""


def _listed(given: Any) -> Any:
    """A single stop string is a list of one."""
    return [given] if isinstance(given, str) else given


class StreamOptions(BaseModel):
    """What a stream contains beside completions."""

    model_config = ConfigDict(strict=True, frozen=True)

    include_usage: bool | None = None


class Body(BaseModel):
    """The fields that both endpoints share; null stands for the default."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    model: str
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0, le=LONGEST)
    min_tokens: int | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=STOP_LENGTH)]] | None,
        Field(max_length=STOPS),
        BeforeValidator(_listed),
    ] = None
    stop_token_ids: list[int] | None = Field(None, max_length=STOP_TOKENS)
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None

    @classmethod
    def read(cls, raw: bytes) -> Self:
        """Parse and validate the body of a request.

        Raises:
            Refused: names the first field that is wrong.
        """
        try:
            body = cls.model_validate_json(raw)
        except ValidationError as error:
            raise invalid(error) from error
        for name, value in (body.model_extra or {}).items():
            body._check_extra(name, value)
        return body

    @property
    def lark(self) -> tuple[str | None, str]:
        """The grammar that completions have to be written in, or None, and the field that asks for it.

        Raises:
            Refused: names the field that is wrong.
        """
        asked = self.response_format
        return (None, "") if asked is None else (asked.lark, asked.place)

    @property
    def samples(self) -> int:
        """Number of completions of each prompt."""
        return self.n or 1

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with an event of token usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_new_tokens: int, logprobs: int) -> SamplingParams:
        """The engine's sampling parameters for this body.

        Raises:
            Refused: names the first field that is wrong.
        """
        values = {name: getattr(self, name) for name in ALIKE}
        values |= {"min_new_tokens": self.min_tokens, "stop": self.stop, "stop_tokens": self.stop_token_ids}
        values |= {"max_new_tokens": max_new_tokens, "logprobs": logprobs}
        try:
            return SamplingParams(**{name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            raise invalid(error, OTHERWISE) from error

    def _check_extra(self, name: str, value: Any) -> None:
        if name in IGNORED or value is None or value in NEUTRAL.get(name, ()):
            return
        if name in NEUTRAL:
            raise unsupported(name)
        known, name = [*type(self).model_fields, *IGNORED, *NEUTRAL], name[:SHOWN_NAME]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise Refused(
            400, f"there is no field {name!r}; the nearest is {nearest}", param=name, code="unknown_parameter"
        )


def _tokens(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(t) is int and 0 <= t < 1 << 31 for t in given)


def _prompts(given: Any) -> Any:
    prompts = [given] if isinstance(given, str) or _tokens(given) else given
    fits = isinstance(prompts, list) and (all(isinstance(p, str) for p in prompts) or all(map(_tokens, prompts)))
    if prompts and fits:
        return prompts
    raise ValueError("it has to be a string, a list of strings, a list of tokens, or a list of lists of tokens")


class CompletionBody(Body):
    """The body of `POST /v1/completions`."""

    prompt: Annotated[Any, BeforeValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, as texts or as token numbers."""
        found: list[str] | list[list[int]] = self.prompt
        return found


class ChatBody(Body):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0, le=LONGEST)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[ToolBody] | None, Field(max_length=TOOLS), FailFast()] = None
    tool_choice: Annotated[Any, BeforeValidator(lambda given: None if given is None else choice(given))] = None
    parallel_tool_calls: bool | None = None

    @classmethod
    def read(cls, raw: bytes) -> Self:
        body = super().read(raw)
        if body.top_logprobs is not None and not body.logprobs:
            raise Refused(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        if not body.tools and body.tool_choice not in (None, "none", "auto"):
            raise Refused(400, "tool_choice needs tools", param="tool_choice")
        if body.tools and body.tool_choice != "none" and body.response_format and body.response_format.lark:
            raise Refused(400, "response_format and tools cannot both be: leave one out", param="response_format")
        return body

    @property
    def tool_use(self) -> ToolUse | None:
        """What may be done with tools, where there are some."""
        return (
            ToolUse(self.tools, self.tool_choice or "auto", self.parallel_tool_calls is not False)
            if self.tools
            else None
        )

    @property
    def lark(self) -> tuple[str | None, str]:
        """As of every body; calls that have to be made have a grammar, too."""
        forced = self.tool_use.lark() if self.tool_use else None
        return (forced, "tools") if forced else super().lark
