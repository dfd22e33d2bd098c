"""What several files of tests get: a network in memory, or two nodes that know each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mesh import Node
from tests.support.network import Network, check_invariants


@pytest.fixture
def network() -> Iterator[Network]:
    """In memory; with a look at every node at the end."""
    network = Network()
    yield network
    for node in network.nodes.values():
        check_invariants(node.membership)


@pytest.fixture
def pair() -> Iterator[tuple[Node, Node]]:
    with Node("a") as a, Node("b") as b:
        a.wait_for_peers(1, timeout=5)
        b.wait_for_peers(1, timeout=5)
        yield a, b
