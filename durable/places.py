"""Where in a log something begins: what is of a time or later, what is of a later log epoch.

A log has a new epoch whenever it is opened, and whenever something is cut off; also where it is
begun anew, or brought back from a backup (`mesh.durable.recovery`). Each batch says under which it
was written. So epochs ascend in a log, and all that is left of one, and of those before it, comes
first: whoever read it then finds out by that what was cut off.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Sequence

from mesh.durable.batch import HEAD_BYTES, HEADER_BYTES, decode
from mesh.durable.segment import Segment, read_head
from mesh.durable.storage import File, Storage
from mesh.errors import LogDamaged

Shown = Sequence[tuple[Segment, int]]
"""The segments of a log, and how many bytes of each are looked at."""


def at_time(time_ns: int, shown: Shown, storage: Storage) -> int:
    """The first record of that time or later; where the next will be if there is none. Raises
    `LogDamaged`, `OSError`."""
    i = bisect_left(shown[:-1], time_ns, key=lambda each: each[0].index(storage).time_ns)
    segment, size = shown[i]
    entry = segment.index(storage).at_time(time_ns)
    if entry is None:
        return segment.base
    with contextlib.closing(storage.open_to_read(segment.name)) as file:
        walk = segment.walk(file, *entry, end=size)
        for found in walk:
            if found.header.time_ns >= time_ns:
                return found.header.offset
        segment.check(walk)
    return walk.offset


def end_of(log_epoch: int, shown: Shown, storage: Storage) -> int:
    """The first record that was written under a later epoch than that; where the next will be if
    there is none. Raises `LogDamaged`, `OSError`."""
    for segment, size in reversed(shown):
        with contextlib.closing(storage.open_to_read(segment.name)) as file:
            head = read_head(file, segment.name, segment.partition)
            if head is None:
                reason = "the head of the segment is damaged"
                raise LogDamaged(segment.name, 0, segment.base, reason)
            if head.log_epoch <= log_epoch:
                return _end_in(segment, file, size, log_epoch, storage)
    return shown[0][0].base


def _end_in(segment: Segment, file: File, size: int, log_epoch: int, storage: Storage) -> int:
    def is_later(position: int) -> bool:
        if position >= size:
            return True
        header = decode(file.read(position, HEADER_BYTES), partition=segment.partition)
        return header is None or header.log_epoch > log_epoch

    entry = segment.index(storage).last_before(is_later)
    walk = segment.walk(file, *(entry or (HEAD_BYTES, segment.base)), end=size)
    for found in walk:
        if found.header.log_epoch > log_epoch:
            return found.header.offset
    segment.check(walk)
    return walk.offset
