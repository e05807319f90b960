"""A log is followed to the job's end through connections that close, and each of its lines is printed once."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import requests

from lockstep.cluster.exit_codes import SUCCESS
from lockstep.cluster.jobs import following, submission
from lockstep.cluster.jobs.client import Jobs, NoHead, NoJob, name_of, with_scheme
from lockstep.cluster.jobs.following import exit_code, follow
from lockstep.cluster.jobs.spec import JobSpec
from lockstep.cluster.jobs.submission import send
from lockstep.cluster.recipe.load import parse
from tests.cluster.heads import Head


class Wire:
    """A port that leads to a head until it is cut."""

    def __init__(self, port: int) -> None:
        self._port, self._open = port, list[socket.socket]()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.leads, self.connections = True, 0
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self) -> None:
        """Close all connections, and take no more until `leads` is true again."""
        self.leads = False
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open.clear()

    def close(self) -> None:
        self.cut()
        self._server.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near = self._server.accept()[0]
                if not self.leads:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._port))
                self.connections += 1
                self._open += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def wire(head: Head) -> Iterator[Wire]:
    """A way to the shared head that can be cut."""
    head.check()
    wire = Wire(int(head.address.rpartition(":")[2]))
    yield wire
    wire.close()


def test_a_connection_that_closes_is_made_again(wire: Wire) -> None:
    jobs = Jobs(wire.address)
    script = "for i in 1 2 3 4 5 6 7 8; do echo line-$i; sleep 1; done"
    job = jobs.client.submit_job(entrypoint=script)
    written: list[str] = []
    before = 0

    def write(text: str) -> None:
        nonlocal before
        written.append(text)
        if "line-2" in text:
            before = wire.connections
            wire.cut()
            threading.Timer(2.0, lambda: setattr(wire, "leads", True)).start()

    ended = follow(jobs, job, write)
    assert exit_code(ended) == SUCCESS
    assert wire.connections > before > 0
    lines = [line for line in "".join(written).splitlines() if line.startswith("line-")]
    assert lines == [f"line-{number}" for number in range(1, 9)]


def test_a_head_that_stays_away_is_one_sentence(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "PATIENCE_S", 2.0)
    jobs = Jobs(wire.address)
    job = jobs.client.submit_job(entrypoint="echo begun; sleep 60")
    began = time.monotonic()
    with pytest.raises(NoHead, match=rf"has not answered for \d+ s .* `lockstep attach {job} --address http://127"):
        follow(jobs, job, lambda text: wire.cut() if "begun" in text else None)
    assert time.monotonic() - began < 60
    wire.leads = True
    jobs.client.stop_job(job)
    with pytest.raises(NoJob, match=r"there is no job nobody at http://127\.0\.0\.1:\d+: the newest there are"):
        jobs.find("nobody")


def test_a_job_is_sent_once_through_a_connection_that_closes(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, ask = Jobs(wire.address), requests.Session.request
    lost: list[str] = []

    def lose_the_answer(session: requests.Session, method: str, url: str, **given: Any) -> requests.Response:
        reply = ask(session, method, url, **given)
        if method == "POST" and not lost:
            lost.append(url)
            wire.cut()
            wire.leads = True
            raise requests.exceptions.ConnectionError("Connection aborted.")
        return reply

    monkeypatch.setattr(requests.Session, "request", lose_the_answer)
    spec = JobSpec(parse({"pretrain": {"steps": 1}, "layout": {"data": 3}, "run": "/nowhere/run"}), "sent-once")
    id = send(jobs, spec, print)
    assert len(lost) == 1
    assert [job.submission_id for job in jobs.all() if name_of(job) == "sent-once"] == [id]
    jobs.client.stop_job(id)


def test_a_head_whose_agent_is_not_there_yet_takes_the_job_later(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, ask = Jobs(wire.address), requests.Session.request
    too_early = requests.Response()
    too_early.status_code = 500
    too_early._content = b"No available agent to submit job, please try again later."
    replies = [too_early]

    def answer_later(session: requests.Session, method: str, url: str, **given: Any) -> requests.Response:
        return replies.pop() if method == "POST" and replies else ask(session, method, url, **given)

    monkeypatch.setattr(requests.Session, "request", answer_later)
    spec = JobSpec(parse({"pretrain": {"steps": 1}, "layout": {"data": 3}, "run": "/nowhere/run"}), "sent-early")
    id = send(jobs, spec, print)
    assert not replies
    assert [job.submission_id for job in jobs.all() if name_of(job) == "sent-early"] == [id]
    jobs.client.stop_job(id)
    monkeypatch.setattr(submission, "PATIENCE_S", -1.0)
    replies.append(too_early)
    with pytest.raises(NoHead, match=r"took no job \(.*No available agent"):
        send(jobs, spec, print)


def test_a_head_that_takes_no_job_is_one_sentence(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "PATIENCE_S", 1.0)
    jobs = Jobs(wire.address)
    wire.cut()
    with pytest.raises(NoHead, match="closed the connection while it took the job"):
        send(jobs, JobSpec(parse({"pretrain": {"steps": 1}}), "never-sent"), print)


def test_addresses() -> None:
    assert with_scheme("localhost:8265") == with_scheme("http://localhost:8265/") == "http://localhost:8265"
    assert with_scheme("https://head") == "https://head"
    with pytest.raises(NoHead, match="address=ray://head:10001 is for drivers"):
        with_scheme("ray://head:10001")
