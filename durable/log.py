"""A partition's log: batches appended to segments, read by offset or time, given up from the front.

Guarantee: what was synced is there after any crash, in its place and unchanged, or reading it
raises `LogDamaged`; offsets are dense, and that of a synced record is given to no other. One thread
appends (and syncs, rolls, trims, closes); any number of threads read, without a lock, and disturb
nothing: they look at `tip` and `segments`, each of which is replaced as a whole.

A failed write or sync leaves the log *failed*: nothing more is appended until `mend` has cut off
what is not known to be on disk. A failed sync is never repeated: the kernel may have thrown away
what it could not write, and would say yes the second time.
"""

from __future__ import annotations

import contextlib
import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Final

import msgspec

from mesh.durable import places
from mesh.durable.batch import HEAD_BYTES, Batch, Bytes, Head, Header, encode, encode_head
from mesh.durable.clock import Clock
from mesh.durable.complaint import Complaint
from mesh.durable.index import Index
from mesh.durable.recovery import State, recover, write_state
from mesh.durable.scan import Found
from mesh.durable.segment import Segment, begin, name_of
from mesh.durable.storage import File, Storage
from mesh.durable.tip import Tip
from mesh.errors import LogDamaged, StorageFailed

logger = logging.getLogger(__name__)

SEGMENT_BYTES: Final = 16 * 1024 * 1024
"""Only the last segment is read when a log is opened, and only whole ones are given up."""
_RESERVE_BYTES: Final = 1024 * 1024
"""Ahead of what is appended: a sync takes a quarter less here where the file's length stays what it
is, since that is in the file system's journal. Cut off when the segment is left or the log closed.
"""
_SYNCED_MAX: Final = (1 << 32) - 1
"""A large batch may make a segment larger. To say less than was synced is only less good at telling
damage from a torn tail."""
_MARK: Final = Header(body_check=0, body_bytes=0, count=0)


class _Failing:
    """Inside ``with`` any error fails the log. A generator would cost an append 2 µs."""

    __slots__ = ("_log",)

    def __init__(self, log: Log) -> None:
        self._log = log

    def __enter__(self) -> None:
        self._log.check_failed()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if error is not None:
            self._log.fail(error)


