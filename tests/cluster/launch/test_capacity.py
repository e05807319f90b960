"""Nodes are listed in the order of their addresses, and those that others cannot reach are refused by name."""

import pytest

from lockstep.cluster.launch.capacity import Node, UnreachableNode, can_grow, check_addresses, counted


def node(address: str, host: str) -> Node:
    return Node(address, address, host, {"CPU": 1})


def test_addresses_count() -> None:
    assert sorted(["10.0.0.10", "10.0.0.9", "9.0.0.1"], key=counted) == ["9.0.0.1", "10.0.0.9", "10.0.0.10"]


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1"])
def test_a_node_that_others_cannot_reach_is_named(address: str) -> None:
    check_addresses([node(address, "a")])
    check_addresses([node("127.0.0.1", "a"), node("127.0.0.2", "a")])
    check_addresses([node("10.0.0.1", "a"), node("10.0.0.2", "b")])
    for others in ([node("10.0.0.1", "b")], [node("127.0.0.1", "b")]):
        with pytest.raises(UnreachableNode, match=rf"node a is known to Ray by {address}, .* --node-ip-address"):
            check_addresses([node(address, "a"), *others])


def test_a_cluster_that_was_started_for_a_run_does_not_grow() -> None:
    assert not can_grow([node("127.0.0.1", "a")])  # without asking anybody
