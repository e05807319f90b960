"""Requests are made again as HTTP says, an endpoint that is away is waited for, and a budget holds."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from lockstep.rl.verifiers.llm_judge.client import EndpointError, Reply
from lockstep.rl.verifiers.llm_judge.config import LLMJudgeConfig
from lockstep.rl.verifiers.llm_judge.endpoint import BudgetSpent, Endpoint
from tests.rl.verifiers.llm_judge.scripted_endpoint import CLOSE, HANG, Scripted, Step, refuses, says, scripted

ASKED = [{"role": "user", "content": "score this"}]


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def using(
    config: LLMJudgeConfig, work: Callable[[Endpoint], Awaitable[None]], budget: int = 0, time: Time | None = None
) -> Time:
    """Runs work with an endpoint; returns its time."""
    time = time or Time()

    async def run() -> None:
        endpoint = Endpoint(config, budget, time.sleep, time)
        await endpoint.open()
        try:
            await work(endpoint)
        finally:
            await endpoint.close()

    asyncio.run(run())
    return time


def ask(config: LLMJudgeConfig, replies: list[Reply]) -> Time:
    async def work(endpoint: Endpoint) -> None:
        replies.append(await endpoint.complete(ASKED))

    return using(config, work)


def failure(config: LLMJudgeConfig) -> tuple[str, Time]:
    """Why a question is not answered, and the time that it took."""
    said: list[str] = []

    async def work(endpoint: Endpoint) -> None:
        with pytest.raises(EndpointError) as caught:
            await endpoint.complete(ASKED)
        said.append(str(caught.value))

    time = using(config, work)
    return said[0], time


def test_a_request_is_openais(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_TEST", "sk-secret\n")
    replies: list[Reply] = []
    with scripted(says("SCORE: 1", "length")) as server:
        ask(server.config(api_key_env="KEY_OF_TEST", structured=True, body={"seed": 3}, max_tokens=0), replies)
        ask(server.config(temperature=0.5), replies)
    assert replies[0] == Reply("SCORE: 1", "length", 10)
    assert server.keys == ["Bearer sk-secret", None]
    assert server.asked[0].pop("response_format")["json_schema"]["schema"]["required"] == ["reasons", "score"]
    assert server.asked[0] == {"model": "judge", "messages": ASKED, "temperature": 0, "seed": 3}
    assert server.asked[1] == {"model": "judge", "messages": ASKED, "temperature": 0.5, "max_tokens": 512}


def test_what_may_pass_is_tried_again_with_growing_pauses() -> None:
    passing = [refuses(500), refuses(408), refuses(409), Step("<html>"), Step("[]"), CLOSE, refuses(503)]
    replies: list[Reply] = []
    with scripted(*passing, says("fine")) as server:
        time = ask(server.config(), replies)
    assert [reply.text for reply in replies] == ["fine"]
    assert len(server.asked) == len(time.slept) + 1 == len(passing) + 1
    assert all(2**n <= pause <= 1.5 * 2**n for n, pause in enumerate(time.slept[:6]))
    assert 60 <= time.slept[6] <= 90


def test_an_endpoint_says_how_long_to_wait() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    waits = [refuses(429, Retry_After="17"), refuses(503, Retry_After=soon), refuses(429, Retry_After="later")]
    with scripted(*waits, says("fine")) as server:
        slept = ask(server.config(), []).slept
    assert 17 <= slept[0] <= 1.5 * 17
    assert 90 <= slept[1] <= 150
    assert 4 <= slept[2] <= 6


def test_a_pause_longer_than_patience_is_not_waited_for() -> None:
    with scripted(refuses(429, "quota", Retry_After="3600")) as server:
        said, time = failure(server.config())
    assert time.slept == []
    assert "answered 429 (quota)" in said


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (refuses(400, "too long"), "answered 400 (too long): change what it names among model, max_tokens"),
        (refuses(401, "no key"), "answered 401 (no key): give api_key_env"),
        (refuses(403, "no"), "answered 403 (no): give api_key_env"),
        (refuses(404, "no model judge"), "(no model judge): url mostly ends in /v1, and model is a name"),
        (refuses(307, Location="http://elsewhere/v1"), "url is to be where that leads, 'http://elsewhere/v1'"),
        (Step('{"detail": "Not  Found"}', 404), "answered 404 (Not  Found)"),
        (Step("plain\n words", 422), "answered 422 (plain words)"),
    ],
)
def test_what_will_not_pass_is_asked_once(step: Step, said: str) -> None:
    with scripted(step) as server:
        found, time = failure(server.config())
    assert said in found
    assert found.startswith(server.url)
    assert (len(server.asked), time.slept) == (1, [])


def test_a_key_is_never_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_TEST", "sk-secret")
    with scripted(refuses(401, "Incorrect API key: sk-secret")) as server:
        said, _ = failure(server.config(api_key_env="KEY_OF_TEST"))
    assert "(Incorrect API key: …): set KEY_OF_TEST to a key that may ask for it" in said
    with pytest.raises(EndpointError, match="never the key itself") as caught:
        Endpoint(LLMJudgeConfig(url="http://h/v1", model="m", api_key_env="sk-secret"))
    assert "sk-secret" not in str(caught.value)
    with pytest.raises(EndpointError, match=r"KEY_NOWHERE is not set, .*: export it, or give it to a job by --env"):
        Endpoint(LLMJudgeConfig(url="http://h/v1", model="m", api_key_env="KEY_NOWHERE"))


def test_an_endpoint_that_hangs_has_a_limit_of_time() -> None:
    with scripted(HANG, says("fine")) as server:
        replies: list[Reply] = []
        ask(server.config(timeout_s=0.2), replies)
        assert replies[0].text == "fine"
    with scripted(HANG) as server:
        said, time = failure(server.config(timeout_s=0.1, retries=1))
    assert said.endswith("did not answer within 0.1 s: raise verifier.llm_judge.timeout_s")
    assert len(time.slept) == 1


def test_an_endpoint_that_is_away_is_waited_for_and_then_fails_at_once() -> None:
    with scripted(says("fine")) as server:
        gone = server.config(retries=0, patience_s=600)
    said, time = failure(gone)
    assert re.search(r"/v1 cannot be reached \(.*[Cc]onnect", said)
    assert 500 < time.now - 100 <= 600

    async def work(endpoint: Endpoint) -> None:
        for _ in range(3):
            with pytest.raises(EndpointError):
                await endpoint.complete(ASKED)
            time.now += 100
            slept.append(len(time.slept))

    slept: list[int] = []
    time = Time()
    using(gone, work, time=time)
    assert slept[0] == slept[1] == slept[2] > 10


@pytest.fixture
def flaky() -> Iterator[Scripted]:
    """A server that answers every other request with 503."""
    with scripted(*[step for n in range(20) for step in (refuses(503), says(str(n)))]) as server:
        yield server


def test_a_question_that_fails_while_others_are_answered_has_its_retries(flaky: Scripted) -> None:
    async def work(endpoint: Endpoint) -> None:
        found = await asyncio.gather(*(endpoint.complete(ASKED) for _ in range(8)), return_exceptions=True)
        counts.append(sum(isinstance(each, Reply) for each in found))

    counts: list[int] = []
    using(flaky.config(concurrent=1), work)
    using(flaky.config(concurrent=1, retries=0), work)
    assert counts[0] == 8
    assert 0 < counts[1] < 8


def test_so_many_requests_are_open_at_one_time() -> None:
    async def work(endpoint: Endpoint) -> None:
        asking = [asyncio.create_task(endpoint.complete(ASKED)) for _ in range(9)]
        while len(server.asked) < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    with scripted(HANG) as server:
        using(server.config(concurrent=3), work)
        assert len(server.asked) == 3


def test_a_budget_is_of_answers_and_failures_cost_nothing() -> None:
    async def work(endpoint: Endpoint) -> None:
        found = await asyncio.gather(*(endpoint.complete(ASKED) for _ in range(6)), return_exceptions=True)
        assert sum(isinstance(each, Reply) for each in found) == 4
        spent = [each for each in found if isinstance(each, BudgetSpent)]
        assert [str(each) for each in spent] == [
            "the budget of 4 answers is spent: raise verifier.llm_judge.budget"
        ] * 2
        assert (endpoint.answers, endpoint.tokens) == (4, 40)

    with scripted(refuses(500), CLOSE, says("fine")) as server:
        using(server.config(concurrent=1), work, budget=4)
