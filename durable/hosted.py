"""One stream that is open at a sidecar: who writes it, reads it and consumes it, and what of it may
go.

`submit`, `begin_to_close` and `close` are for any thread; everything else is the clerk's.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import msgspec

from mesh import limits
from mesh.durable.batch import Batch, encode
from mesh.durable.clerk import Clerk
from mesh.durable.complaint import Complaint
from mesh.durable.cursor import Cursor, Cut, Gap
from mesh.durable.groups import Groups
from mesh.durable.members import Members
from mesh.durable.outcomes import CLOSED, Refused, refused_for
from mesh.durable.partition import Partition, Request
from mesh.durable.protocol import (
    Answer,
    Batches,
    Fetch,
    Find,
    Inspected,
    Join,
    Place,
    Read,
    Settle,
    check_room,
    room_for_many_batches,
)
from mesh.durable.retention import Keep, Sealed, trim_to
from mesh.durable.segment import Segment
from mesh.durable.writer import Writer
from mesh.errors import LogDamaged, PayloadTooLarge
from mesh.message import GroupStats, StreamStats
from mesh.options import StreamOptions

logger = logging.getLogger(__name__)

_GROUPS: Final = "groups"
_PLAN_S: Final = 0.001
"""Least wait before the clerk comes back: it would spin on what is due already."""


class _Reader(msgspec.Struct, frozen=True, eq=False):
    query: Read
    answer: Answer
    until: float


class Hosted:
    """See above."""

    def __init__(
        self,
        name: str,
        options: StreamOptions,
        partition: Partition,
        clerk: Clerk,
        bury: Callable[[str, Batch, Any], object],
        message_bytes_max: int,
    ) -> None:
        """`bury` appends a batch to the dead letters of the stream with that name.
        `message_bytes_max`: of an answer."""
        self.name = name
        self._message_bytes_max = message_bytes_max
        self.options = options
        self._keep = Keep(
            bytes_max=options.keep_bytes, age_s_max=options.keep_s, count_max=options.keep_count
        )
        self.log = partition.log
        self._partition = partition
        self._clerk = clerk
        self._bury = bury
        self._writer: Writer | None = None
        """From the first append on, or the first that retention lets go."""
        self._lock = threading.Lock()
        self._closing = False
        self._woken = False
        """Whether the clerk is about to look after those who wait for records."""
        self._readers: list[_Reader] = []
        self._give_up_at = 0.0
        self._members: Members | None = None
        self._groups_stand = Complaint(logger, logging.ERROR)
        self._damaged: tuple[Segment, ...] = ()
        """The log's, when one of them was found to be damaged as something was to be given up: to
        read it all once a second would find nothing else."""
        self._wake_at = 0.0
        self._dismissed = False

    # -- From any thread ---------------------------------------------------------------------

    def submit(
        self, request: Request, answer: Answer, *, patient: bool = True, lone: bool = False
    ) -> Callable[[], None] | None:
        """Have it written, or be given what does so: see `Writer.submit`."""
        writer = self._writer or self._begin_to_write()
        if writer is None:
            answer(CLOSED)
            return None
        return writer.submit(request, answer, patient=patient, lone=lone)

    def _begin_to_write(self) -> Writer | None:
        with self._lock:
            if self._writer is None and not self._closing:
                self._writer = Writer(self._partition, self.name, appended=self._appended)
            return self._writer

    def abandon(self) -> None:
        """See `Sidecar.abandon`."""
        self._lock = threading.Lock()
        self._closing = True

    def begin_to_close(self) -> None:
        """Take no more appends. Does not block."""
        with self._lock:
            self._closing = True
            writer = self._writer
        if writer is not None:
            writer.close(0)

    def close(self, timeout: float | None) -> bool:
        """Have written what was submitted, and close the log; the clerk has ended, or this is it.
        Whether that was done in time: else it may be called again."""
        self.begin_to_close()
        self.dismiss()
        members, self._members = self._members, None
        if members is not None:
            members.close()
        if self._writer is not None:
            return self._writer.close(timeout)
        self._partition.close()
        return True

    def dropped(self) -> Counter[str]:
        """What was refused or lost, by reason."""
        refused = dict(self._partition.refused)
        dropped = Counter({f"append {code}": count for code, count in refused.items()})
        dropped["unsynced"] += self.log.unsynced_lost
        return dropped

    def _appended(self) -> None:
        """In the writer's thread: whoever waits for records is looked after by the clerk."""
        if not self._woken and (self._readers or self._members is not None):
            self._woken = True
            self._clerk.run(self._wake)

    # -- Reading -----------------------------------------------------------------------------

    def find(self, query: Find, answer: Answer) -> None:
        log = self.log
        try:
            tip = log.tip
            offset = log.start if query.time_ns is None else log.offset_at(query.time_ns)
        except (LogDamaged, OSError) as error:
            answer(self._unreadable(error))
            return
        answer(Place(log.start, tip.offset, offset, tip.log_epoch))

    def inspect(self, answer: Answer) -> None:
        log = self.log
        groups: dict[str, GroupStats] = {}
        unread: dict[str, str] = {}
        if self._members is not None or _GROUPS in log.storage.names():
            try:
                members = self._with_members()
                groups, unread = members.stats(), members.unread
            except (LogDamaged, OSError) as error:
                answer(self._unreadable(error))
                return
        segments = log.segments
        stats = StreamStats(
            start=segments[0].base,
            end=log.tip.offset,
            bytes=sum(segment.size for segment in segments),
            segments=len(segments),
            torn_bytes=log.torn_bytes,
            failures=log.failures,
            unsynced_lost=log.unsynced_lost,
            refused=dict(self._partition.refused),
            forgotten=self._partition.forgotten,
            readers=len(self._readers),
            groups=groups,
            groups_unread=unread,
        )
        answer(Inspected(stats))

    def read(self, query: Read, answer: Answer) -> None:
        reader = _Reader(query, answer, time.monotonic() + query.wait_ms / 1000)
        if self._serve(reader, late=not query.wait_ms):
            return
        if self._dismissed:
            answer(CLOSED)
            return
        if len(self._readers) >= limits.LOG_READERS_MAX:
            answer(Refused("full", f"{limits.LOG_READERS_MAX:,} readers wait here already"))
            return
        self._readers.append(reader)
        self._give_up_by(reader.until)
        if query.offset < self.log.tip.offset:
            self._wake()  # it came just before the writer knew of this reader

    def _serve(self, reader: _Reader, *, late: bool = False) -> bool:
        """Answer, if there is something, or it is too late to wait for that."""
        query, log = reader.query, self.log
        tip = log.tip
        at_end = query.offset >= tip.offset and query.log_epoch in (0, tip.log_epoch)
        if at_end and not late:
            return False
        cursor = Cursor(log, query.offset, query.log_epoch or None)
        try:
            with contextlib.closing(cursor):
                bytes_max = min(query.message_bytes_max, self._message_bytes_max)
                room = room_for_many_batches(bytes_max)
                found = cursor.read(min(query.bytes_max, limits.READ_BYTES_MAX, room))
            if isinstance(found, list) and found:
                check_room(found[0].header, bytes_max)
        except PayloadTooLarge as error:
            reader.answer(Refused("over", f"stream {self.name!r}: {error}"))
            return True
        except (LogDamaged, OSError) as error:
            reader.answer(self._unreadable(error))
            return True
        log_epoch = cursor.log_epoch or 0
        if isinstance(found, Gap):
            reader.answer(Batches([], tip.offset, log_epoch, gap_end=found.last + 1))
        elif isinstance(found, Cut):
            reader.answer(Batches([], tip.offset, log_epoch, cut_at=found.first))
        else:
            if len(found) > 1 and sum(each.header.size for each in found) > room:
                del found[-1]  # all others had room
            batches = [memoryview(encode(each.header, log.partition) + each.body) for each in found]
            reader.answer(Batches(batches, tip.offset, log_epoch))
        return True

    def _give_up_by(self, until: float) -> None:
        """One of the readers has waited long enough then. Most are answered before: they share what
        the clerk comes back for, or each would leave that behind."""
        now = time.monotonic()
        if not now < self._give_up_at <= until:
            self._give_up_at = max(until, now + _PLAN_S)
            self._clerk.at(self._give_up_at, self._give_up)

    def _give_up(self) -> None:
        now = time.monotonic()
        late = [reader for reader in self._readers if reader.until <= now]
        self._readers = [reader for reader in self._readers if reader.until > now]
        for reader in late:
            self._serve(reader, late=True)
        if self._readers:
            self._give_up_by(min(reader.until for reader in self._readers))

    def _unreadable(self, error: Exception) -> Refused:
        logger.error("stream %r cannot be read: %s", self.name, error)
        text = f"stream {self.name!r} cannot be read: {error}"
        return refused_for(error, text)

    # -- Groups ------------------------------------------------------------------------------

    def member_asks(self, query: Join | Fetch | Settle, answer: Answer) -> None:
        now, now_ns = time.monotonic(), time.time_ns()
        if self._dismissed and not isinstance(query, Settle):  # what is done is done
            answer(CLOSED)
            return
        if isinstance(query, Join) and (text := self._cannot_resume(query)):
            answer(Refused("malformed", f"stream {self.name!r}: {text}"))
            return
        try:
            members = self._with_members()
            members.rewind()
        except (LogDamaged, OSError) as error:
            answer(self._unreadable(error))
            return
        match query:
            case Join():
                members.join(query, answer, now, now_ns)
            case Fetch():
                members.fetch(query, answer, now, now_ns)
            case Settle():
                members.settle(query, answer, now, now_ns)
        self._plan()

    def _cannot_resume(self, query: Join) -> str:
        """Why what that member keeps account of is none of this log's; empty if it may be."""
        end = self.log.tip.offset
        if query.resume is None:
            return ""
        if not self.log.keeps_all:
            has = f"durability='fsync', not {self.options.durability!r}"
            return f"its offsets are for good only with {has}"
        if query.resume > end:
            text = f"its log ends at {end:,}, and all below {query.resume:,} is said to be done"
            return f"{text} (resume_from): that was read from another log, or an older copy is back"
        return ""

    def node_gone(self, node: str) -> None:
        self._serve_members(lambda members, now, now_ns: members.gone(node, now, now_ns))

    def dismiss(self) -> None:
        """Nobody is to wait for records any more."""
        self._dismissed = True
        readers, self._readers = self._readers, []
        for reader in readers:
            reader.answer(CLOSED)
        if self._members is not None:
            self._members.dismiss()

    def _serve_members(self, serve: Callable[[Members, float, int], object]) -> bool:
        """If there are any; and come back when something is due. Whether that went well."""
        if self._members is None:
            return True
        try:
            serve(self._members, time.monotonic(), time.time_ns())
        except (LogDamaged, OSError) as error:  # whoever asks next has that tried again
            text = f"groups of stream {self.name!r} cannot go on: {error}"
            self._groups_stand.say("%s", text)
            self._members.dismiss(refused_for(error, text))
            return False
        self._plan()
        return True

    def _with_members(self) -> Members:
        if self._members is None:
            groups = Groups(
                self.log.storage.folder(_GROUPS),
                self.log,
                trims_unsettled=self.options.retention != "acked" or self._keep != Keep(),
            )
            self._members = Members(
                self.name, groups, self.log, self._send_letter, self._message_bytes_max
            )
        return self._members

    def _send_letter(self, batch: Batch, done: Callable[[Any], object]) -> None:
        self._bury(self.name, batch, lambda outcome: self._clerk.run(partial(done, outcome)))

    # -- What happens by itself --------------------------------------------------------------

    def _wake(self) -> None:
        """There are more records, or something is due."""
        self._woken = False
        if self._readers:
            self._readers = [reader for reader in self._readers if not self._serve(reader)]
        if self._serve_members(Members.serve_all):
            self._groups_stand.ended()

    def _plan(self) -> None:
        """Come back when something is due."""
        assert self._members is not None
        due, now = self._members.next_at(), time.monotonic()
        if due is None or (now < self._wake_at <= due):
            return
        self._wake_at = max(due, now + _PLAN_S)
        self._clerk.at(self._wake_at, self._wake)

    def tick(self) -> None:
        """About every second: give up what retention lets go."""
        if self._writer is not None:
            self._writer.tick()
        if self._members is None and self.options.retention == "acked":
            with contextlib.suppress(LogDamaged, OSError):
                self._with_members()
        self._serve_members(Members.tick)
        offset = self._trim_to()
        if offset is not None and self.log.segment_of(offset) is not self.log.segments[0]:
            writer = self._writer or self._begin_to_write()
            if writer is not None:
                writer.run(partial(self._trim, offset))

    def _trim(self, offset: int) -> None:
        """In the writer's thread."""
        tip = self.log.tip
        if self._partition.trim(offset) and self._members is not None:
            self._clerk.run(partial(self._serve_members, Members.trimmed))
        if not tip.holds(self.log.tip):  # it syncs and mends, where there is no room
            self._appended()  # who waits behind what was cut off is to be told

    def _trim_to(self) -> int | None:
        options, log = self.options, self.log
        tip = log.tip  # what is behind it may be cut off, and is not to push out what is kept
        segments, storage = log.segments, log.storage
        if len(segments) < 2 or not options.gives_up or segments is self._damaged:
            return None
        acked = None
        if options.retention == "acked" and self._members is not None:
            acked = self._members.acked_to()
        try:
            sealed = [
                Sealed(each.size, each.index(storage).end, each.index(storage).time_ns)
                for each in segments[:-1]
            ]
        except (LogDamaged, OSError) as error:
            logger.error("stream %r: nothing is given up: %s", self.name, error)
            if isinstance(error, LogDamaged):
                self._damaged = segments
            return None
        last = segments[-1]
        last_bytes = tip.size if tip.base == last.base else last.size
        now_ns = log.clock.hear(time.time_ns())
        return trim_to(sealed, last_bytes, tip.offset, self._keep, now_ns, acked)
