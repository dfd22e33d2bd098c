"""A place in a log, and reading on from there. Disturbs nobody; for one thread at a time."""

from __future__ import annotations

import msgspec

from mesh.durable.batch import HEAD_BYTES
from mesh.durable.log import Log, Tip
from mesh.durable.scan import Found
from mesh.durable.segment import Segment
from mesh.durable.storage import File
from mesh.errors import LogDamaged


class Gap(msgspec.Struct, frozen=True):
    """Records that are not there any more: those from `first` to `last`."""

    first: int
    last: int


class _Place(msgspec.Struct):
    """Where the next batch stands, or will."""

    segment: Segment
    file: File
    position: int
    offset: int
    log_epoch: int
    """In another one something else may stand there."""
    time_ns: int = 0
    """Of the batch before, if that was read."""


class Cursor:
    """See above. It may stand at the end, and read on when there is more. Where records that it has
    read were cut off (`Log.mend`), it goes on behind those that took their place: the log epoch of
    what it reads then is a higher one."""

    def __init__(self, log: Log, offset: int) -> None:
        self.offset = offset
        """Of the next record to be read."""
        self._log = log
        self._place: _Place | None = None

    def read(self, bytes_max: int) -> list[Found] | Gap:
        """Batches from `offset` on, at least one if there is one, and up to about `bytes_max`: the
        first may begin before `offset`. Does not wait: there may be none. A `Gap` if retention has
        overtaken this place, which is behind it then. Raises `LogDamaged`, `OSError`."""
        tip = self._log.tip
        if self._place is not None and self._place.log_epoch != tip.log_epoch:
            self.close()
        found: list[Found] = []
        size = 0
        while not found and self.offset < tip.offset:
            place = self._place or self._enter(tip)
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
                if each.header.count and each.header.end > self.offset:
                    found.append(each)
                    size += each.header.size
                    if size >= bytes_max:
                        break
            if walk.fault and not tip.holds(self._log.tip):  # it was cut off meanwhile
                self.close()
                self.offset = max(self.offset, walk.offset)
                return found or self.read(bytes_max)
            if not found:  # or those that are good come first
                segment.check(walk)
            place.position, place.offset, place.time_ns = walk.position, walk.offset, walk.time_ns
            self.offset = max(self.offset, walk.offset)
            if not found and not ends_here:
                self._leave(place)
        return found

    def move(self, offset: int) -> None:
        """Read on from there."""
        self.offset = offset
        self.close()

    def close(self) -> None:
        """Let go of the file. Reading on opens one again."""
        if self._place is not None:
            self._place.file.close()
            self._place = None

    def _enter(self, tip: Tip) -> _Place | Gap:
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
                return _Place(segment, file, position, offset, tip.log_epoch)
        first, self.offset = self.offset, log.start
        return Gap(first, self.offset - 1)

    def _leave(self, place: _Place) -> None:
        """A segment was read to its end, where the next one has to begin."""
        following = self._log.segment_of(place.offset)
        if following is place.segment:
            raise LogDamaged(following.name, place.position, place.offset, "the file ends")
        self.close()
