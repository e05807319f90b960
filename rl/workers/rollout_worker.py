"""RolloutWorker: generates completions with a rollout engine and takes new weights from the policy.

The engine runs in a thread of its own, `EngineLoop`, which makes one pass after the other for as long as requests are
there: it does not wait for whoever takes the completions, however long that packs, saves or learns.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Condition, Thread
from time import perf_counter
from typing import Any, TypeVar

from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.model.config import Numerics
from lockstep.rl.rollout.config import OPENING, RolloutConfig
from lockstep.rl.rollout.output_processor import OutputProcessor, RolloutRequest, Written
from lockstep.rl.rollout.protocol import Engine
from lockstep.rl.types import Completion
from lockstep.rl.weight_sync.broadcast import Broadcast
from lockstep.rl.weight_sync.protocol import Shard
from lockstep.rl.workers.agreement import Loaded, digest_of, loaded
from lockstep.rl.workers.rank import RankWorker

Result = TypeVar("Result")


class EngineLoop:
    """Runs an engine in a thread: passes while there is work, and between two of them what others ask for.

    The engine is opened and used in this thread alone. Tensor ranks of one model are asked for the same in the same
    order; before each pass the first says how much of it comes before that pass, so that all make the same passes.
    """

    def __init__(self, open_engine: Callable[[], Engine]) -> None:
        """Opens the engine; raises what that raises."""
        self._changed = Condition()
        self._asked: list[tuple[Callable[[], Any], bool, Future[Any]]] = []
        self._came = self._done = self._passes = self._until = 0
        self._writes = False
        self._written, self._seconds, self._counted = list[Completion](), 0.0, (0, 0, 0)
        self._error: BaseException | None = None
        opened = Future[Engine]()
        Thread(target=self._run, args=(open_engine, opened), daemon=True, name="engine").start()
        self.engine = opened.result()

    def ask(self, function: Callable[[], Result], *, writes: bool = False) -> Result:
        """Calls a function in the engine's thread, between two passes; returns its result, or raises its error.

        Args:
            writes: whether passes go on behind it; otherwise none is made until somebody asks so.
        """
        answer = Future[Result]()
        with self._changed:
            self._asked.append((function, writes, answer))
            self._came += 1
            self._changed.notify_all()
        return answer.result()

    def add(self, requests: Sequence[RolloutRequest]) -> None:
        """Begins to write what requests ask for, and goes on with all that was asked for before.

        Raises:
            PromptTooLong, ValueError: see `Engine.add`.
        """
        self.ask(partial(self._add, requests), writes=True)

    def written(self, passes: int) -> Written:
        """Waits until a completion has ended, for at most so many passes; returns what has come since the last time.

        Raises:
            Exception: what a pass raised.
        """
        with self._changed:
            self._until = self._passes + passes
            self._changed.wait_for(self._has_something_to_say)
            error, self._error = self._error, None
            if error:
                raise error
            return self._taken()

    def settle(self) -> Written:
        """Makes passes until new weights may come, and none then; returns what has come since the last time."""
        self.ask(self._settle)
        with self._changed:
            return self._taken()

    def drop(self) -> None:
        """Drops all requests and what has come of them, and the prefix cache."""
        self.ask(self._drop)

    def _run(self, open_engine: Callable[[], Engine], opened: "Future[Engine]") -> None:
        try:
            self._engine = open_engine()
            self._processor = OutputProcessor(self._engine)
        except BaseException as error:
            opened.set_exception(error)
            return
        opened.set_result(self._engine)
        while True:
            self._answer(self._engine.agree(self._to_be_answered()))
            if self._writes:
                self._pass()

    def _to_be_answered(self) -> int:
        """How much was asked for so far; where there is nothing to write, something that has not been answered."""
        with self._changed:
            self._changed.wait_for(lambda: self._writes or self._came > self._done)
            return self._came

    def _answer(self, count: int) -> None:
        """Calls what was asked for, until so much has been answered."""
        while self._done < count:
            with self._changed:
                self._changed.wait_for(lambda: self._asked)
                function, writes, answer = self._asked.pop(0)
            try:
                result = function()
            except BaseException as error:
                self._note(writes=False)
                answer.set_exception(error)
            else:
                self._note(writes=writes)
                answer.set_result(result)
            self._done += 1

    def _pass(self) -> None:
        try:
            self._step()
        except BaseException as error:
            with self._changed:
                self._error, self._writes = error, False
                self._changed.notify_all()

    def _step(self) -> None:
        began = perf_counter()
        completions = self._processor.step()
        with self._changed:
            self._written += completions
            self._seconds += perf_counter() - began
            self._passes += 1
            self._writes = self._processor.has_work
            if self._has_something_to_say():
                self._changed.notify_all()

    def _note(self, *, writes: bool) -> None:
        with self._changed:
            self._writes = writes and self._processor.has_work
            self._changed.notify_all()

    def _has_something_to_say(self) -> bool:
        return bool(self._written or self._error or not self._writes or self._passes >= self._until)

    def _taken(self) -> Written:
        counted = self._counts()
        drawn, proposed, accepted = (now - before for now, before in zip(counted, self._counted, strict=True))
        found = Written(self._written, drawn, self._seconds, proposed, accepted)
        self._written, self._seconds, self._counted = [], 0.0, counted
        return found

    def _counts(self) -> tuple[int, int, int]:
        """Tokens that the engine has drawn, computed on trial, and drawn of those on trial."""
        said = self._engine.statistics
        return said.generated_tokens, said.proposed_tokens, said.accepted_tokens

    def _add(self, requests: Sequence[RolloutRequest]) -> None:
        for request in requests:
            self._processor.add(request)

    def _settle(self) -> None:
        while not self._engine.ready_for_update():
            self._step()

    def _drop(self) -> None:
        self._processor.drop()
        self._engine.forget()
        with self._changed:
            self._written = []


class RolloutWorker(RankWorker):
    """One tensor-parallel rank of a rollout engine; all ranks of a model get the same calls in the same order."""

    role = "rollout"

    def start(
        self,
        rank: int,
        address: str,
        port: int,
        checkpoint: Path | Storage,
        dtype: str,
        limits: RolloutConfig,
        numerics: Numerics = "fast",
    ) -> None:
        """Loads this tensor rank's part of the model as weight version 0."""
        opening, at = import_module(OPENING[limits.engine]), (address, port)
        self._loop = EngineLoop(
            partial(opening.open_rank, checkpoint, limits, dtype=dtype, numerics=numerics, rank=rank, meeting=at)
        )
        self._engine, self._speaks = self._loop.engine, rank == 0
        given = digest_of(dtype, limits, numerics)
        weights = {f"the weights of tensor rank {rank}": self._loop.ask(self._engine.weights_digest)}
        self._loaded = loaded(given, digest_of(Checkpoint(checkpoint).manifest), weights)
        self.log.info("ready for %d sequences", limits.sequences)

    def loaded(self) -> Loaded:
        """What this rank loaded as weight version 0."""
        return self._loaded

    def begin_update(self, version: int) -> None:
        """Begins to take the weights of a version; see `Engine.begin_update`."""
        self._loop.ask(partial(self._engine.begin_update, version))

    def take(self, *shards: list[Shard]) -> None:
        """Writes the parts of messages of shards that this rank holds into its weights."""
        self._loop.ask(partial(self._take, shards))

    def _take(self, messages: Iterable[Sequence[Shard]]) -> None:
        for shards in messages:
            self._engine.take(shards)

    def broadcast_weights(self) -> bool:
        """Receives all messages of the policy's ranks by broadcasts; returns whether all have come."""
        return self._loop.ask(partial(self.broadcasts.use, self._receive))

    def _receive(self, links: Sequence[Broadcast]) -> None:
        for link in links:
            self._take(link.receive())

    def end_update(self) -> None:
        """Goes on under the new weights, checked to be whole; see `Engine.end_update`."""
        self._loop.ask(self._engine.end_update)
        self.step = self._engine.weight_version

    def settle(self) -> Written:
        """Runs until new weights may come; returns what ended, also where `on_update` lets all end."""
        return self._said(self._loop.settle())

    def work(self, requests: list[RolloutRequest], passes: int) -> Written:
        """Adds requests and waits until a completion has ended, for at most so many passes; the engine goes on then.

        Returns:
            What has been written since the last call, on the first rank; nothing, at once, on the others.
        """
        self._loop.add(requests)
        return self._said(self._loop.written(passes if self._speaks else 0))

    def _said(self, written: Written) -> Written:
        return written if self._speaks else Written()

    def drop(self) -> None:
        """Drops all requests, and the prefix cache."""
        self._loop.drop()

    def release(self) -> None:
        """Frees the KV cache and the weights for other processes on the same device."""
        self._loop.ask(partial(self._engine.release, weights=True))
