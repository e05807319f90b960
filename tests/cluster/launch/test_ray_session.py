"""A cluster that does not answer is one sentence within seconds."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
from rich.console import Console

from lockstep.cluster.launch import ray_session
from lockstep.cluster.launch.ray_session import ANSWER_S, NoCluster, check_answers, ray_cluster
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.run import submit
from tests.cluster.heads import free_port


@contextmanager
def silent() -> Iterator[str]:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "address",
    ["{closed}", "ray://{closed}", "{silent}", "no.such.host.invalid:6379", "http://{silent}", "{silent}/x", "head"],
)
def test_a_wrong_address_is_one_sentence_in_time(address: str) -> None:
    with silent() as listening:
        address = address.format(closed=f"127.0.0.1:{free_port()}", silent=listening)
        began = time.monotonic()
        with pytest.raises(NoCluster, match=r"no Ray cluster answered at address=.* within 0\.5 s: give host:port"):
            check_answers(address, 0.5)
        assert time.monotonic() - began < 5


def test_a_server_that_speaks_grpc_answers() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        check_answers(f"127.0.0.1:{port}", ANSWER_S)
        check_answers(f"ray://127.0.0.1:{port}", ANSWER_S)
        server.stop(None).wait()


def test_runs_and_jobs_ask_before_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ANSWER_S == 10
    for module in (submit, ray_session):
        monkeypatch.setattr(module, "ANSWER_S", 0.5)
    with silent() as listening:
        with pytest.raises(submit.NoHead, match=f"no Ray head answers at http://{listening} .*timed out"):
            submit.submit_recipe(Recipe(), f"http://{listening}", Console())
        with pytest.raises(NoCluster), ray_cluster(f"127.0.0.1:{free_port()}"):
            raise AssertionError("connected to nothing")
