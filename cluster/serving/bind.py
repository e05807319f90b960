"""Binds the server's socket before a model is loaded, and refuses addresses that are open to others without a key."""

import ipaddress
import socket


class NeedsKey(ValueError):
    """An address that other machines can reach, of a server without a key."""


def is_local(host: str) -> bool:
    """Whether a host is a loopback address, which only this machine can reach."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound(host: str, port: int, *, has_key: bool) -> socket.socket:
    """Bind a TCP socket; port 0 takes any free port.

    Raises:
        NeedsKey: when other machines could reach it and there is no key.
        OSError: when the port is taken or the host is not this machine's.
    """
    if not has_key and not is_local(host):
        raise NeedsKey(f"host={host} lets other machines in, and there is no key")
    found = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        if found is not None:
            found.close()
        raise OSError(f"{host}:{port} cannot be served: {error.strerror or error}") from error
    return found
