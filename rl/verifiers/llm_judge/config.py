"""The `[verifier.llm_judge]` section of a recipe: the endpoint, the rubric, and what asking it may cost."""

from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SCORING = ("model", "rubric", "low", "high", "structured", "temperature", "max_tokens", "body")
"""Keys that scores depend on."""

COMPLETION = "{completion}"
RUBRIC = """\
How well does the completion answer the prompt? It should be correct, complete and to the point.

The prompt:
{prompt}

The completion:
{completion}"""


class LLMJudgeConfig(BaseModel):
    """An LLM that scores completions by a rubric, behind an OpenAI-compatible endpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(description="base URL, as OpenAI's client takes it: http://127.0.0.1:8000/v1")
    model: str = Field(min_length=1, description="the name that the endpoint knows the model by")
    rubric: str = Field(
        RUBRIC, description="what to score by; {prompt}, {completion} and {answer} stand for texts of the sample"
    )
    low: float = Field(0.0, allow_inf_nan=False, description="the lowest score, which is a credit of 0")
    high: float = Field(10.0, allow_inf_nan=False, description="the highest score, which is a credit of 1")
    structured: bool = Field(
        False, description="have the endpoint's structured output write JSON, and not a last line SCORE: n"
    )
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="of the judge's answer")
    max_tokens: int = Field(512, ge=0, description="tokens of its answer at most; 0 leaves that to the endpoint")
    body: dict[str, Any] = Field({}, description="more fields of each request, such as reasoning_effort or seed")
    api_key_env: str = Field(
        "", description="the NAME of the environment variable with the API key; no key is sent where it is empty"
    )
    timeout_s: float = Field(60.0, gt=0, allow_inf_nan=False, description="seconds for one answer as a whole")
    retries: int = Field(6, ge=0, description="how often a question is asked again when it fails and others do not")
    patience_s: float = Field(
        900.0,
        ge=0,
        allow_inf_nan=False,
        description="seconds that an endpoint which answers nobody is waited for before completions are ungradable",
    )
    concurrent: int = Field(16, ge=1, description="requests that each verifier worker has open at one time")
    budget: int = Field(
        0, ge=0, description="answers of the judge at most, shared by the verifier workers; 0: as many as it takes"
    )

    @property
    def endpoint(self) -> str:
        """The URL that chat completions are asked of."""
        return f"{self.url.rstrip('/')}/chat/completions"

    def credit(self, score: float) -> float:
        """A score as a credit from 0 to 1."""
        return (score - self.low) / (self.high - self.low)

    @field_validator("url")
    @classmethod
    def _is_a_base_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it is no base URL: write http://HOST:PORT/v1, or https://HOST/v1")
        if parts.username or parts.query or parts.fragment:
            raise ValueError("a base URL has no user, query or fragment: name the variable of a key by api_key_env")
        return url

    @field_validator("rubric")
    @classmethod
    def _shows_the_completion(cls, rubric: str) -> str:
        if COMPLETION not in rubric:
            raise ValueError(f"it has no place for what is scored: write {COMPLETION} into it")
        return rubric

    @model_validator(mode="after")
    def _has_a_scale(self) -> "LLMJudgeConfig":
        if self.low >= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}: scores lie between them")
        return self
