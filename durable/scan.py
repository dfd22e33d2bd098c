"""Reading a segment from its bytes: what stands there, where it ends, and why.

Guarantee: nothing is yielded that is not byte for byte what was appended there, and what ends the
reading is told apart: the end of the file or of its used part, a torn tail (which only an append
that nobody was told about can leave), or damage (something that had been on disk does not read any
more); but see `torn` for what payloads may say. Knows no files: it is given a function that reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final
from zlib import crc32

import msgspec

from mesh.durable.batch import HEADER_BYTES, MAGIC, Header, decode

Read = Callable[[int, int], bytes]
"""``read(at, length)``: fewer bytes only at the end."""

_CHUNK_BYTES: Final = 1 << 20


class Found(msgspec.Struct, frozen=True, gc=False):
    """A batch, and where it stands."""

    header: Header
    position: int
    body: memoryview


class Damage(msgspec.Struct, frozen=True):
    """What had been on disk, and does not read any more."""

    position: int
    offset: int
    """Of the first record that is missing."""
    reason: str


class Walk:
    """Batch after batch from one that begins at `position`, until what stands there is none.

    Where it stands then, is in its attributes.
    """

    def __init__(
        self, read: Read, end: int, *, position: int, offset: int, time_ns: int = 0, partition: int
    ) -> None:
        """`end` of what is to be read. `offset`: of the record that begins there; `time_ns`: of the
        batch before."""
        self.position = position
        self.offset = offset
        self.time_ns = time_ns
        self.fault = ""
        """Why it went no further; empty at the end."""
        self._read = read
        self._end = end
        self._partition = partition
        self._chunk = b""
        self._chunk_at = position

    def __iter__(self) -> Iterator[Found]:
        while self.position < self._end:
            found = self._next()
            if found is None:
                return
            header = found.header
            self.position += header.size
            self.offset = header.end
            self.time_ns = header.time_ns
            yield found

    def _next(self) -> Found | None:
        at = self.position
        header = decode(self._bytes(at, HEADER_BYTES), partition=self._partition)
        if header is None:
            self.fault = "there is no batch"
        elif at + header.size > self._end:
            self.fault = f"the batch has {header.size:,} bytes, of which some are missing"
        elif header.offset != self.offset:
            self.fault = f"the batch that is there begins with offset {header.offset:,}"
        elif header.time_ns < self.time_ns:
            self.fault = "time goes back"
        else:
            body = self._bytes(at + HEADER_BYTES, header.body_bytes)
            if len(body) == header.body_bytes and crc32(body) == header.body_check:
                return Found(header, at, body)
            self.fault = "the batch's body is not what was appended"
        return None

    def _bytes(self, at: int, length: int) -> memoryview:
        """Of the file, from a chunk that is read at a time."""
        begin = at - self._chunk_at
        if begin < 0 or begin + length > len(self._chunk):
            wanted = max(length, min(_CHUNK_BYTES, self._end - at))
            self._chunk, self._chunk_at, begin = self._read(at, wanted), at, 0
        return memoryview(self._chunk)[begin : begin + length]


def torn(walk: Walk, read: Read, size: int, partition: int) -> Damage | None:
    """What ended `walk` before the end of the file: None if it is a torn tail, which may be cut.

    Of an append that was under way anything may be on disk, in whatever order its parts got there:
    so also whole batches behind a hole. But a batch that was written after that place had been
    synced says so, and then no crash explains the hole. Only one whose offset may come behind it:
    a payload may hold what was read from this very log before. One that holds a batch of another
    stream of this partition, with a higher offset, or one that was made up, is taken for evidence
    all the same: then a torn tail is called damage, and for people to decide, rather than damage a
    torn tail.
    """
    for header in _headers(read, walk.position + 1, size, partition):
        if header.synced > walk.position and header.offset >= walk.offset:
            return Damage(walk.position, walk.offset, walk.fault)
    return None


def end_of_use(read: Read, position: int, size: int) -> int:
    """Where a file of that `size` is not in use any more behind `position`: zeros at its end are
    room that was reserved."""
    while size > position:
        begin = max(position, size - _CHUNK_BYTES)
        if used := read(begin, size - begin).rstrip(b"\0"):
            return begin + len(used)
        size = begin
    return position


def _headers(read: Read, position: int, size: int, partition: int) -> Iterator[Header]:
    """All that look like one, from there on. What is behind them need not be whole."""
    while position < size:
        chunk = read(position, _CHUNK_BYTES + HEADER_BYTES - 1)
        at = chunk.find(MAGIC)
        while at >= 0:
            header = decode(chunk, at, partition)
            if header is not None:
                yield header
            at = chunk.find(MAGIC, at + 1)
        position += _CHUNK_BYTES
