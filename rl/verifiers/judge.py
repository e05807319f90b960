"""Grades completions by what their problem has: the tests of a program, or else a reference answer."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from threading import Lock
from typing import Literal, Self

from lockstep.data.tasks.code_tests import CodeTests
from lockstep.rl.types import AnswerKey
from lockstep.rl.verdict import Verdict
from lockstep.rl.verifiers.answer_pool import AnswerPool, Grader
from lockstep.rl.verifiers.code_pool import CodePool
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.verifiers.math import grader

Note = Callable[[str], object]
GraderName = Literal["answer", "gym"]


def grader_of(name: GraderName) -> Grader:
    """The function that grades a completion against its problem's answer, by the name in `task.grader`."""
    if name == "answer":
        return grader.grade
    from lockstep.rl.verifiers import reasoning_gym  # loads reasoning-gym, which takes a second

    return reasoning_gym.grade


class Judge:
    """Pools of graders and sandboxes, each started when the first problem of its kind comes; a context manager.

    Threads may share a judge.
    """

    def __init__(self, config: VerifierConfig, grader: GraderName = "answer", note: Note = print) -> None:
        """
        Args:
            grader: of problems without tests.
            note: takes the sentence that says how programs are isolated, when the sandboxes start.
        """
        self._config, self._grader, self._note = config, grader_of(grader), note
        self._started, self._starting = ExitStack(), Lock()

    def start(self, *, programs: bool) -> None:
        """Start the verifiers of programs, or those of answers, before the first one comes.

        Raises:
            SandboxError: as `grade`.
        """
        with self._starting:
            _ = self._programs if programs else self._answers

    def grade(self, items: Sequence[tuple[str, AnswerKey]]) -> list[Verdict]:
        """One verdict for each (completion, what it is judged by), in order.

        Raises:
            SandboxError: where there are programs, and this machine cannot isolate them as required.
        """
        answers = [(text, key.answer) for text, key in items if key.tests is None]
        programs = [(text, key.tests) for text, key in items if key.tests is not None]
        of_answers = iter(self._grade_answers(answers) if answers else ())
        of_programs = iter(self._grade_programs(programs) if programs else ())
        return [next(of_answers if key.tests is None else of_programs) for _, key in items]

    def close(self) -> None:
        """End the verifiers' processes."""
        self._started.close()

    def _grade_answers(self, answers: Sequence[tuple[str, str]]) -> list[Verdict]:
        self.start(programs=False)
        return self._answers.grade(answers)

    def _grade_programs(self, programs: Sequence[tuple[str, CodeTests]]) -> list[Verdict]:
        self.start(programs=True)
        return self._programs.grade(programs)

    @cached_property
    def _answers(self) -> AnswerPool:
        pool = AnswerPool(self._config.processes, self._config.deadline, self._grader)
        return self._started.enter_context(pool)

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
