"""Network addresses and interfaces of this host, as torch.distributed uses them.

Left alone, gloo listens at the address that the host's own name has, which may be one that nobody else reaches: Debian
gives it 127.0.1.1. NCCL takes the first interface that it finds. Both follow the address that a cluster knows us by.
"""

import ipaddress
import os
import socket

import psutil

LOOPBACK = "127.0.0.1"


def use_interface_of(address: str) -> None:
    """Let gloo and NCCL talk through the interface that has an address, unless the environment names others.

    An address that no interface has, as behind a translation of addresses, changes nothing.
    """
    name = interface_of(address)
    if name is None:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without the sign, all whose names begin so


def interface_of(address: str) -> str | None:
    """Name of this host's interface that has an address; None where none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return None


def is_loopback(address: str) -> bool:
    """Whether only this host reaches an address: 127.0.0.0/8, as Debian gives 127.0.1.1 to a host's name, or ::1."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def listening(address: str) -> socket.socket:
    """A socket that listens at a free port of an address of this host; at all addresses where no interface has it."""
    at = address if interface_of(address) else ""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((at, 0), family=family, backlog=4096)
