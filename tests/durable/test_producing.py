"""Where one producer appends, as sidecars come and go, and what becomes of that without it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from mesh.durable.outcomes import Appended, Opened
from mesh.durable.producing import Producing
from mesh.durable.records import NewRecord, batch_of
from mesh.durable.under_way import UnderWay
from tests.durable.test_appender import _Flusher, _Route


class _Streams:
    """Those of a node, as a test says that they are there: the first is the nearest."""

    bytes_max = 1 << 20

    def __init__(self) -> None:
        self.there: list[str] = []
        self.flusher = _Flusher()
        self.way = _Route()
        self.lock = self.way.link.lock
        self.under_way = UnderWay()

    def find(self, stream: str, home: str | None, timeout: float | None) -> str:
        return self.there[0]

    def is_there(self, partition: str) -> bool:
        return partition in self.there

    def route(self, partition: str) -> _Route:
        self.way = _Route()
        self.way.partition = partition
        return self.way


def test_a_producer_that_comes_back_to_a_partition_goes_on_as_it_was_there() -> None:
    """Another run of it would fence what a thread has begun to append there meanwhile."""
    streams: Any = _Streams()
    producing = Producing(streams, "orders")
    streams.there = ["a"]
    first = producing.bind(1)
    streams.there = ["b"]
    assert producing.bind(1) is not first
    first.submit(batch_of([NewRecord(b"\xc0")]))  # by a thread that had asked before
    assert first in producing.appenders
    streams.there = ["a"]
    assert producing.bind(1) is first


def test_an_append_whose_producer_is_forgotten_is_finished_and_then_forgotten() -> None:
    streams: Any = _Streams()
    streams.there = ["a"]
    producing = Producing(streams, "orders")
    appender = weakref.ref(producing.bind(1))
    under_way, route = streams.under_way, streams.way
    route.opens = False
    producing.submit(batch_of([NewRecord(b"\xc0")]), 1)
    del producing
    gc.collect()
    under_way.tick()
    assert not under_way.go_on()
    route.opening[0].reply = Opened(1, 0, "fsync")
    under_way.tick()
    assert len(route.asked) == 1
    assert not under_way.go_on()
    route.asked[0].reply = Appended(0, 1, 0)
    assert under_way.go_on()
    under_way.tick()
    gc.collect()
    assert appender() is None


def test_what_a_producer_that_is_there_begins_later_is_finished_too() -> None:
    streams: Any = _Streams()
    streams.there = ["a"]
    producing = Producing(streams, "orders")
    producing.bind(1)
    for _ in range(3):
        streams.under_way.tick()
    producing.submit(batch_of([NewRecord(b"\xc0")]), 1)
    assert not streams.under_way.go_on()
