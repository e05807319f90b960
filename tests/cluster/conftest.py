"""What tests of runs share: a Ray cluster, so that not every run starts its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cli_process import Command, Train, overrides
from tests.cluster.heads import Head, free_port, started


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """A head that takes drivers and jobs."""
    with started(free_port()) as running:
        yield running


@pytest.fixture(scope="session")
def train(head: Head) -> Train:
    """`lockstep train` on the shared cluster."""

    def run(log: Path, recipe: Path, *settings: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
        head.check()
        command = Command(log, "train", str(recipe), *overrides(*settings), *options, RAY_ADDRESS=head.cluster)
        try:
            return command.wait(), command.output
        finally:
            command.kill()

    return run
