"""Where one producer appends, as sidecars come and go."""

from __future__ import annotations

from typing import Any

from mesh.durable.producing import Producing
from mesh.durable.records import NewRecord, batch_of
from tests.durable.test_appender import _Flusher, _Route


class _Streams:
    """Those of a node, as a test says that they are there: the first is the nearest."""

    bytes_max = 1 << 20

    def __init__(self) -> None:
        self.there: list[str] = []
        self.flusher = _Flusher()
        self.lock = _Route().link.lock

    def find(self, stream: str, home: str | None, timeout: float | None) -> str:
        return self.there[0]

    def is_there(self, partition: str) -> bool:
        return partition in self.there

    def route(self, partition: str) -> _Route:
        route = _Route()
        route.partition = partition
        return route

    def look_after(self, appender: object) -> None:
        pass


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
