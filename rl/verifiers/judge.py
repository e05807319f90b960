"""Grades completions by what their problem has: the tests of a program, or else a grader, which may be an LLM."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from threading import RLock
from typing import Any, Protocol, Self

from lockstep.data.tasks.user_function import LLM_JUDGE
from lockstep.rl.types import Submission
from lockstep.rl.verdict import Verdict
from lockstep.rl.verifiers.answer_pool import AnswerPool, Grader
from lockstep.rl.verifiers.code_pool import CodePool
from lockstep.rl.verifiers.config import PROGRAMS, VerifierConfig
from lockstep.rl.verifiers.llm_judge.grader import JudgedTerms, LLMJudge
from lockstep.rl.verifiers.math import grader
from lockstep.rl.verifiers.user_functions import RewardFunctions, UserFunctions, UserGrader

BUILT_IN = ("answer", "gym", PROGRAMS)
"""Graders of the package; any other is the name of a function of the user's."""

Note = Callable[[str], object]


class _Pool(Protocol):
    """Processes that grade pairs of a completion and what it is graded by."""

    def grade(self, pairs: Sequence[tuple[str, Any]]) -> list[Verdict]:
        """One verdict for each pair, in order."""


def grader_of(name: str) -> Grader:
    """The function that grades a completion, by the name in `task.grader`: answer, gym, or a function of the user's.

    Those of the package take the reference answer beside it, and one of the user's the whole submission.
    """
    if name == "answer":
        return grader.grade
    if name != "gym":
        return UserGrader.of(name)
    from lockstep.rl.verifiers import reasoning_gym  # loads reasoning-gym, which takes a second

    return reasoning_gym.grade


class Judge:
    """Pools of graders and sandboxes, each started when the first problem of its kind comes; a context manager.

    Threads may share a judge.
    """

    def __init__(
        self,
        config: VerifierConfig,
        note: Note = print,
        reward_functions: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """
        Args:
            note: takes the sentence that says how programs are isolated, when the sandboxes start.
            reward_functions: names of functions that are computed of every completion; see `RewardFunctions`.
        """
        self._config, self._note = config, note
        self._functions = dict(reward_functions or {})
        self._pools: dict[str, _Pool] = {}
        self._terms: list[_Pool] | None = None
        self._started, self._starting = ExitStack(), RLock()

    def start(self, graders: Iterable[str]) -> None:
        """Start graders by name before the first completion comes, `PROGRAMS` for those that have tests.

        Raises:
            SandboxError: as `grade`.
        """
        for name in graders:
            self._pool(name)

    def grade(self, items: Sequence[Submission]) -> list[Verdict]:
        """One verdict for each completion, in order, with the terms of the recipe's own reward functions.

        Raises:
            SandboxError: where there are programs, and this machine cannot isolate them as required.
        """
        verdicts = {place: item.verdict for place, item in enumerate(items) if item.verdict}
        places: dict[str, list[int]] = defaultdict(list)
        for place, item in enumerate(items):
            if place not in verdicts:
                places[item.key.grader if item.key.tests is None else PROGRAMS].append(place)
        for name, some in places.items():
            pairs = [(items[place].text, _reference(name, items[place])) for place in some]
            verdicts |= zip(some, self._pool(name).grade(pairs), strict=True)
        found = [verdicts[place] for place in range(len(items))]
        return self._with_terms(items, found) if any(self._functions.values()) and items else found

    def close(self) -> None:
        """End the verifiers' processes."""
        self._started.close()

    def _with_terms(self, items: Sequence[Submission], verdicts: Sequence[Verdict]) -> list[Verdict]:
        with self._starting:
            if self._terms is None:
                self._terms = self._pools_of_terms()
        asked, found = [(item.text, item) for item in items], list(verdicts)
        for pool in self._terms:
            found = [_joined(verdict, more) for verdict, more in zip(found, pool.grade(asked), strict=True)]
        return found

    def _pools_of_terms(self) -> list[_Pool]:
        """What computes the reward functions: processes for those of the user's, and the LLM judge."""
        own, judged = dict[str, dict[str, str]](), dict[str, list[str]]()
        for task, terms in self._functions.items():
            own[task] = {term: name for term, name in terms.items() if name != LLM_JUDGE}
            judged[task] = [term for term in terms if term not in own[task]]
        pools: list[_Pool] = [self._answer_pool(RewardFunctions(own))] if any(own.values()) else []
        return pools + ([JudgedTerms(judged, self._pool(LLM_JUDGE))] if any(judged.values()) else [])

    def _pool(self, name: str) -> _Pool:
        with self._starting:
            if name not in self._pools:
                self._pools[name] = self._new_pool(name)
            return self._pools[name]

    def _new_pool(self, name: str) -> _Pool:
        if name == PROGRAMS:
            return self._code_pool()
        return self._llm_judge() if name == LLM_JUDGE else self._answer_pool(grader_of(name))

    def _llm_judge(self) -> LLMJudge:
        """With the part of the budget that each of the verifier workers has."""
        config = self._config.llm_judge
        if config is None:
            raise ValueError("there is no LLM judge: give url and model of one in [verifier.llm_judge]")
        share = config.budget // self._config.workers
        return self._started.enter_context(LLMJudge(config, self._note, share))

    def _answer_pool(self, grader: Grader) -> AnswerPool:
        """Processes that grade; what a user's function loads, it loads when it is imported."""
        workers, deadline = self._config.processes, self._config.deadline
        own = isinstance(grader, UserFunctions)
        pool = AnswerPool(workers, deadline, grader, examples=()) if own else AnswerPool(workers, deadline, grader)
        return self._started.enter_context(pool)

    def _code_pool(self) -> CodePool:
        sandbox = self._config.sandbox
        pool = CodePool(self._config.processes, sandbox.limits, sandbox.required, libraries=sandbox.libraries)
        self._started.enter_context(pool)
        self._note(str(pool.isolation))
        return pool

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _joined(verdict: Verdict, more: Verdict) -> Verdict:
    """A verdict with the terms and the reason of another."""
    reason = "; ".join(dict.fromkeys(filter(None, (verdict.reason, more.reason))))
    return replace(verdict, terms={**verdict.terms, **more.terms}, reason=reason)


def _reference(grader: str, item: Submission) -> Any:
    """What a grader takes beside the completion."""
    if grader == PROGRAMS:
        return item.key.tests
    return item.key.answer if grader in BUILT_IN else item