class Log:
    """See above."""

    def __init__(
        self,
        storage: Storage,
        partition: int,
        *,
        now_ns: int,
        observe: Callable[[Found], object] = lambda found: None,
        segment_bytes: int = SEGMENT_BYTES,
        shown_when_synced: bool = True,
    ) -> None:
        """Open the log in that folder, or begin one; `observe` is told each batch of its last
        segment. With `shown_when_synced` readers see only what is on disk for sure.

        Raises `LogDamaged`, `LogFormat`, `OSError`.
        """
        found = recover(storage, partition, now_ns, observe)
        self.storage = storage
        self.partition = partition
        self.segments: tuple[Segment, ...] = found.segments
        self.torn_bytes = found.torn_bytes
        self.log_epoch = found.log_epoch
        self.failures = 0
        """Writes and syncs."""
        self.unsynced_lost = 0
        """Records that were cut off, because they could not be synced."""
        self._file: File = found.file
        self._index: Index = found.index
        self.clock = Clock(found.time_ns, now_ns)
        self.segment_bytes = segment_bytes
        self.keeps_all = shown_when_synced
        """Whether what readers have seen is there for good, whatever happens."""
        self._synced = found.index.size
        self._synced_end = found.index.end
        self._good = found.index.size
        """Bytes of the last segment that `mend` keeps after a failure."""
        self._reserved = 0
        """Bytes of the last segment that are there, used or not; 0: it ends where its data do."""
        self._begun = False
        """Whether this opening is on disk, in `State`."""
        self._marked = False
        self._failed: BaseException | None = None
        self._failing = _Failing(self)
        self._stray = ""
        """The file of a segment that is being begun, or could not be, and may be there."""
        self._condensing = False
        """Whether the last segment is being replaced, or could not be, and may have been."""
        self._removed = True
        """Whether a segment was removed, perhaps by whoever had this log before, and a crash may
        still bring it back."""
        self._not_removed = Complaint(logger)
        self.tip = Tip(self.end, self.segments[-1].base, self._index.size, self.log_epoch)

    @property
    def start(self) -> int:
        """Offset of the first record that is still there."""
        return self.segments[0].base

    @property
    def end(self) -> int:
        """Offset of the next record."""
        return self._index.end

    @property
    def synced_end(self) -> int:
        """Below that all records are on disk for sure."""
        return self._synced_end

    @property
    def note_bytes(self) -> int:
        """Of the last segment, as long as it has no record."""
        return self._index.size if self._index.end == self._index.base else 0

    @property
    def size(self) -> int:
        """Bytes of all segments."""
        return sum(segment.size for segment in self.segments)

    # -- Appending: one thread ---------------------------------------------------------------

    def append(self, batches: Sequence[Batch], now_ns: int) -> list[Header]:
        """Write them, and return what they have become. Not synced yet. Raises `StorageFailed`."""
        size = 0
        for batch in batches:
            size += batch.header.size
        if not self._begun or self._index.size + size > self.segment_bytes:
            self.make_room(size, now_ns)
        with self._failing:
            return self._write(batches, self.clock.tick(now_ns))

    def make_room(self, size: int, now_ns: int) -> bool:
        """Have that many bytes of batches fit into the last segment, or begin one: whether that was
        necessary. Raises `StorageFailed`."""
        with self._failing:
            if not self._begun:
                self._save()
                self._begun = True
            if self._index.size + size <= self.segment_bytes:
                return False
            if self.note_bytes:
                return False  # the next one would have the same name: see `condense`
            self._roll(now_ns)
        return True

    def _write(self, batches: Sequence[Batch], time_ns: int) -> list[Header]:
        index, offset = self._index, self._index.end
        written: list[Header] = []
        pieces: list[Bytes] = []
        for each in batches:
            header = msgspec.structs.replace(
                each.header,
                offset=offset,
                time_ns=time_ns,
                log_epoch=self.log_epoch,
                synced=min(self._synced, _SYNCED_MAX),
            )
            pieces.append(encode(header, self.partition))
            pieces += each.body
            written.append(header)
            offset = header.end
        if self.keeps_all:
            self._reserve(index.size, sum(header.size for header in written))
        self._file.append(pieces)
        for header in written:
            index.note(header)
        self.segments[-1].size = self._good = index.size
        self._marked = False
        if not self.keeps_all:
            self._show()
        return written

    def _reserve(self, position: int, size: int) -> None:
        """Have room ahead of what is about to be appended, unless that is much."""
        end = position + size
        if self._reserved < end <= self.segment_bytes and size <= _RESERVE_BYTES // 4:
            self._reserved = min(position + _RESERVE_BYTES, self.segment_bytes)
            with contextlib.suppress(OSError):  # then it goes on as it does without
                self._file.reserve(self._reserved)

    def _trim_reserve(self) -> None:
        """The file is to end where its data do."""
        if self._reserved:
            self._reserved = 0
            self._file.truncate(self._index.size)
            self._file.sync()
            self._synced, self._synced_end = self._index.size, self._index.end

    def sync(self) -> None:
        """Have all on disk that was appended. Raises `StorageFailed`."""
        with self._failing:
            self._sync()

    def _sync(self) -> None:
        if self._synced != self._index.size:
            self._good = self._synced
            self._file.sync()
            self._good = self._index.size
            self._synced, self._synced_end = self._index.size, self._index.end
            self._show()

    def _show(self) -> None:
        base = self.segments[-1].base
        self.tip = Tip(self._index.end, base, self._index.size, self.log_epoch)

    def mark(self) -> None:
        """Nothing is being appended: write down that what there is has been synced. From then on
        nothing of it can be taken for a torn tail. Need not be synced itself. `StorageFailed`."""
        if self._marked or not self._begun:
            return
        with self._failing:
            self._sync()
            self._write([Batch(_MARK, ())], self.clock.time_ns)
            self._marked = True

    def check_failed(self) -> None:
        if self._failed is not None:
            raise StorageFailed(f"{self.segments[-1].name}: {self._failed}") from self._failed

    def fail(self, error: BaseException) -> None:
        """Append nothing until `mend`, and show what was synced alone: whatever the error is, how
        much was written is not known. Raises `StorageFailed` for an `OSError`."""
        self._failed = error
        self.failures += 1
        size = HEAD_BYTES if self._condensing else self._synced
        self.tip = Tip(self._synced_end, self.segments[-1].base, size, self.log_epoch)
        if isinstance(error, OSError):
            raise StorageFailed(f"{self.segments[-1].name}: {error}") from error

    def _roll(self, now_ns: int) -> None:
        """Go on in a new segment."""
        self._sync()
        self._trim_reserve()
        base = self._index.end
        self._stray = name_of(base)
        self.clock.tick(now_ns)  # what comes next there must not be earlier
        head = self._head()
        file, old, sealed = begin(self.storage, head), self._file, self.segments[-1]
        index = Index(base, HEAD_BYTES)
        self.segments = (*self.segments, Segment(self.partition, base, HEAD_BYTES, index))
        self._index, self._file = index, file
        self._synced = self._good = HEAD_BYTES
        self._stray = ""
        self._show()
        with contextlib.suppress(OSError):  # all of it is synced
            old.close()
        self._save()
        with contextlib.suppress(OSError):  # it can be made again
            sealed.store_index(self.storage)

    def _head(self) -> Head:
        """Of a segment that begins where the log ends."""
        return Head(
            partition=self.partition,
            offset=self._index.end,
            time_ns=self.clock.time_ns,
            log_epoch=self.log_epoch,
        )

    def condense(self, note: Batch) -> None:
        """Have `note` take the place of all notes of the last segment, which has no record yet, so
        that no reader is in it. Raises `StorageFailed`."""
        with self._failing:
            self._sync()
            self._trim_reserve()
            self._condensing = True
            head, last = self._head(), self.segments[-1]
            header = msgspec.structs.replace(
                note.header, offset=last.base, time_ns=head.time_ns, log_epoch=head.log_epoch
            )
            whole = (encode_head(head), encode(header, self.partition), *note.body)
            self.storage.replace(last.name, b"".join(whole))
            file, old = self.storage.open(last.name), self._file
            self._file, self._index = file, Index(last.base, HEAD_BYTES)
            self._index.note(header)
            size = self._synced = self._good = self._index.size
            fresh = Segment(self.partition, last.base, size, self._index)
            self.segments = (*self.segments[:-1], fresh)
            self._condensing = self._marked = False
            self._show()
        with contextlib.suppress(OSError):  # nobody needs what is in it
            old.close()

    def _save(self) -> None:
        write_state(self.storage, State(self.log_epoch, self._synced_end))

    def mend(self) -> None:
        """After a failure: cut off what was not written as a whole, or may not be on disk, and go
        on: nobody was told that it is on disk. Raises `StorageFailed`, `LogDamaged`."""
        if self._failed is None:
            return
        try:
            if self._stray:
                self._settle_roll()
            if self._condensing:
                self.storage.sync()
            if self._good < self._index.size:  # before it goes: others may be reading it
                self.log_epoch += 1
                self._begun = False
            self._file.close()
            file = self._file = self.storage.open(self.segments[-1].name)
            if self._condensing:  # it is the old one or the new one, whole and on disk
                self._good = file.size()
            file.truncate(self._good)
            self._reserved = 0
            good, self._good = self._good, self._synced  # if this sync fails, no more is left
            file.sync()
            self._good = good
            last = self.segments[-1]
            last.size, lost = good, self._index.end
            if good != self._index.size or self._condensing:
                self._index = last.remade(self.storage)
                self.unsynced_lost += lost - self._index.end
            self._condensing = False
        except OSError as error:
            self._failed = error
            raise StorageFailed(f"{self.segments[-1].name}: {error}") from error
        self._failed = None
        self._synced, self._synced_end = self._index.size, self._index.end
        self._show()

    def _settle_roll(self) -> None:
        """A roll has failed midway: remove the new segment, unless it is the last one already.
        Whichever is the last now, all of it was synced."""
        last = self.segments[-1]
        if self._stray != last.name:  # or it would be found there, and hide what is appended now
            with contextlib.suppress(FileNotFoundError):
                self.storage.remove(self._stray)
            self.storage.sync()
        self._synced = self._good = last.size
        self._stray = ""

    def trim(self, offset: int) -> int:
        """Give up whole segments that hold nothing from `offset` on, never the last; says how many.
        What cannot be removed now, is tried again the next time."""
        removed = 0
        while len(self.segments) > 1 and self.segments[1].base <= offset:
            first, *rest = self.segments
            try:
                self.segments = tuple(rest)
                self._remove(first)
            except BaseException as error:
                # Whatever the error is: the segments behind this one may not go before it.
                self.segments = (first, *rest)
                if not isinstance(error, OSError):
                    raise
                self._not_removed.say("%s cannot be removed: %s", first.name, error)
                break
            removed += 1
        return removed

    def _remove(self, segment: Segment) -> None:
        """The oldest first, and on disk before the next, so that a crash leaves no hole."""
        if self._removed:
            self.storage.sync()
            self._removed = False
        segment.remove(self.storage)
        self._removed = True

    def free_reserve(self) -> None:
        """Others need that room. Raises `StorageFailed`."""
        with self._failing:
            self._sync()
            self._trim_reserve()

    def close(self) -> None:
        """Whole and on disk, if that goes. The log is not used any more; readers may go on."""
        try:
            if self._begun:
                self.mark()
                with self._failing:
                    self._sync()
                    self._trim_reserve()
                    self._save()
        except StorageFailed as error:
            logger.warning("a log was not closed cleanly: %s", error)
        finally:
            self._file.close()

    # -- Reading: any thread -----------------------------------------------------------------

    def kept_since(self, log_epoch: int) -> int:
        """An offset: what was below it when the log had that epoch is there still; what was behind
        it then was cut off. Raises `LogDamaged`, `OSError`."""
        tip = self.tip
        if log_epoch >= tip.log_epoch:
            return tip.offset
        return self._look(partial(places.end_of, log_epoch))

    def segment_of(self, offset: int) -> Segment | None:
        """The one that holds that record, or will; None if it was given up."""
        segments = self.segments
        i = bisect_right(segments, offset, key=lambda segment: segment.base) - 1
        return segments[i] if i >= 0 else None

    def offset_at(self, time_ns: int) -> int:
        """The first record of that time or later; where the next will be if there is none. Raises
        `LogDamaged`, `OSError`."""
        return self._look(partial(places.at_time, time_ns))

    def _look(self, look: Callable[[places.Shown, Storage], int]) -> int:
        """What `look` finds in that part of the log which may be read; again, if some of it was
        given up or cut off meanwhile."""
        while True:
            segments, tip = self.segments, self.tip
            shown = [
                (segment, tip.size if segment.base == tip.base else segment.size)
                for segment in segments
                if segment.base <= tip.base
            ]
            try:
                return look(shown, self.storage)
            except (FileNotFoundError, LogDamaged):
                if self.segments is segments and tip.holds(self.tip):
                    raise
