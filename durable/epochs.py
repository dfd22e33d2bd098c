"""What is left in a log of an earlier log epoch: so who read it then finds out what was cut off.

A log has a new epoch whenever it is opened, and whenever something is cut off. Each batch says
under which it was written. So epochs ascend in a log, and all that is left of one, and of those
before it, comes first: whatever is behind that was written later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from mesh.durable.batch import HEAD_BYTES, HEADER_BYTES, decode
from mesh.durable.segment import Segment, read_head
from mesh.durable.storage import File, Storage
from mesh.errors import LogDamaged


def end_of(log_epoch: int, segments: Sequence[tuple[Segment, int]], storage: Storage) -> int:
    """The offset of the first record that was written under a later epoch than that; where the next
    will be if there is none. So many bytes of each segment are looked at. Raises `LogDamaged`,
    `OSError`."""
    for segment, size in reversed(segments):
        with contextlib.closing(storage.open_to_read(segment.name)) as file:
            head = read_head(file, segment.name, segment.partition)
            if head is None:
                reason = "the head of the segment is damaged"
                raise LogDamaged(segment.name, 0, segment.base, reason)
            if head.log_epoch <= log_epoch:
                return _end_in(segment, file, size, log_epoch, storage)
    return segments[0][0].base


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
