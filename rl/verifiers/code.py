"""Judges completions of code problems in parallel sandboxes, each warm and each at one item.

A completion is correct where the tests say so from outside of its process (see `examiner`), incorrect where they fail
or where it overruns its limits or ends, and ungradable where the tests or the sandbox fail. Sandboxes are started by
the pool's own threads only, as `VerifierPool`'s children are.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from lockstep.data.code_tests import CodeTests
from lockstep.rl.verifiers.examiner import Observation
from lockstep.rl.verifiers.extract import code_of
from lockstep.rl.verifiers.protection import USUAL, Protection, SandboxError, SandboxLimits
from lockstep.rl.verifiers.sandbox import Sandbox
from lockstep.rl.verifiers.verdict import Verdict


class CodePool:
    """`workers` sandboxes that judge (completion, tests), each of them within `limits`.

    requires: walls without which the pool refuses to start. uses: walls that it tries to build, for machines on which
    one of them misbehaves. Threads may share a pool. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        workers: int,
        limits: SandboxLimits | None = None,
        requires: Protection = USUAL,
        uses: Protection | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"a pool needs workers >= 1, not {workers}")
        self._limits, self._uses = limits or SandboxLimits(), uses or Protection()
        self._closed = False
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="code-pool")
        self._idle: SimpleQueue[Sandbox] = SimpleQueue()
        try:
            started = [self._threads.submit(self._new) for _ in range(workers)]
            self.protection, refused = [one.result() for one in started].pop()
            self._check(requires, refused)
        except BaseException:
            self.close()
            raise

    def grade(self, items: Sequence[tuple[str, CodeTests]]) -> list[Verdict]:
        """One verdict for each (completion, tests), in order; `extracted` is the code that was judged.

        Raises SandboxError if sandboxes cannot start, or if the pool is closed before the last verdict.
        """
        if self._closed:
            raise SandboxError("this pool is closed: make a new one")
        try:
            return list(self._threads.map(self._grade_one, items))
        except CancelledError as error:
            raise SandboxError("the pool was closed while it was grading") from error

    def run(self, code: str, stdin: str = "") -> Observation:
        """What a program prints: at most `keeper.SHOWN` characters of it.

        Raises SandboxError if a sandbox fails, or if the pool is closed.
        """
        if self._closed:
            raise SandboxError("this pool is closed: make a new one")
        try:
            return self._threads.submit(self._run_one, code, stdin).result()
        except CancelledError as error:
            raise SandboxError("the pool was closed while a program ran") from error

    def close(self) -> None:
        """Drops what is queued, lets items in work end or meet their deadline, kills every sandbox. May be repeated."""
        self._closed = True
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _new(self) -> tuple[Protection, str]:
        sandbox = Sandbox(self._limits, self._uses)
        self._idle.put(sandbox)
        return sandbox.await_ready()

    def _check(self, requires: Protection, refused: str) -> None:
        if missing := self.protection.lacks(requires):
            why = f" ({refused})" if refused else ""
            raise SandboxError(
                f"programs would run without {' and '.join(missing)}{why}, which this pool requires: "
                "run where the kernel grants them, or require less"
            )

    def _grade_one(self, item: tuple[str, CodeTests]) -> Verdict:
        """There are as many threads as sandboxes, so an idle one is always at hand."""
        completion, tests = item
        code = code_of(completion)
        program = {"prefix": tests.prefix, "completion": code, "entry_point": tests.entry_point}
        sandbox = self._ready()
        try:
            verdict = sandbox.judge(_packed(program), _packed(asdict(tests)), len(tests.cases) + 1)
        finally:
            self._idle.put(sandbox)
        return Verdict(verdict.outcome, verdict.reason, code)

    def _run_one(self, code: str, stdin: str) -> Observation:
        sandbox = self._ready()
        try:
            return sandbox.run(_packed({"prefix": "", "completion": code, "entry_point": ""}), stdin)
        finally:
            self._idle.put(sandbox)

    def _ready(self) -> Sandbox:
        """An idle sandbox; one that died is replaced, so that no item pays for an earlier death."""
        sandbox = self._idle.get()
        if sandbox.alive:
            return sandbox
        sandbox = Sandbox(self._limits, self._uses)
        standing, refused = sandbox.await_ready()
        if lost := standing.lacks(self.protection):
            sandbox.kill()
            raise SandboxError(f"a sandbox that was started again has no {' and '.join(lost)} ({refused})")
        return sandbox


def _packed(content: Mapping[str, object]) -> bytes:
    return json.dumps(content).encode()
