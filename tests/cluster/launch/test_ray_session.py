"""A cluster that does not answer is one sentence within seconds."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from lockstep.cluster.exit_codes import INTERRUPTED
from lockstep.cluster.jobs import client
from lockstep.cluster.launch import ray_session
from lockstep.cluster.launch.ray_session import ANSWER_S, NoCluster, NoToken, check_answers, ray_cluster, wants_token
from tests.cluster.cli_process import Command, overrides, summary
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
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        check_answers(f"127.0.0.1:{port}", ANSWER_S)
        check_answers(f"ray://127.0.0.1:{port}", ANSWER_S)
        server.stop(None).wait()


def test_runs_and_jobs_ask_before_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ANSWER_S == 10
    for module in (client, ray_session):
        monkeypatch.setattr(module, "ANSWER_S", 0.5)
    with silent() as listening:
        with pytest.raises(client.NoHead, match=f"no Ray head answers at http://{listening} .*timed out"):
            client.Jobs(f"http://{listening}")
        with pytest.raises(NoCluster), ray_cluster(f"127.0.0.1:{free_port()}"):
            raise AssertionError("connected to nothing")


@pytest.mark.exhaustive
def test_a_signal_to_the_whole_process_group_ends_the_run_after_it_has_saved(tmp_path: Path) -> None:
    settings = overrides(f"run={tmp_path}/run", "pretrain.steps=100000", "checkpoints.at=")
    command = Command(tmp_path / "log", "train", "parity-tiny", *settings)
    try:
        command.wait_for("2/100000")
        started = command.descendants()
        assert len({os.getpgid(process.pid) for process in started} - {os.getpgid(command.process.pid)}) >= 2
        os.killpg(command.process.pid, signal.SIGTERM)
        assert command.wait(100) == INTERRUPTED, command.output
    finally:
        command.kill()
    assert summary(tmp_path / "run")["status"] == "interrupted"
    assert str(summary(tmp_path / "run")["ended"]).endswith("which is saved"), command.output
    assert "died" not in command.output
    assert not [process for process in started if process.is_running()]


class WantsToken(grpc.GenericRpcHandler):
    """Refuses all calls as a head does that wants a token."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(refuse)


@pytest.mark.parametrize("handlers", [[], [WantsToken()]], ids=["open", "token"])
def test_a_head_that_wants_a_token_is_one_sentence(
    handlers: list[grpc.GenericRpcHandler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads, handlers)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        assert wants_token(address, ANSWER_S) == bool(handlers)
        if handlers:
            with pytest.raises(NoToken, match=f"{address} wants a token: set RAY_AUTH_MODE"), ray_cluster(address):
                raise AssertionError("connected without a token")
        server.stop(None).wait()
