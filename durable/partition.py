"""A stream's part on one sidecar: its log, and what tells a repeated append from a new one.

Guarantee: what `commit` returns a receipt for is in the log, as far as the stream's durability
says, and will be found there once, however often it is said again and whichever side restarts in
between. What it refuses was not written and will not be, unless it says that it is not sure: a disk
that failed may not let go of what it has. One thread calls it (the writer's,
`mesh.durable.writer`); the log may be read by any number of others.

What a producer sent is taken apart no more than that takes: a batch is written as it came, behind a
header with its place. Records that are there already, by their dedup id or what they were derived
from, leave a note in their stead, since they have used up a number of their producer's.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final

import msgspec

from mesh.durable.batch import HEAD_BYTES, HEADER_BYTES, Batch, Flags, Header, batch
from mesh.durable.complaint import Complaint
from mesh.durable.dedup_ids import Original
from mesh.durable.derivations import DerivedSomewhere, TooOld
from mesh.durable.log import SEGMENT_BYTES, Log
from mesh.durable.outcomes import OFFSET_UNKNOWN, Appended, Code, Opened, Outcome, Refused
from mesh.durable.producers import NEW, New, Producers, SnapshotDamaged
from mesh.durable.records import Columns, columns_of
from mesh.durable.scan import Found
from mesh.durable.segment import Segment, name_of
from mesh.durable.snapshot import SnapshotFile
from mesh.durable.storage import Storage, is_disk_full
from mesh.errors import LogDamaged, StorageFailed
from mesh.options import StreamOptions
from mesh.sockets.frame import Malformed

logger = logging.getLogger(__name__)

_PLACE: Final = struct.Struct("<QQ")
_UNBOUNDED: Final = (1 << 64) - 1
"""More bytes than any log has."""
_SEGMENTS_MIN: Final = 4
"""Of a stream that is full."""


class Opening(msgspec.Struct, frozen=True):
    """A new run of a producer asks for its epoch."""

    producer: int


Request = Batch | Opening


class Partition:
    """See above."""

    def __init__(
        self,
        storage: Storage,
        number: int,
        options: StreamOptions,
        *,
        now_ns: int,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """Open the one in that folder, or begin it. Raises `LogDamaged`, `LogFormat`, `OSError`."""
        self.options = options
        self.refused: Counter[str] = Counter()
        """Batches, by the code of their refusals."""
        self._storage = storage
        self._ahead = False
        """Whether what is remembered may say more than the log has."""
        self._not_mended = Complaint(logger, logging.ERROR)
        self._not_freed = Complaint(logger)
        self._epoch_max = 0
        """The highest that a run was given since this was opened."""
        self._condensed_bytes = 0
        """Of the note that the last segment begins with, in place of those that were left out."""
        if options.bytes_max is not None:  # or what is to go would be in the last segment for ever
            segment_bytes = min(segment_bytes, options.bytes_max // _SEGMENTS_MIN)
        self._snapshot = SnapshotFile(storage)
        tail: list[tuple[Header, bytes]] = []
        self.log = Log(
            storage,
            number,
            now_ns=now_ns,
            observe=lambda found: tail.append(_noted(found)),
            segment_bytes=segment_bytes,
            shown_when_synced=options.durability == "fsync",
        )
        try:
            self._producers = self._remembered(tail)
        except BaseException:
            self.log.close()
            raise

    @property
    def forgotten(self) -> dict[str, int]:
        """What of that which tells repeats was given up for its bounds, by kind, since this was
        opened or had a failure."""
        return dict(self._producers.forgotten)

    # -- The writer's thread -----------------------------------------------------------------

    def commit(self, requests: Sequence[Request], now_ns: int) -> list[Outcome]:
        """Write those that are new, all in one go, and have them on disk if that is asked for.
        What became of each. After a failed write the log is as it was before; or, if that failed
        too, the refusals are ``unsure``, and nothing is written before `mend` went well."""
        writing = False
        try:
            if self._ahead and not self.mend():
                raise StorageFailed("what this log holds could not be read again")
            self._make_room(requests, now_ns)
            outcomes, batches = self._decide(requests, now_ns)
            if batches:
                writing = True
                self.log.append(batches, now_ns)
                if self.options.durability == "fsync":
                    self.log.sync()
            return outcomes
        except StorageFailed as failure:
            mended = self.mend()
            refusal = _refusal(failure, sure=mended or not writing)
            self.refused[refusal.code] += len(requests)
            return [refusal] * len(requests)

    def mend(self) -> bool:
        """After a failure: cut off what nobody was told of, and remember what is left. Whether that
        went well; until it does nothing can be written."""
        self._ahead = True
        try:
            self.log.mend()
            self._producers = self._remembered(None)
            self._producers.forgot(self._epoch_max)
            self._ahead = False
            self._not_mended.ended()
        except (StorageFailed, LogDamaged, OSError) as error:
            self._not_mended.say("%s", error)  # each append tries it, and each second `trim` does
            return False
        return True

    def sync(self) -> bool:
        """Have on disk what was written without waiting for that. Whether it went well; else what
        was written since may be lost, which the log counts."""
        try:
            self.log.sync()
        except StorageFailed as failure:
            logger.error("what was appended last is not on disk: %s", failure)
            self.mend()
            return False
        return True

    def rest(self) -> None:
        """Nothing was appended for a while."""
        try:
            self.log.mark()
        except StorageFailed as failure:
            logger.warning("%s", failure)
            self.mend()

    def trim(self, offset: int) -> int:
        """Give up whole segments below `offset`, as far as what is remembered of them is on disk;
        says how many. After a failure that is still to be mended it does that first."""
        if self._ahead and not self.mend():
            return 0
        if offset > self._snapshot.safe_to:
            self._snapshot.write_again()
            if self._snapshot.has_no_room and self._free(offset):
                self._snapshot.write_again()
            if not self._snapshot.has_no_room:
                self._not_freed.ended()
        return self.log.trim(min(offset, self._snapshot.safe_to))

    def _free(self, offset: int) -> bool:
        """Where there is no room for what tells repeats, nothing may go, which would make some: so
        give up what is reserved, and all but the segments of what is to go. Whether that went well.
        """
        try:
            self.log.free_reserve()
            for segment, following in pairwise(self.log.segments):
                if following.base <= offset:
                    segment.remove_beside(self._storage)
        except (StorageFailed, OSError) as error:
            self._not_freed.say("%s", error)
            if isinstance(error, StorageFailed):
                return self.mend()
        return True

    def close(self) -> None:
        self.log.close()

    # -- What becomes of each ----------------------------------------------------------------

    def _make_room(self, requests: Sequence[Request], now_ns: int) -> None:
        """A new segment, if there has to be one, before anything is decided: so that what is
        remembered then is what the log has before it."""
        size = len(requests) * HEADER_BYTES
        for each in requests:
            if isinstance(each, Batch):
                size += each.header.size
        if self.log.make_room(size, now_ns):
            self._condensed_bytes = 0
            self._snapshot.write(self.log.end, self._producers.snapshot())
        elif self.log.note_bytes > self._condensed_bytes + self.log.segment_bytes:
            # Without a record it is not followed by another segment, and never given up.
            body = self._producers.snapshot()
            self.log.condense(batch([body], count=0, flags=Flags.SNAPSHOT))
            self._condensed_bytes = self.log.note_bytes

    def _decide(
        self, requests: Sequence[Request], now_ns: int
    ) -> tuple[list[Outcome], list[Batch]]:
        offset, time_ns = self.log.end, self.log.clock.at(now_ns)
        room = _UNBOUNDED
        if self.options.bytes_max is not None:
            room = self.options.bytes_max - self._record_bytes
        outcomes: list[Outcome] = []
        batches: list[Batch] = []
        written: Batch | None
        outcome: Outcome
        for request in requests:
            if isinstance(request, Opening):
                outcome, written = self._open(request, time_ns)
            else:
                outcome, written = self._admit(request, offset, time_ns, room)
            outcomes.append(outcome)
            if written is not None:
                batches.append(written)
                offset += written.header.count
                room -= written.header.size
            elif isinstance(outcome, Refused):
                self.refused[outcome.code] += 1
        return outcomes, batches

    @property
    def _record_bytes(self) -> int:
        """What `StreamOptions.bytes_max` bounds. Notes do not count: who only opens producers fills
        no stream."""
        return self.log.size - self.log.note_bytes

    def _open(self, opening: Opening, time_ns: int) -> tuple[Outcome, Batch]:
        opened = self._producers.open(opening.producer, time_ns)
        self._producers.opened(opening.producer, opened.epoch, opened.next_seq)
        self._epoch_max = max(self._epoch_max, opened.epoch)
        note = batch(
            (),
            count=0,
            producer=opening.producer,
            seq=opened.next_seq,
            producer_epoch=opened.epoch,
            flags=Flags.OPENED,
        )
        return Opened(opened.epoch, opened.next_seq, self.options.durability), note

    def _admit(
        self, new: Batch, offset: int, time_ns: int, room: int
    ) -> tuple[Outcome, Batch | None]:
        header = new.header
        producer, epoch, seq, count = (
            header.producer,
            header.producer_epoch,
            header.seq,
            header.count,
        )
        verdict = self._producers.check(producer, epoch, seq, count) if producer else NEW
        if isinstance(verdict, Original):
            return Appended(verdict.offset, count, verdict.time_ns, True), None
        if not isinstance(verdict, New):
            return _refused(verdict), None
        bytes_max = self.options.bytes_max or _UNBOUNDED
        if header.size > bytes_max:
            text = f"a batch of {header.size:,} bytes over the log's limit of {bytes_max:,}"
            return Refused("large", f"{text} (bytes_max)"), None
        if header.size > room:
            return Refused("full", _full(bytes_max, self._record_bytes)), None
        if header.column_bytes:
            try:
                columns = columns_of(header, _beginning(new.body, header.column_bytes))
                original = self._seen(header, columns, time_ns)
            except (Malformed, ValueError):
                return Refused("malformed", "what stands beside the records is malformed"), None
            if isinstance(original, Refused):
                return original, None
            if original is not None:
                self._wrote(new.header, original.offset, original.time_ns)
                note = batch(
                    [_PLACE.pack(original.offset, original.time_ns)],
                    count=0,
                    producer=producer,
                    seq=seq,
                    producer_epoch=epoch,
                    flags=Flags.REPEATED,
                )
                return Appended(original.offset, 1, original.time_ns, True), note
            if header.flags & Flags.UNIQUE:
                self._remember_unique(columns, offset, time_ns)
        self._wrote(header, offset, time_ns)
        return Appended(offset, count, time_ns), new

    def _wrote(self, header: Header, offset: int, time_ns: int) -> None:
        """That batch is at `offset` now, or its one record was before."""
        if header.producer:
            count = header.count or 1
            self._producers.appended(
                header.producer, header.producer_epoch, header.seq, count, offset, time_ns
            )

    def _seen(self, header: Header, columns: Columns, time_ns: int) -> Original | Refused | None:
        """Where the record is already, if it is."""
        if not header.flags & Flags.UNIQUE:
            return None
        if header.count != 1:
            raise Malformed("malformed")
        original: Original | DerivedSomewhere | TooOld | None = None
        if columns.dedup_id is not None:
            original = self._producers.dedup_ids.seen(columns.dedup_id, time_ns)
        if original is None and (of := columns.derived) is not None:
            original = self._producers.derivations.seen(of.source, of.offset, of.output)
        if isinstance(original, DerivedSomewhere):
            return Original(OFFSET_UNKNOWN, 0)
        if isinstance(original, TooOld):
            return Refused("old", str(original))
        return original

    def _remember_unique(self, columns: Columns, offset: int, time_ns: int) -> None:
        if columns.dedup_id is not None:
            self._producers.dedup_ids.add(columns.dedup_id, offset, time_ns)
        if (of := columns.derived) is not None:
            self._producers.derivations.add(of.source, of.offset, of.output, offset, time_ns)

    # -- What is remembered ------------------------------------------------------------------

    def _remembered(self, tail: Iterable[tuple[Header, bytes]] | None) -> Producers:
        """The table, from the last snapshot and what the log has after it. `tail`: the batches of
        the last segment, if that was read already: when the log was opened. None after a failure.
        """
        window_s = self.options.dedup_window_s
        self._producers, base = Producers(dedup_window_s=window_s), self.log.start
        *sealed, last = self.log.segments
        found = self._snapshot.read()
        if found is not None and any(each.base == found[0] for each in self.log.segments):
            with contextlib.suppress(SnapshotDamaged):
                self._producers = Producers.restore(found[1], dedup_window_s=window_s)
                base = found[0]
        if tail is not None:  # after a failure the snapshot may not be on disk yet
            self._snapshot.safe_to = base
        for segment in sealed:
            if segment.base >= base:
                self._observe_segment(segment)
        if self._snapshot.safe_to < last.base:  # else retention would have to stop at `base`
            self._snapshot.write(last.base, self._producers.snapshot())
        if tail is None:
            self._observe_segment(last)
        for header, body in tail or ():
            self._observe(header, body)
        self._producers.forgotten.clear()
        return self._producers

    def _observe_segment(self, segment: Segment) -> None:
        with contextlib.closing(self._storage.open_to_read(segment.name)) as file:
            walk = segment.walk(file, HEAD_BYTES, segment.base)
            for found in walk:
                self._observe(*_noted(found))
        segment.check(walk)

    def _observe(self, header: Header, body: bytes) -> None:
        """A batch of the log, as it was written."""
        flags = header.flags
        if flags & Flags.SNAPSHOT:
            self._restore(header, body)
        elif flags & Flags.OPENED:
            self._producers.opened(header.producer, header.producer_epoch, header.seq)
        elif flags & Flags.REPEATED:
            self._wrote(header, *_PLACE.unpack(body))
        elif header.count:
            if flags & Flags.UNIQUE:
                columns = columns_of(header, body)
                self._remember_unique(columns, header.offset, header.time_ns)
            self._wrote(header, header.offset, header.time_ns)

    def _restore(self, header: Header, body: bytes) -> None:
        """The note that a segment begins with, in place of those before it."""
        window_s = self.options.dedup_window_s
        try:
            self._producers = Producers.restore(body, dedup_window_s=window_s)
        except SnapshotDamaged as error:
            name = name_of(header.offset)
            raise LogDamaged(name, HEAD_BYTES, header.offset, str(error)) from None
        if header.offset == self.log.segments[-1].base:
            self._condensed_bytes = HEAD_BYTES + header.size


def _noted(found: Found) -> tuple[Header, bytes]:
    """What `_observe` needs of a batch: only those with flags say something in their bodies."""
    return found.header, bytes(found.body) if found.header.flags else b""


def _beginning(body: Sequence[bytes | memoryview], size: int) -> bytes | memoryview:
    """At least so much of it. A large payload is not copied for that."""
    return body[0] if len(body[0]) >= size else b"".join(body)


_CODES: Final[dict[str, Code]] = {"Fenced": "fenced", "Unknown": "unknown", "Gap": "gap"}


def _refused(verdict: object) -> Refused:
    next_seq = getattr(verdict, "next_seq", 0)
    return Refused(_CODES[type(verdict).__name__], str(verdict), next_seq)


def _refusal(failure: StorageFailed, *, sure: bool) -> Refused:
    if not sure:
        text = f"{failure}; what was being written may be found when the log is opened again"
        return Refused("unsure", text)
    return Refused("full" if is_disk_full(failure.__cause__) else "storage", str(failure))


def _full(bytes_max: int, size: int) -> str:
    return f"the log has {size:,} bytes of the {bytes_max:,} that it may have (bytes_max)"
