"""Waits until all nodes of a job have joined its Ray cluster; `python -m lockstep.cluster.render.joined_nodes`.

Rendered jobs call it on the head's node before the run begins, since a run plans for the nodes that are there.
"""

import os
import sys
import time
from contextlib import suppress

import ray

from lockstep.cluster.launch.ray_session import NoCluster, check_answers, ray_cluster

LIMIT_S = 600.0
"""How long the first node and the last may take: images are pulled meanwhile."""


def wait_for_nodes(address: str, count: int, limit: float = LIMIT_S) -> None:
    """Return when so many nodes are alive.

    Args:
        address: of the head, as host:port.
        limit: seconds.

    Raises:
        NoCluster: when fewer have joined by then; says how many.
    """
    there, end = 0, time.monotonic() + limit
    check_answers(address, limit)
    while time.monotonic() < end:
        # The head answers before its own node is up, and until then nobody can join.
        with suppress(ConnectionError), ray_cluster(address):
            while (there := sum(node["Alive"] for node in ray.nodes())) < count and time.monotonic() < end:
                time.sleep(0.5)
            if there >= count:
                return
    raise NoCluster(
        f"{there} of {count} nodes have joined Ray at {address} within {limit:g} s: see in this log why the others did "
        "not, or ask for fewer"
    )


if __name__ == "__main__":
    try:
        wait_for_nodes(sys.argv[1], int(sys.argv[2]))
    except NoCluster as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
