"""Grades completions by what their problem has: the tests of a program, or else a reference answer."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from threading import Lock
from typing import Any, Self

from lockstep.data.tasks.code_tests import CodeTests
from lockstep.rl.types import Submission
from lockstep.rl.verdict import Verdict
from lockstep.rl.verifiers.answer_pool import AnswerPool, Grader
from lockstep.rl.verifiers.code_pool import CodePool
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.verifiers.math import grader
from lockstep.rl.verifiers.user_functions import RewardFunctions, UserGrader

Note = Callable[[str], object]


def grader_of(name: str) -> Grader:
    """The function that grades a completion, by the name in `task.grader`: answer, gym, or a function of the user's.

    Those of the package take the reference answer beside it, and one of the user's the whole submission.
    """
    if name == "answer":
        return grader.grade
    if name != "gym":
        return UserGrader(name)
    from lockstep.rl.verifiers import reasoning_gym  # loads reasoning-gym, which takes a second

    return reasoning_gym.grade


class Judge:
    """Pools of graders and sandboxes, each started when the first problem of its kind comes; a context manager.

    Threads may share a judge.
    """

    def __init__(
        self,
        config: VerifierConfig,
        grader: str = "answer",
        note: Note = print,
        reward_functions: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            grader: of problems without tests; see `grader_of`.
            note: takes the sentence that says how programs are isolated, when the sandboxes start.
            reward_functions: names of functions that are computed of every completion, by the name of their term.
        """
        self._config, self._grader, self._note = config, grader_of(grader), note
        self._functions = dict(reward_functions or {})
        self._started, self._starting = ExitStack(), Lock()

    def start(self, *, programs: bool) -> None:
        """Start the verifiers of programs, or those of answers, before the first one comes.

        Raises:
            SandboxError: as `grade`.
        """
        with self._starting:
            _ = self._programs if programs else self._answers

    def grade(self, items: Sequence[Submission]) -> list[Verdict]:
        """One verdict for each completion, in order, with the terms of the recipe's own reward functions.

        Raises:
            SandboxError: where there are programs, and this machine cannot isolate them as required.
        """
        open_ = [item for item in items if item.verdict is None]
        answers = [(item.text, self._reference(item)) for item in open_ if item.key.tests is None]
        programs = [(item.text, item.key.tests) for item in open_ if item.key.tests is not None]
        of_answers = iter(self._grade_answers(answers) if answers else ())
        of_programs = iter(self._grade_programs(programs) if programs else ())
        verdicts = [i.verdict or next(of_answers if i.key.tests is None else of_programs) for i in items]
        return self._with_terms(items, verdicts) if self._functions and items else verdicts

    def close(self) -> None:
        """End the verifiers' processes."""
        self._started.close()

    def _reference(self, item: Submission) -> Any:
        return item if isinstance(self._grader, UserGrader) else item.key.answer

    def _with_terms(self, items: Sequence[Submission], verdicts: Sequence[Verdict]) -> list[Verdict]:
        with self._starting:
            pool = self._rewards
        found = zip(verdicts, pool.grade([(item.text, item) for item in items]), strict=True)
        return [replace(v, terms=f.terms, reason="; ".join(filter(None, (v.reason, f.reason)))) for v, f in found]

    def _grade_answers(self, answers: Sequence[tuple[str, Any]]) -> list[Verdict]:
        self.start(programs=False)
        return self._answers.grade(answers)

    def _grade_programs(self, programs: Sequence[tuple[str, CodeTests]]) -> list[Verdict]:
        self.start(programs=True)
        return self._programs.grade(programs)

    @cached_property
    def _answers(self) -> AnswerPool:
        if not isinstance(self._grader, UserGrader):
            pool = AnswerPool(self._config.processes, self._config.deadline, self._grader)
        else:
            pool = AnswerPool(self._config.processes, self._config.deadline, self._grader, examples=())
        return self._started.enter_context(pool)

    @cached_property
    def _rewards(self) -> AnswerPool:
        functions = RewardFunctions(self._functions)
        return self._started.enter_context(
            AnswerPool(self._config.processes, self._config.deadline, functions, examples=())
        )

    @cached_property
    def _programs(self) -> CodePool:
        sandbox = self._config.sandbox
        pool = CodePool(self._config.processes, sandbox.limits, sandbox.required, libraries=sandbox.libraries)
        self._started.enter_context(pool)
        self._note(str(pool.isolation))
        return pool

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
