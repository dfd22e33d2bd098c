"""Which sidecars there are, as their nodes say it, and which of them is taken."""

from __future__ import annotations

from typing import Literal

import pytest

from mesh import limits
from mesh.durable.finder import FoundSidecars, HostFinder, LogFinder
from mesh.durable.streams import Streams
from mesh.sockets.control import Offer
from mesh.sockets.home import Core
from tests.support.homes import Homes

Host = Literal["own", "another"]

P, Q, R = ("0" * 15 + digit for digit in "123")
NAMES = {0: "own", 1: "one", 2: "two", 3: "three"}


@pytest.fixture
def finder() -> LogFinder:
    return LogFinder(0, NAMES.__getitem__)


def attach(
    finder: LogFinder | HostFinder,
    peer: int,
    partition: str,
    *,
    host: Host = "another",
    stream: str = "orders",
    key: int = 7,
) -> None:
    offer = Offer(key, "log", partition)
    if isinstance(finder, HostFinder):
        offer = Offer(key, "host", stream, partition=partition)
    at = f"ipc:///tmp/{peer}" if host == "own" else f"tcp://127.0.0.1:{peer}"
    finder.attach(peer, offer, at)


def ticks(finder: LogFinder, count: int) -> None:
    for _ in range(count):
        finder.tick()


def test_a_partition_that_stays_at_two_nodes_is_an_error_that_is_told_once(
    finder: LogFinder, caplog: pytest.LogCaptureFixture
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
    finder: LogFinder, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        attach(finder, 1, P)
        attach(finder, 2, P)
        ticks(finder, 90)  # until the first is known to be dead
        finder.detach(1, 7, "died")
        ticks(finder, 10)
        finder.detach(2, 7, "left")
    assert not caplog.records


# -- The nearest


@pytest.mark.parametrize("seeks", ["log", "host"])
def test_the_nearest_is_the_first_whatever_its_name(seeks: Literal["log", "host"]) -> None:
    logs, hosts = LogFinder(0, NAMES.__getitem__), HostFinder(0, NAMES.__getitem__)
    finder = logs if seeks == "log" else hosts

    def found() -> FoundSidecars:
        return logs.found if seeks == "log" else hosts.of("orders")

    attach(finder, 1, P)
    attach(finder, 2, Q, host="own")
    assert found().nearest() == [Q, P]
    attach(finder, 0, R, host="own")
    assert found().nearest() == [R, Q, P]
    assert [found().distance(partition) for partition in (R, Q, P)] == [0, 1, 2]
    finder.detach(2, 7, "left")
    assert found().nearest() == [R, P]
    assert list(found().met) == [P, Q, R]


def test_a_partition_at_two_nodes_is_as_near_as_the_nearer_one(finder: LogFinder) -> None:
    attach(finder, 1, Q)
    attach(finder, 2, P)
    attach(finder, 3, Q, host="own")
    assert finder.found.nearest() == [Q, P]
    assert finder.found.distance(Q) == 1


# -- Streams


def test_each_stream_has_its_own_sidecars() -> None:
    hosts = HostFinder(0, NAMES.__getitem__)
    attach(hosts, 1, P, stream="orders", key=1)
    attach(hosts, 1, P, stream="bills", key=2)
    attach(hosts, 2, Q, stream="bills", key=1)
    assert [hosts.of(stream).nearest() for stream in ("orders", "bills", "none")] == [
        [P],
        [P, Q],
        [],
    ]
    hosts.detach(1, 2, "left")
    hosts.detach(1, 3, "left")  # of which it has heard nothing
    assert [hosts.of(stream).nearest() for stream in ("orders", "bills")] == [[P], [Q]]


def test_of_streams_that_nobody_has_any_more_the_latest_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "STREAMS_GONE_MAX", 2)
    hosts = HostFinder(0, NAMES.__getitem__)
    names = ["a", "b", "c", "d"]
    for key, name in enumerate(names):
        attach(hosts, 1, P, stream=name, key=key)
    for key in range(3):
        hosts.detach(1, key, "left")
    attach(hosts, 1, P, stream="b", key=1)  # it is back
    assert [list(hosts.of(name).met) for name in names] == [[], [P], [P], [P]]
    assert len(hosts._streams) == 3
    hosts.detach(1, 3, "left")
    hosts.detach(1, 1, "left")
    assert [list(hosts.of(name).met) for name in names] == [[], [P], [], [P]]


class Choosing:
    """The streams of a node without a log, and which sidecars there are."""

    def __init__(self, homes: Homes) -> None:
        cores: list[Core] = []
        self.streams = Streams(
            homes.make(9), cores.append, lambda core: lambda: None, None, NAMES.__getitem__
        )
        logs, hosts, _ = cores
        assert isinstance(logs, LogFinder)
        assert isinstance(hosts, HostFinder)
        self.logs, self.hosts = logs, hosts

    def chosen(self) -> str:
        """Where an append goes that may go anywhere."""
        return self.streams.find("orders", None, 0)


@pytest.fixture
def choosing(homes: Homes) -> Choosing:
    return Choosing(homes)


def test_an_append_goes_to_its_own_host_though_another_has_the_stream(choosing: Choosing) -> None:
    attach(choosing.logs, 1, P)
    attach(choosing.hosts, 1, P)
    assert choosing.chosen() == P
    attach(choosing.logs, 2, Q, host="own")
    assert choosing.chosen() == Q


@pytest.mark.parametrize("host", ["own", "another"])
def test_of_those_that_are_as_near_an_append_goes_to_one_that_has_the_stream(
    choosing: Choosing, host: Host
) -> None:
    attach(choosing.logs, 1, P, host=host)
    attach(choosing.logs, 2, Q, host=host)
    assert choosing.chosen() == P
    attach(choosing.hosts, 2, Q, host=host)
    assert choosing.chosen() == Q
