"""gloo and NCCL talk through the interface of the address that others know, and stores listen at that address alone."""

import os
import subprocess
import sys

import psutil
import pytest

from lockstep.distributed.world.meeting import host_meeting, meeting_at
from lockstep.distributed.world.network import LOOPBACK, interface_of, is_loopback, listening, use_interface_of

NOBODYS = "203.0.113.7"
WORLD = """
import psutil
from lockstep.distributed.world.groups import join
from lockstep.distributed.world.meeting import host_meeting, meeting_at
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.network import use_interface_of
use_interface_of("127.0.0.1")
store = host_meeting("127.0.0.1")
join(Layout(), rank=0, meeting=meeting_at("127.0.0.1", store.port))
print({each.laddr.ip for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN})
"""


def test_the_interface_of_an_address_is_chosen_unless_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    use_interface_of(NOBODYS)
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    loopback = interface_of(LOOPBACK)
    use_interface_of(LOOPBACK)
    assert loopback
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == (loopback, "ib0")


@pytest.mark.parametrize(
    ("address", "inside"),
    [
        ("127.0.0.1", True),
        ("127.0.1.1", True),
        ("::1", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("node7", False),
    ],
)
def test_addresses_that_only_this_host_reaches_are_known(address: str, inside: bool) -> None:
    assert is_loopback(address) == inside


def test_a_store_listens_at_its_address_alone() -> None:
    store = host_meeting(LOOPBACK)
    meeting_at(LOOPBACK, store.port).set("key", "value")
    assert store.get("key") == b"value"
    at = [each.laddr for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN]
    assert (LOOPBACK, store.port) in at


def test_behind_a_translation_of_addresses_it_listens_at_all_of_them() -> None:
    with listening(NOBODYS) as socket:
        assert socket.getsockname()[0] == "0.0.0.0"


def test_a_world_of_one_host_listens_on_the_loopback_interface_alone() -> None:
    free = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    said = subprocess.run([sys.executable, "-c", WORLD], capture_output=True, text=True, timeout=200, env=free)
    assert said.stdout == "{'127.0.0.1'}\n", said.stderr
