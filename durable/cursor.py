"""A place in a log, and reading on from there. Disturbs nobody; for one thread at a time.

Guarantee: what is read is what stands there, in order and without a hole: what retention removed is
told as a `Gap`. Where records are shown before they are on disk, and some were cut off, what was
read of them is told as a `Cut`, and those that took their place are read next.
"""

from __future__ import annotations

import msgspec

from mesh.durable.batch import HEAD_BYTES
from mesh.durable.log import Log
from mesh.durable.scan import Found
from mesh.durable.segment import Segment
from mesh.durable.storage import File
from mesh.errors import LogDamaged


class Gap(msgspec.Struct, frozen=True):
    """Records that are not there any more: those from `first` to `last`."""

    first: int
    last: int


class Cut(msgspec.Struct, frozen=True):
    """Records that had been read, or could have been: those from `first` to `last` were cut off.
    Others have their offsets, or will."""

    first: int
    last: int


class _Place(msgspec.Struct):
    """Where the next batch stands, or will."""

    segment: Segment
    file: File
    position: int
    offset: int
    time_ns: int = 0
    """Of the batch before, if that was read."""


class Cursor:
    """See above. It may stand at the end, and read on when there is more."""

    def __init__(self, log: Log, offset: int, log_epoch: int | None = None) -> None:
        """`log_epoch`: the log's when what is below `offset` was read; None if nothing was."""
        self.offset = offset
        """Of the next record to be read."""
        self.log_epoch = log_epoch
        """The log's when it was read last, when all below `offset` was there: a cut since then is
        noticed by it. None where `offset` is beyond the log's end."""
        self._log = log
        self._place: _Place | None = None

    def read(self, bytes_max: int) -> list[Found] | Gap | Cut:
        """Batches from `offset` on, at least one if there is one, and up to about `bytes_max`: the
        first may begin before `offset`. Does not wait: there may be none. A `Gap` if retention has
        overtaken this place, which is behind it then; a `Cut` if what is before this place is not
        what was read any more, and then it is where that begins. Raises `LogDamaged`, `OSError`."""
        tip = self._log.tip
        if self.log_epoch != tip.log_epoch:
            self.close()
            read_to = self.offset
            if self.log_epoch is not None:
                self.offset = min(read_to, self._log.kept_since(self.log_epoch))
            self.log_epoch = tip.log_epoch if self.offset <= tip.offset else None
            if self.offset < read_to:
                return Cut(self.offset, read_to - 1)
        found: list[Found] = []
        size = 0
        while not found and self.offset < tip.offset:
            place = self._place or self._enter()
            if isinstance(place, Gap):
                return place
            self._place, segment = place, place.segment
            ends_here = segment.base == tip.base
            walk = segment.walk(
                place.file,
                place.position,
                place.offset,
                place.time_ns,
                end=tip.size if ends_here else segment.size,
            )
            for each in walk:
                if each.header.log_epoch > tip.log_epoch:
                    self._lost(each.header.offset)
                    return found or self.read(bytes_max)
                if each.header.count and each.header.end > self.offset:
                    found.append(each)
                    size += each.header.size
                    if size >= bytes_max:
                        break
            if walk.fault and not tip.holds(self._log.tip):
                self._lost(walk.offset)
                return found or self.read(bytes_max)
            if not found:  # or those that are good come first
                segment.check(walk)
            place.position, place.offset, place.time_ns = walk.position, walk.offset, walk.time_ns
            self.offset = max(self.offset, walk.offset)
            if not found and not ends_here:
                self._leave(place)
        return found

    def _lost(self, offset: int) -> None:
        """What stood there was cut off while it was being read."""
        self.close()
        self.offset = max(self.offset, offset)

    def move(self, offset: int) -> None:
        """Read on from there."""
        self.offset = offset
        self.close()

    def close(self) -> None:
        """Let go of the file. Reading on opens one again."""
        if self._place is not None:
            self._place.file.close()
            self._place = None

    def _enter(self) -> _Place | Gap:
        """The place of a batch at or before `offset`."""
        log = self._log
        segment = log.segment_of(self.offset)
        if segment is not None:
            try:
                entry = segment.index(log.storage).at_offset(self.offset)
                file = log.storage.open_to_read(segment.name)
            except FileNotFoundError:
                if log.start <= self.offset:
                    raise LogDamaged(segment.name, 0, segment.base, "there is no file") from None
                # It was given up just now.
            else:
                position, offset = entry or (HEAD_BYTES, segment.base)
                return _Place(segment, file, position, offset)
        first, self.offset = self.offset, log.start
        return Gap(first, self.offset - 1)

    def _leave(self, place: _Place) -> None:
        """A segment was read to its end, where the next one has to begin."""
        following = self._log.segment_of(place.offset)
        if following is place.segment:
            raise LogDamaged(following.name, place.position, place.offset, "the file ends")
        self.close()
