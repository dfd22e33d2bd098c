"""Which sidecars there are, as their nodes say it."""

from __future__ import annotations

import pytest

from mesh.durable.finder import Finder
from mesh.sockets.control import Offer

P, Q = "0" * 15 + "1", "0" * 15 + "2"


@pytest.fixture
def finder() -> Finder:
    return Finder(0, "log", "*", {1: "one", 2: "two", 3: "three"}.__getitem__)


def attach(finder: Finder, peer: int, partition: str) -> None:
    finder.attach(peer, Offer(7, "log", partition), f"tcp://127.0.0.1:{peer}")


def ticks(finder: Finder, count: int) -> None:
    for _ in range(count):
        finder.tick()


def test_a_partition_that_stays_at_two_nodes_is_an_error_that_is_told_once(
    finder: Finder, caplog: pytest.LogCaptureFixture
) -> None:
    attach(finder, 1, P)
    attach(finder, 2, P)
    attach(finder, 3, Q)
    ticks(finder, 119)
    assert not caplog.records
    ticks(finder, 200)
    (told,) = caplog.records
    assert f"partition {P} is at 2 nodes (one, two)" in told.message


def test_a_partition_that_moved_is_no_copy(
    finder: Finder, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        attach(finder, 1, P)
        attach(finder, 2, P)
        ticks(finder, 90)  # until the first is known to be dead
        finder.detach(1, 7, "died")
        ticks(finder, 10)
        finder.detach(2, 7, "left")
    assert not caplog.records
