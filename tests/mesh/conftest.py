"""What tests of membership get: a network in memory, and a look at every node at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.network import Network, check_invariants


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    yield network
    for node in network.nodes.values():
        check_invariants(node.membership)
