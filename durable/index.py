"""Where to begin reading in a segment, by offset or by time: sparse, and disposable.

An entry for every 64 KiB or so; from there batch after batch is looked at. What is in a file can be
made again from the segment, so a missing, old or damaged one costs time and nothing else.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Final
from zlib import crc32

import msgspec

from mesh.durable.batch import Header

_EVERY_BYTES: Final = 64 * 1024
"""1 GB then has 16,000 entries, of 24 bytes each."""


class _Stored(msgspec.Struct, array_like=True, frozen=True):
    format: int
    base: int
    size: int
    end: int
    time_ns: int
    offsets: bytes
    positions: bytes
    times: bytes


_FORMAT: Final = 1
_CHECK_BYTES: Final = 4
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(_Stored).decode


class Index:
    """Of one segment."""

    __slots__ = ("_offsets", "_positions", "_times", "base", "end", "size", "time_ns")

    def __init__(self, base: int, size: int) -> None:
        """Of a segment that has `size` bytes, and no batch yet."""
        self.base = base
        self.end = base
        """The offset behind the last record."""
        self.size = size
        """Bytes of the segment."""
        self.time_ns = 0
        """Of the last batch."""
        self._offsets = array("Q")
        self._positions = array("Q")
        self._times = array("Q")

    def note(self, header: Header) -> None:
        """The next batch."""
        positions = self._positions
        if not positions or self.size - positions[-1] >= _EVERY_BYTES:
            entries = len(positions)
            try:  # in this order: others may be looking, from the last to the first
                positions.append(self.size)
                self._offsets.append(header.offset)
                self._times.append(header.time_ns)
            except BaseException:
                # Half an entry would move all that follow it.
                del positions[entries:], self._offsets[entries:], self._times[entries:]
                raise
        self.size += header.size
        self.end = header.end
        self.time_ns = header.time_ns

    def at_offset(self, offset: int) -> tuple[int, int] | None:
        """Position and offset of a batch at or before that record. None if there is no batch."""
        return self._entry(bisect_right(self._offsets, offset) - 1)

    def at_time(self, time_ns: int) -> tuple[int, int] | None:
        """Position and offset of a batch before the first that is of that time or later."""
        return self._entry(bisect_left(self._times, time_ns) - 1)

    def last_before(self, is_behind: Callable[[int], bool]) -> tuple[int, int] | None:
        """Position and offset of the last batch that has an entry and is not behind something, by
        its position: all that follow one that is, are so too."""
        return self._entry(bisect_left(self._positions, True, key=is_behind) - 1)

    def _entry(self, i: int) -> tuple[int, int] | None:
        if not self._positions:
            return None
        i = max(i, 0)
        return self._positions[i], self._offsets[i]

    def encode(self) -> bytes:
        stored = _encode(
            _Stored(
                _FORMAT,
                self.base,
                self.size,
                self.end,
                self.time_ns,
                self._offsets.tobytes(),
                self._positions.tobytes(),
                self._times.tobytes(),
            )
        )
        return crc32(stored).to_bytes(_CHECK_BYTES, "little") + stored


def decode(data: bytes, base: int, size: int) -> Index | None:
    """The index of that segment, of `size` bytes; None if it is not that, and to be made again."""
    stored = data[_CHECK_BYTES:]
    if crc32(stored).to_bytes(_CHECK_BYTES, "little") != data[:_CHECK_BYTES]:
        return None
    try:
        read = _decode(stored)
    except msgspec.MsgspecError:
        return None
    if (read.format, read.base, read.size) != (_FORMAT, base, size):
        return None
    index = Index(base, size)
    index.end = read.end
    index.time_ns = read.time_ns
    for column, packed in (
        (index._offsets, read.offsets),
        (index._positions, read.positions),
        (index._times, read.times),
    ):
        column.frombytes(packed)
    return index
