"""Judges completions of code problems in parallel sandboxes, which stay warm and take one item at a time.

A completion is correct where the tests pass outside of its process (see `lockstep.rl.sandbox.harness`), incorrect
where they fail or where it overruns its limits or ends, and ungradable where the tests or the sandbox fail, or
where other programs have the machine's processors. Sandboxes are started by the pool's own threads only, as
`AnswerPool`'s children are.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from lockstep.data.tasks.code_tests import CodeTests
from lockstep.rl.sandbox.distributions import DEFAULT, located
from lockstep.rl.sandbox.harness.standard_streams import Observation
from lockstep.rl.sandbox.isolation import USUAL, Isolation, SandboxError, SandboxLimits
from lockstep.rl.sandbox.sandbox import Sandbox
from lockstep.rl.verdict import Verdict
from lockstep.rl.verifiers.code_extraction import code_of
from lockstep.rl.verifiers.process_pool import ProcessPool


class CodePool(ProcessPool[Sandbox]):
    """`workers` sandboxes that judge (completion, tests), each of them within `limits`.

    requires: isolation mechanisms without which the pool refuses to start. uses: those that it tries to activate, for
    machines on which one of them misbehaves. libraries: installed distributions that programs and tests may import.
    Threads may share a pool. Close it, or use it as a context manager.
    """

    failure = SandboxError

    def __init__(
        self,
        workers: int,
        limits: SandboxLimits | None = None,
        requires: Isolation = USUAL,
        uses: Isolation | None = None,
        libraries: Sequence[str] = DEFAULT,
    ) -> None:
        if workers < 1:
            raise ValueError(f"a pool needs workers >= 1, not {workers}")
        self._limits, self._uses, self._libraries = limits or SandboxLimits(), uses or Isolation(), located(libraries)
        super().__init__(workers, "code-pool")
        self._started: set[Sandbox] = set()
        try:
            started = [self._threads.submit(self._new) for _ in range(workers)]
            self.isolation, refused = [one.result() for one in started].pop()
            self._check(requires, refused)
        except BaseException:
            self.close()
            raise

    def grade(self, items: Sequence[tuple[str, CodeTests]]) -> list[Verdict]:
        """One verdict for each (completion, tests), in order; `extracted` is the code that was judged.

        Raises SandboxError if sandboxes cannot start, or if the pool is closed before the last verdict.
        """
        return self._each(self._grade_one, items, "it was grading")

    def run(self, code: str, stdin: str = "") -> Observation:
        """What a program prints: at most `zygote.SHOWN` characters of it.

        Raises SandboxError if a sandbox fails, or if the pool is closed.
        """
        return self._each(self._run_one, [(code, stdin)], "a program ran")[0]

    def _new(self) -> tuple[Isolation, str]:
        sandbox = self._start()
        self._idle.put(sandbox)
        return sandbox.await_ready()

    def _start(self) -> Sandbox:
        sandbox = Sandbox(self._limits, self._uses, self._libraries)
        self._started.add(sandbox)
        return sandbox

    def _check(self, requires: Isolation, refused: str) -> None:
        if missing := self.isolation.lacks(requires):
            why = f" ({refused})" if refused else ""
            raise SandboxError(
                f"programs would run without {' and '.join(missing)}{why}, which this pool requires: "
                "run where the kernel grants them, or require less"
            )

    def _grade_one(self, item: tuple[str, CodeTests]) -> Verdict:
        completion, tests = item
        code = code_of(completion, tests)
        program = {"prefix": tests.prefix, "completion": code, "entry_point": tests.entry_point}
        sandbox = self._ready()
        try:
            verdict = sandbox.judge(_packed(program), _packed(asdict(tests)), len(tests.cases) + 1)
        finally:
            self._idle.put(sandbox)
        return Verdict(verdict.outcome, verdict.reason, code)

    def _run_one(self, program: tuple[str, str]) -> Observation:
        code, stdin = program
        sandbox = self._ready()
        try:
            return sandbox.run(_packed({"prefix": "", "completion": code, "entry_point": ""}), stdin)
        finally:
            self._idle.put(sandbox)

    def _ready(self) -> Sandbox:
        """An idle sandbox; one that died is replaced, so that no item pays for an earlier death.

        One that cannot be replaced is left for who comes next, and another is waited for. Raises SandboxError where
        none is left.
        """
        dead = []
        try:
            while not (sandbox := self._idle.get()).alive:
                dead.append(sandbox)
                try:
                    anew = self._anew()
                except SandboxError:
                    if not any(one.alive for one in list(self._started)):
                        raise
                else:
                    self._started.discard(dead.pop())
                    return anew
            return sandbox
        finally:
            for sandbox in dead:
                self._idle.put(sandbox)

    def _anew(self) -> Sandbox:
        sandbox = self._start()
        try:
            standing, refused = sandbox.await_ready()
            if lost := standing.lacks(self.isolation):
                raise SandboxError(f"a sandbox that was started again has no {' and '.join(lost)} ({refused})")
        except BaseException:
            self._started.discard(sandbox)
            sandbox.kill()
            raise
        return sandbox


def _packed(content: Mapping[str, object]) -> bytes:
    return json.dumps(content).encode()
