"""Hosts of a cluster on this machine: network namespaces with links between them, each with a disk of its own.

Processes of different hosts reach each other by their addresses alone, and nothing listens outside of the namespaces.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.cluster.cli_process import until

GRANTED = shutil.which("ip") is not None and os.geteuid() == 0
needs_hosts = pytest.mark.skipif(not GRANTED, reason="network namespaces need root and iproute2")
PYTHON = Path(sys.executable)


@dataclass
class Host:
    """A network namespace with one address, and a folder that only its own processes see."""

    name: str
    address: str
    local: Path
    """Where its own disk is mounted: the same path on each host, with other content."""
    disk: Path
    """The content of `local`, as the test sees it."""
    folder: Path
    """Logs of its processes."""

    @property
    def words(self) -> list[str]:
        """The words before a command that run it on this host."""
        mounted = 'mount --bind "$0" "$1" && shift && exec "$@"'
        inside = ["unshare", "--mount", "sh", "-c", mounted, str(self.disk), str(self.local)]
        return ["ip", "netns", "exec", self.name, *inside]

    def start(self, *command: str | Path, log: str, **environment: str) -> "subprocess.Popen[bytes]":
        """Starts a process on this host, in a session of its own; what it prints goes to `folder / log`."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        with (self.folder / log).open("ab") as file:
            process = subprocess.Popen(
                [*self.words, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=inherited | {"RAY_AUTH_MODE": "disabled"} | environment,
                cwd=self.folder,
                start_new_session=True,
            )
        return process

    def run(self, *command: str | Path, timeout: float = 60, **environment: str) -> tuple[int, str]:
        """Exit code and output of a command on this host."""
        log = f"{uuid.uuid4().hex}.log"
        code = self.start(*command, log=log, **environment).wait(timeout)
        return code, (self.folder / log).read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on this host, found by its network namespace."""
        found, mine = [], os.stat(f"/run/netns/{self.name}").st_ino
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.stat(f"/proc/{process.pid}/ns/net").st_ino == mine:
                    found.append(process)
        return found

    def lose(self) -> None:
        """Ends all of its processes at once, as a loss of power does."""
        while found := self.processes():
            for process in found:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.05)


@dataclass
class Hosts:
    """A network of hosts, the first of which is where a cluster's head runs."""

    hosts: list[Host]

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number]

    def __len__(self) -> int:
        return len(self.hosts)

    @property
    def cluster(self) -> str:
        """Where drivers connect."""
        return f"{self[0].address}:6379"

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://{self[0].address}:8265"

    def start_ray(self, number: int, cpus: float, *options: str) -> None:
        """Starts Ray on a host: the head on the first, elsewhere a node that joins it; returns when it is up."""
        host = self[number]
        role = ["--head", "--port=6379", "--dashboard-host=0.0.0.0", "--include-dashboard=true"]
        command = [PYTHON.with_name("ray"), "start", "--block", "--disable-usage-stats", f"--num-cpus={cpus:g}"]
        command += [f"--node-ip-address={host.address}", *([f"--address={self.cluster}"] if number else role), *options]
        temporary = [] if number else [f"--temp-dir={host.folder / 'ray'}"]
        (host.folder / "ray.log").unlink(missing_ok=True)  # of a node that was lost
        process = host.start(*command, *temporary, log="ray.log")

        def up() -> bool:
            assert process.poll() is None, (host.folder / "ray.log").read_text()
            return "Ray runtime started" in (host.folder / "ray.log").read_text()

        until(up, 120)


@contextmanager
def connected(count: int) -> Iterator[Hosts]:
    """So many hosts with links between them; all their processes end with the block."""
    mark = uuid.uuid4().hex[:5]
    root = Path(tempfile.mkdtemp(prefix="ls", dir="/tmp"))  # sockets below it have names of 107 bytes at most
    (root / "local").mkdir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        switch = _namespace(f"ls{mark}s", stack)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        hosts = []
        for number in range(count):
            name, folder = _namespace(f"ls{mark}h{number}", stack), root / str(number)
            (folder / "disk").mkdir(parents=True)
            port, address = f"port{number}", f"10.99.0.{number + 1}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", switch, "link", "set", port, "master", "switch", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            hosts.append(Host(name, address, root / "local", folder / "disk", folder))
            stack.callback(hosts[-1].lose)
        yield Hosts(hosts)


def _namespace(name: str, stack: ExitStack) -> str:
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "delete", name)
    _ip("-n", name, "link", "set", "lo", "up")
    return name


def _ip(*arguments: Sequence[str] | str) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True)
