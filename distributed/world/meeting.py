"""Rendezvous stores at which the ranks of a world, or the ends of a broadcast, meet."""

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lockstep.distributed.world.network import listening


def host_meeting(address: str) -> TCPStore:
    """Host the rendezvous store of a world on a free port of an address, as long as the returned object lives.

    By itself it would listen at all addresses of the host.
    """
    at = listening(address)
    port = at.getsockname()[1]
    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=at.detach())


def meeting_at(address: str, port: int) -> TCPStore:
    """Connect to the rendezvous store that another process hosts."""
    return TCPStore(address, port, is_master=False)
