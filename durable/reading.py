"""Records as they are read: from batches of a log, the short way.

Of many records only the payload is ever looked at, so the rest is put together when it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count, repeat
from typing import Any

import msgspec

from mesh.durable.batch import Header
from mesh.durable.records import Columns, columns_of, headers_of, payloads_of
from mesh.message import EMPTY
from mesh.sockets.home import node_text


class Source(msgspec.Struct, frozen=True, gc=False):
    """What the records of one batch have in common."""

    stream: str
    partition: str
    offset: int
    """Of the first of them."""
    time_ns: int
    log_epoch: int
    columns: Columns


class Origin(msgspec.Struct, frozen=True, gc=False):
    """Of a record that was recorded from a topic: which message it was."""

    sender: str
    """Node id of the publisher: 16 hexadecimal digits, new for each run of a node."""
    channel: str
    """The topic."""
    seq: int
    """The publisher's own counter of the topic's messages, from 1."""
    time_ns: int
    """The publisher's wall clock when it left, nanoseconds since 1970."""


class Record(msgspec.Struct, frozen=True, gc=False):
    """A record of a stream."""

    payload: Any
    """What was appended, through MessagePack: tuples arrive as lists, NumPy arrays as read-only
    arrays."""
    _index: int
    _source: Source

    @property
    def stream(self) -> str:
        """The name of the stream that it was read from."""
        return self._source.stream

    @property
    def partition(self) -> str:
        """Whose log it is in: 16 hexadecimal digits, which stay with the sidecar's directory."""
        return self._source.partition

    @property
    def offset(self) -> int:
        """Its position there: dense, from 0, and never that of another record, unless `log_epoch`
        says so."""
        return self._source.offset + self._index

    @property
    def time_ns(self) -> int:
        """The log's wall clock when it took the record, nanoseconds since 1970; never goes back."""
        return self._source.time_ns

    @property
    def log_epoch(self) -> int:
        """Under which log epoch it was written: never goes down in a partition. Where a stream's
        ``durability`` lets the failure of a machine take its last records, or its folder was moved
        away or brought back, another record may get the same offset; that has a higher one."""
        return self._source.log_epoch

    @property
    def key(self) -> bytes | None:
        """What it was appended with as `key`, text as UTF-8; None if it has none."""
        keys = self._source.columns.keys
        return None if keys is None else keys[self._index]

    @property
    def headers(self) -> Mapping[str, Any]:
        """What was appended beside the payload; empty if there was nothing."""
        headers = self._source.columns.headers
        return EMPTY if headers is None else headers_of(headers[self._index])

    @property
    def origin(self) -> Origin | None:
        """Which message of which topic it was (`Node.record`); None if it was appended."""
        of = self._source.columns.origin
        if of is None:
            return None
        return Origin(node_text(of.sender), of.channel, of.seq + self._index, of.time_ns)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(payload={self.payload!r}, stream={self.stream!r}, "
            f"partition={self.partition!r}, offset={self.offset}, key={self.key!r}, "
            f"time_ns={self.time_ns}, headers={dict(self.headers)!r})"
        )


class Run(msgspec.Struct, frozen=True, gc=False):
    """Records that follow each other in one batch, of which none is made yet."""

    payloads: list[Any]
    first: int
    """Index of the first of them in its batch."""
    source: Source

    def __iter__(self) -> Iterator[Record]:
        return map(Record, self.payloads, count(self.first), repeat(self.source))


def run_of(
    stream: str,
    partition: str,
    header: Header,
    body: bytes | memoryview,
    first: int = 0,
    end: int | None = None,
) -> Run | None:
    """The records of a batch whose offsets are from `first` to before `end`; None if there are
    none. Raises `Malformed`."""
    low = max(0, first - header.offset)
    high = header.count if end is None else min(header.count, end - header.offset)
    if low >= high:
        return None
    payloads = payloads_of(header, body)
    if low or high < len(payloads):
        payloads = payloads[low:high]
    source = Source(
        stream,
        partition,
        header.offset,
        header.time_ns,
        header.log_epoch,
        columns_of(header, body),
    )
    return Run(payloads, low, source)
