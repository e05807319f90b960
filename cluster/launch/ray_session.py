"""Connects to a Ray cluster or starts one, and ends what it started."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import grpc
import psutil
import ray

SHUTDOWN_S = 5.0
"""How long processes may take to end by themselves when a run ends."""
ANSWER_S = 10.0
"""How long a cluster's head may take to answer; Ray itself would ask for minutes."""


class NoCluster(ValueError):
    """No Ray cluster answers at the address."""


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or start one here and stop it at the end.

    Raises:
        NoCluster: when none answers at the address.
    """
    joined = address or os.environ.get("RAY_ADDRESS")
    if joined:
        check_answers(joined, ANSWER_S)
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


def _connect(address: str | None) -> None:
    """`ray.init`; once more where a busy machine does not start a cluster within the 30 s that Ray grants it."""
    for attempt in (1, 2):
        try:
            ray.init(
                address=address,
                include_dashboard=False if address is None else None,
                log_to_driver=True,
                logging_level=logging.ERROR,
                configure_logging=True,
            )
            return
        except Exception as error:
            if attempt == 2 or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


def _end(processes: Sequence[psutil.Process]) -> None:
    """Wait for processes, then kill those that stay: actors may outlive the daemons that started them."""
    _, alive = psutil.wait_procs(processes, timeout=SHUTDOWN_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=SHUTDOWN_S)
