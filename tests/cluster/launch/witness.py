"""A worker that says where it is, and loads next to nothing."""

import os

import ray


class Witness:
    """One process of a role."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def seen(self) -> tuple[str, str, str]:
        """ID of its node, the devices that it sees, and its threads."""
        devices, threads = (os.environ.get(name, "") for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"))
        return ray.get_runtime_context().get_node_id(), devices, threads
