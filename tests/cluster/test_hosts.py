"""Hosts on this machine reach each other, have disks of their own, and can be lost."""

from tests.cluster.hosts import PYTHON, connected, needs_hosts

SERVER = """
import socket
server = socket.create_server(("{}", 7))
print("up", flush=True)
server.accept()[0].send(b"hello")
server.accept()"""
CLIENT = "import socket; print(socket.create_connection(('{}', 7), 5).recv(9))"


@needs_hosts
def test_hosts_have_addresses_and_disks_of_their_own_and_can_be_lost() -> None:
    with connected(2) as hosts:
        one, other = hosts[0], hosts[1]
        server = one.start(PYTHON, "-c", SERVER.format(one.address), log="server.log")
        (one.disk / "file").write_text("of one")
        assert one.run("cat", one.local / "file") == (0, "of one")
        assert other.run("cat", one.local / "file")[0] != 0
        while "up" not in (one.folder / "server.log").read_text():
            assert server.poll() is None
        assert other.run(PYTHON, "-c", CLIENT.format(one.address)) == (0, "b'hello'\n")
        one.lose()
        assert server.wait(5) == -9
        assert one.processes() == []
        assert "ConnectionRefusedError" in other.run(PYTHON, "-c", CLIENT.format(one.address))[1]
        assert hosts.dashboard == f"http://{one.address}:8265"
        assert len(hosts) == 2
