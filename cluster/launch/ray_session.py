"""Connects to a Ray cluster or starts one, and ends what it started.

Processes of a Ray that is started here are in sessions of their own. So a scheduler, or `timeout`, that signals the
whole process group of a run reaches the run alone, which saves with a Ray that still works, and ends it then.
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from unittest.mock import patch

import grpc
import psutil
import ray
from ray._private import ray_constants
from ray.exceptions import AuthenticationError

from lockstep.cluster.exit_codes import Unreachable

SHUTDOWN_S = 5.0
"""How long processes may take to end by themselves when a run ends."""
LOOK_S = 0.05
"""How often is looked whether they have: psutil's own waiting takes them one after the other."""
ANSWER_S = 10.0
"""How long a cluster's head may take to answer; Ray itself would ask for minutes."""


class NoCluster(Unreachable):
    """No Ray cluster answers at the address."""


class NoToken(ValueError):
    """A Ray cluster that wants a token, which was not given or is not its own."""

    def __init__(self, address: str) -> None:
        super().__init__(
            f"the Ray cluster at {address} wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the head's own"
        )


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or start one here and stop it at the end.

    Raises:
        NoCluster: when none answers at the address.
        NoToken: when it wants a token that is not given.
    """
    joined = address or os.environ.get("RAY_ADDRESS")
    if joined:
        check_answers(joined, ANSWER_S)
        if os.environ.get("RAY_AUTH_MODE") != "token" and wants_token(joined, ANSWER_S):
            raise NoToken(joined)  # Ray itself would try for a while, and not say why
    try:
        _connect(joined)
        yield
    finally:
        started = [] if joined else psutil.Process().children(recursive=True)
        ray.shutdown()
        _end(started)


def check_answers(address: str, seconds: float) -> None:
    """Whether a Ray cluster answers at `host:port` or `ray://host:port`; `auto` and `local` are left to Ray.

    Raises:
        NoCluster: when nothing that speaks gRPC does within so many seconds.
    """
    if address in ("auto", "local") or os.environ.get("RAY_USE_TLS") == "1":
        return
    with grpc.insecure_channel(address.removeprefix("ray://"), [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=seconds)
        except grpc.FutureTimeoutError as error:
            raise NoCluster(
                f"no Ray cluster answered at address={address} within {seconds:g} s: give host:port of a head that "
                "runs, whose port is 6379 unless `ray start --head --port` said otherwise, or leave it out to start one"
            ) from error


def wants_token(address: str, seconds: float) -> bool:
    """Whether a head that answers at an address refuses calls without a token, as far as it says so in time."""
    if address in ("auto", "local") or os.environ.get("RAY_USE_TLS") == "1":
        return False
    with grpc.insecure_channel(address.removeprefix("ray://"), [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=seconds)
        except grpc.RpcError as error:
            refused: bool = error.code() == grpc.StatusCode.UNAUTHENTICATED
            return refused
    return False


class _Sessions:
    """Children that are forked inside of `own` lead a session; Ray starts its processes with a hook that forks so."""

    def __init__(self) -> None:
        self._own = self._registered = False

    @contextmanager
    def own(self) -> Iterator[None]:
        """A block whose forked children have sessions of their own."""
        if not self._registered:
            os.register_at_fork(after_in_child=self._begin)
            self._registered = True
        self._own = True
        try:
            yield
        finally:
            self._own = False

    def _begin(self) -> None:
        if self._own:
            os.setsid()


_SESSIONS = _Sessions()


def _connect(address: str | None) -> None:
    """`ray.init`; once more where a busy machine does not start a cluster within the 30 s that Ray grants it.

    Raises:
        NoCluster: when it does not let this process in.
        NoToken: when it wants another token.
    """
    for attempt in (1, 2):
        try:
            # A cluster of this machine alone is no business of others: without the patch it listens at all addresses.
            with _SESSIONS.own(), patch.object(ray_constants, "ENABLE_RAY_CLUSTER", bool(address)):
                ray.init(
                    address=address or "local",  # nothing would mean one that somebody else started here
                    include_dashboard=False if address is None else None,
                    log_to_driver=True,
                    logging_level=logging.ERROR,
                    configure_logging=True,
                )
            return
        except (AuthenticationError, ConnectionError) as error:
            if address and (isinstance(error, AuthenticationError) or wants_token(address, ANSWER_S)):
                raise NoToken(address) from error
            raise NoCluster(f"{error}: correct the address, or start a cluster there") from error
        except Exception as error:
            if attempt == 2 or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


def _end(processes: Sequence[psutil.Process]) -> None:
    """Wait for processes, then kill those that stay: actors may outlive the daemons that started them."""
    alive = _left(processes, SHUTDOWN_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _left(alive, SHUTDOWN_S)


def _left(processes: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those of the processes that have not ended after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    return left


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
