"""Grades completions by an LLM: one question each, equal ones asked once, those without a score ungradable.

All requests share one event loop in a thread of its own, however many threads wait for verdicts.
"""

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from threading import Thread
from typing import Any, Protocol, Self, TypeVar

from lockstep.rl.types import AnswerKey, Submission
from lockstep.rl.verdict import Outcome, Verdict, of_credit
from lockstep.rl.verifiers.llm_judge.client import EndpointError, Message, Reply
from lockstep.rl.verifiers.llm_judge.config import LLMJudgeConfig
from lockstep.rl.verifiers.llm_judge.endpoint import BudgetSpent, Endpoint
from lockstep.rl.verifiers.llm_judge.rubric import NoScore, Score, question, read_score, reminder
from lockstep.rl.verifiers.user_functions import of_task

KEPT = 1 << 16
"""Verdicts that are kept for questions that come again."""
SHOWN = 500
"""Characters of a judge's reasons that a verdict repeats."""

Result = TypeVar("Result")


class LLMJudgeClosed(RuntimeError):
    """The judge was closed before it had graded."""


class LLMJudge:
    """Grades (response, submission) by an LLM; a context manager that ends its requests. Threads may share it."""

    def __init__(self, config: LLMJudgeConfig, note: Callable[[str], object], budget: int = 0) -> None:
        """
        Args:
            note: takes a sentence when the budget is spent, and one on what was asked when it is closed.
            budget: answers at most; 0 for as many as it takes.

        Raises:
            EndpointError: where the variable of the API key is not set.
        """
        self._config, self._note = config, note
        self._endpoint = Endpoint(config, budget)
        self._known = dict[bytes, Verdict]()
        self._asking = dict[bytes, asyncio.Task[Verdict]]()
        self._is_spent = False
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="llm-judge", daemon=True)
        self._thread.start()
        self._run(self._endpoint.open())

    def grade(self, pairs: Sequence[tuple[str, Submission]]) -> list[Verdict]:
        """One verdict for each (response, submission), in order: its score as credit, the judge's reasons as reason.

        Raises:
            LLMJudgeClosed: if it was closed before the last verdict.
        """
        return self._run(self._grade([question(self._config, response, given) for response, given in pairs]))

    def score(self, response: str, submission: Submission) -> Score:
        """The judge's score of one response; where its answer has none it is asked once more.

        Raises:
            NoScore: where its second answer has none either.
            EndpointError: where it does not answer.
        """
        return self._run(self._score(question(self._config, response, submission)))

    def close(self) -> None:
        """Ends open requests and the connections. Idempotent."""
        if self._loop.is_closed():
            return
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        answers, tokens = self._endpoint.answers, self._endpoint.tokens
        self._note(
            f"the LLM judge {self._config.model} gave {answers} answers, of {tokens} tokens with their questions"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        if self._loop.is_closed():
            work.close()
            raise LLMJudgeClosed("this LLM judge is closed: make a new one")
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except CancelledError as error:
            raise LLMJudgeClosed("the LLM judge was closed while it was grading") from error

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._endpoint.close()

    async def _grade(self, questions: Sequence[str]) -> list[Verdict]:
        return await asyncio.gather(*map(self._verdict, questions))

    async def _verdict(self, asked: str) -> Verdict:
        """The verdict on a question; that of an equal one, where there is one or it is being asked."""
        key = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).digest()
        if key in self._known:
            return self._known[key]
        if key not in self._asking:
            self._asking[key] = asyncio.create_task(self._ask(key, asked))
        return await asyncio.shield(self._asking[key])

    async def _ask(self, key: bytes, asked: str) -> Verdict:
        try:
            verdict = self._graded(await self._score(asked))
        except (EndpointError, NoScore) as error:
            if isinstance(error, BudgetSpent) and not self._is_spent:
                self._is_spent = True
                self._note(f"LLM judge: {error}; what is not graded yet is ungradable from here on")
            return Verdict(Outcome.ungradable, f"LLM judge: {error}")
        finally:
            del self._asking[key]
        self._known[key] = verdict
        if len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
        return verdict

    def _graded(self, score: Score) -> Verdict:
        reasons = f"LLM judge: {' '.join(score.reasons.split())}"[:SHOWN] if score.reasons else ""
        return replace(of_credit(self._config.credit(score.value)), reason=reasons)

    async def _score(self, asked: str) -> Score:
        messages: list[Message] = [{"role": "user", "content": asked}]
        reply = await self._endpoint.complete(messages)
        try:
            return self._read(reply)
        except NoScore:
            messages.append({"role": "assistant", "content": reply.text or "(nothing)"})
            messages.append({"role": "user", "content": reminder(self._config)})
            return self._read(await self._endpoint.complete(messages))

    def _read(self, reply: Reply) -> Score:
        if reply.finish_reason == "length":  # what looks like SCORE: 1 may be the beginning of SCORE: 10
            raise NoScore(f"its answer was cut off, at {reply.text[-80:]!r}: raise verifier.llm_judge.max_tokens")
        return read_score(self._config, reply.text)


def trial(config: LLMJudgeConfig) -> str:
    """Asks a judge for the score of one right answer, without patience; returns a sentence on what it said.

    Raises:
        EndpointError: where it does not answer; the message says what may be changed.
    """
    hasty = config.model_copy(update={"retries": 1, "patience_s": 3.0})
    name, right = f"the LLM judge {config.model} at {config.url}", Submission("4", AnswerKey("4"), "What is 2 + 2?")
    with LLMJudge(hasty, note=lambda sentence: None) as judge:
        try:
            score = judge.score(right.text, right)
        except NoScore as error:
            return f"{name} gave no score to a right answer of 2 + 2 ({error}): completions may stay ungradable"
    return f"{name} gave {score.value:g}, from {config.low:g} to {config.high:g}, to a right answer of 2 + 2"


class Grader(Protocol):
    """What grades submissions: an `LLMJudge`."""

    def grade(self, pairs: Sequence[tuple[str, Submission]]) -> list[Verdict]:
        """One verdict for each pair, in order."""


class JudgedTerms:
    """Reward terms whose value is the credit that a judge gives."""

    def __init__(self, by_task: Mapping[str, Sequence[str]], judge: Grader) -> None:
        """
        Args:
            by_task: names of the terms, by task; under an empty name those of all other tasks.
        """
        self._by_task, self._judge = by_task, judge

    def grade(self, pairs: Sequence[tuple[str, Submission]]) -> list[Verdict]:
        """Verdicts with the terms of each one's task, or with the reason why they are missing; see `LLMJudge.grade`."""
        terms = [of_task(self._by_task, given.task, ()) for _, given in pairs]
        asked = [pair for pair, names in zip(pairs, terms, strict=True) if names]
        verdicts = iter(self._judge.grade(asked))
        return [_as_terms(next(verdicts), names) if names else Verdict(Outcome.correct) for names in terms]


def _as_terms(verdict: Verdict, names: Sequence[str]) -> Verdict:
    if verdict.reward is None:
        return Verdict(Outcome.ungradable, verdict.reason)
    return Verdict(Outcome.correct, verdict.reason, terms=dict.fromkeys(names, verdict.reward))
