"""Hosts of rendered jobs."""

from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Hosts, connected


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts, for one test."""
    with connected(2) as two:
        yield two
