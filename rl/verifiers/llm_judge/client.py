"""One request for a chat completion, by OpenAI's API: what is sent, what is read, and what each failure means."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from lockstep.rl.verifiers.llm_judge.config import LLMJudgeConfig
from lockstep.rl.verifiers.llm_judge.rubric import response_format

Message = Mapping[str, str]
"""Of a conversation: its role and content."""

CONNECT_S = 10.0
"""Seconds that a connection may take."""
_AGAIN = {408, 409, 429}
"""Statuses below 500 that may change when the same is asked again."""
_AWAY = {429, 502, 503, 504}
"""Statuses that say nothing of the question."""
_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")


class EndpointError(RuntimeError):
    """A question that the endpoint did not answer; the message says why, and what may be changed."""

    def __init__(
        self, reason: str, *, again: bool = False, away: bool = False, pause: float = 0.0, cost: bool = False
    ) -> None:
        """
        Args:
            again: whether the same question may be answered when it is asked again.
            away: whether others would not have been answered either.
            pause: seconds that the endpoint asks to wait.
            cost: whether the endpoint may have computed an answer.
        """
        super().__init__(reason)
        self.again, self.away, self.pause, self.cost = again, away, pause, cost


@dataclass(frozen=True)
class Reply:
    """A model's answer."""

    text: str
    finish_reason: str
    """`length` where it was cut off."""
    tokens: int
    """Of the conversation and the answer, as the endpoint counts them; 0 where it does not."""


class ChatClient:
    """A client for the coroutines of one event loop, between `open` and `close`."""

    def __init__(self, config: LLMJudgeConfig) -> None:
        """
        Raises:
            EndpointError: where the variable of the API key is not set.
        """
        self._config, self._key = config, _key(config.api_key_env)

    async def open(self) -> None:
        """Prepares connections, in the event loop that they are used in."""
        limits = aiohttp.ClientTimeout(total=self._config.timeout_s, sock_connect=CONNECT_S)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        connections = aiohttp.TCPConnector(limit=0)
        proxy = _proxy(self._config.url)  # not by trust_env, which would send what ~/.netrc has for that host, too
        self._session = aiohttp.ClientSession(timeout=limits, headers=headers, connector=connections, proxy=proxy)

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()

    async def complete(self, messages: Sequence[Message]) -> Reply:
        """The model's answer to a conversation, asked for once.

        Raises:
            EndpointError: when it has none.
        """
        config, body = self._config, self._body(messages)
        try:
            async with self._session.post(config.endpoint, json=body, allow_redirects=False) as response:
                text = await response.text(errors="replace")
        except TimeoutError as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                reason = f"{config.url} cannot be reached within {CONNECT_S:g} s"
                raise EndpointError(reason, again=True, away=True) from error
            reason = f"{config.url} did not answer within {config.timeout_s:g} s: raise verifier.llm_judge.timeout_s"
            raise EndpointError(reason, again=True, cost=True) from error
        except (aiohttp.ClientError, OSError) as error:
            reason = f"{config.url} cannot be reached ({self._hidden(str(error) or type(error).__name__)})"
            raise EndpointError(reason, again=True, away=True) from error
        if response.status != 200:
            raise self._refusal(response, text)
        return self._read(text)

    def _body(self, messages: Sequence[Message]) -> dict[str, Any]:
        config = self._config
        body = {"model": config.model, "messages": list(messages), "temperature": config.temperature}
        if config.max_tokens:
            body["max_tokens"] = config.max_tokens
        if config.structured:
            body["response_format"] = response_format()
        return body | config.body

    def _read(self, text: str) -> Reply:
        """The answer in a body of OpenAI's format."""
        try:
            body = json.loads(text)
            choice = body["choices"][0]
            answer, finish_reason = choice["message"].get("content") or "", str(choice.get("finish_reason"))
            return Reply(str(answer), finish_reason, int((body.get("usage") or {}).get("total_tokens") or 0))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{self._config.url} answered no chat completion, but {self._hidden(text)!r}"
            raise EndpointError(reason, again=True, cost=True) from error

    def _refusal(self, response: aiohttp.ClientResponse, text: str) -> EndpointError:
        """The error of an answer whose status is not 200, with what may be changed."""
        status, config = response.status, self._config
        said = f"{config.url} answered {status} ({self._hidden(_message(text))})"
        if status in (401, 403):
            key = f"set {config.api_key_env} to a key that may ask for it" if self._key else "give api_key_env"
            return EndpointError(f"{said}: {key}")
        if status == 404:
            return EndpointError(f"{said}: url mostly ends in /v1, and model is a name that it serves")
        if 300 <= status < 400:
            return EndpointError(
                f"{said}: url is to be where that leads, {response.headers.get('Location', '')!r:.200}"
            )
        if status in _AGAIN or status >= 500:
            pause = _seconds(response.headers.get("Retry-After", ""))
            return EndpointError(said, again=True, away=status in _AWAY, pause=pause)
        return EndpointError(f"{said}: change what it names among model, max_tokens, temperature, structured and body")

    def _hidden(self, text: str) -> str:
        """The beginning of what an endpoint says, without the key."""
        return (text.replace(self._key, "…") if self._key else text)[:300]


def _key(variable: str) -> str:
    """The API key in a variable; what does not look like the name of one is not repeated, since it may be the key."""
    if not variable:
        return ""
    if not _NAME.fullmatch(variable):
        raise EndpointError("api_key_env is the name of a variable, such as JUDGE_API_KEY, and never the key itself")
    if not os.environ.get(variable, "").strip():
        raise EndpointError(f"{variable} is not set, which api_key_env names: export it, or give it to a job by --env")
    return os.environ[variable].strip()


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for a URL, as HTTPS_PROXY without NO_PROXY."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)


def _message(text: str) -> str:
    """What the body of an error says, in OpenAI's format and others."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return " ".join(text.split())
    found = body.get("error", body) if isinstance(body, dict) else body
    return str(found.get("message") or found.get("detail") or found) if isinstance(found, dict) else str(found)


def _seconds(header: str) -> float:
    """Seconds that Retry-After asks for, as a number or a date (RFC 9110, 10.2.3); 0 where it is neither."""
    try:
        return max(0.0, float(header)) if header.strip()[:1].isdigit() else _until(header)
    except ValueError:
        return 0.0


def _until(date: str) -> float:
    when = parsedate_to_datetime(date)
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
