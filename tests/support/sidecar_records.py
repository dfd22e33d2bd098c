"""What was sent to a stream and what its log has of that: the model of the content of the log of
`tests.support.sidecar_machine`.

Promises that it fails at the first look at which a record is there that was refused, or twice; at
which one is not there, or not as its receipt says, that was not to be lost, or that retention did
not take; and at which the files are not what the log says.

Must not know who asks, nor the sidecar, its disk's faults or its groups: it is told when something
may be lost, and what the groups have done with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import msgspec

from mesh.durable.batch import Batch, Header
from mesh.durable.cursor import Cursor
from mesh.durable.log import Log
from mesh.durable.outcomes import Appended
from mesh.durable.records import NewRecord, batch_of, columns_of, payloads_of
from mesh.durable.retention import Keep, Sealed, trim_to
from mesh.options import StreamOptions
from mesh.sockets import codec
from tests.support.fake_disk import Content, FakeDisk
from tests.support.partitions import numbered


class Sent(msgspec.Struct, eq=False):
    """A batch that was sent, and is again, until its producer knows what became of it."""

    batch: Batch
    records: list[NewRecord]
    first: int
    """Number of its first record: such a number is what is in its payload, and no other has it."""
    tries: int = 0
    refusals: int = 0
    """That left no doubt."""
    offset: int | None = None
    """Of its first record, once there is a receipt."""

    @property
    def refused(self) -> bool:
        return self.tries == self.refusals


class Records:
    """See above."""

    def __init__(self) -> None:
        self.options = StreamOptions()
        self.numbers = 0
        self.sent: dict[int, Sent] = {}
        """By the number of each of its records."""
        self.shown: dict[int, int] = {}
        """The number of the record at each offset, or that was there until retention took it."""
        self.place: dict[int, int] = {}
        """The other way round."""
        self.times: dict[int, int] = {}
        """By offset."""
        self.start = self.end = self.log_epoch = self.synced_end = 0
        """Of the log, when it was looked at last."""
        self.gone = 0
        """All below may be."""
        self.cuts: list[tuple[int, int]] = []
        """The log epoch that began with each, and the offset of the first record that was lost."""
        self.sealed: list[Sealed] = []
        self.last_bytes = 0

    # -- What is sent ------------------------------------------------------------------------

    def batch(self, producer: int, epoch: int, seq: int, records: list[dict[str, Any]]) -> Sent:
        """A new one, of records with that size and whatever else a `NewRecord` has."""
        first, self.numbers = self.numbers, self.numbers + len(records)
        new = []
        for n, each in enumerate(records):
            size, number = each.pop("size", 1), first + n
            key = None if number % 4 == 3 else b"key %d" % (number % 4)
            new.append(NewRecord(codec.pack([number, "x" * size]), key, **each))
        sent = Sent(numbered(batch_of(new), producer, epoch, seq), new, first)
        self.sent.update((first + n, sent) for n in range(len(new)))
        return sent

    def record(self, number: int) -> NewRecord:
        sent = self.sent[number]
        return sent.records[number - sent.first]

    def receipt(self, sent: Sent, reply: Appended) -> None:
        """What it says is so."""
        records = sent.records
        assert reply.count == len(records)
        if reply.offset + len(records) > self.end and self.options.durability != "fsync":
            return  # it is lost already
        assert self.times.get(reply.offset) == reply.time_ns, "it is not there"
        numbers = [self.shown[reply.offset + n] for n in range(len(records))]
        if numbers == list(range(sent.first, sent.first + len(records))):
            assert sent.offset in (None, reply.offset)
            sent.offset = reply.offset
            return
        other = self.record(numbers[0])
        assert reply.repeated, "others are there"
        assert len(records) == 1
        assert sent.offset is None
        assert any(
            mine is not None and mine == its
            for mine, its in (
                (records[0].dedup_id, other.dedup_id),
                (records[0].derived, other.derived),
            )
        )

    # -- What there is -----------------------------------------------------------------------

    def look(self, log: Log, *, may_lose: bool) -> int | None:
        """What was there is, and whatever came might. Without fsync the last ones may be lost: from
        which one on they are, if so."""
        tip = log.tip
        found = list(records_in(log))
        assert [offset for offset, *_ in found] == list(range(log.start, tip.offset))
        kept = tip.offset
        if tip.log_epoch != self.log_epoch:
            later = [o for o, header, *_ in found if header.log_epoch > self.log_epoch]
            kept = min(later, default=tip.offset)
        is_cut = kept < self.end
        if is_cut:
            assert may_lose, "lost"
            self.lost(kept)
            self.cuts.append((tip.log_epoch, kept))
        self.went(log)
        is_back = log.start < self.start  # after a crash; then the quota may be exceeded
        sizes = {header.offset: header.size for _, header, *_ in found}
        has_room = sum(sizes.values()) <= (self.options.bytes_max or math.inf)
        for offset, header, payload, _ in found:
            if offset not in self.shown:
                assert has_room or is_back, "over its quota"
                self.came(offset, header.time_ns, payload[0])
            assert self.shown[offset] == payload[0], "another is there"
        return kept if is_cut else None

    def lost(self, kept: int) -> None:
        """Records from there on."""
        assert self.options.durability != "fsync", "lost"
        assert kept >= self.synced_end, "lost"
        for offset in [each for each in self.shown if each >= kept]:
            number = self.shown.pop(offset)
            del self.place[number], self.times[offset]
            self.sent[number].offset = None

    def went(self, log: Log) -> None:
        """What has gone just now, may be there again after a crash."""
        self.gone = max(self.gone, log.start)

    def came(self, offset: int, time_ns: int, number: int) -> None:
        assert number not in self.place, "twice"
        assert not self.sent[number].refused, "it was refused"
        new = self.record(number)
        for other_offset, other_number in self.shown.items():
            other = self.record(other_number)
            assert new.derived is None or new.derived != other.derived, "derived twice"
            if new.dedup_id is not None and new.dedup_id == other.dedup_id:
                apart_s = (time_ns - self.times[other_offset]) / 1e9
                assert apart_s >= self.options.dedup_window_s, "twice within the window"
        assert time_ns >= self.times.get(offset - 1, 0)
        self.shown[offset], self.place[number], self.times[offset] = number, offset, time_ns

    def look_at_files(self, log: Log) -> None:
        """They are what the log says. Begins to speak of the log as it is now."""
        self.sealed = [
            Sealed(each.size, after.base, self.times.get(after.base - 1, 0))
            for each, after in zip(log.segments[:-1], log.segments[1:], strict=True)
        ]
        assert log.tip.base == log.segments[-1].base
        self.last_bytes = log.tip.size
        if log._failed is None:
            assert isinstance(log.storage, FakeDisk)
            entries = log.storage._directory.entries
            files = {each.name for each in log.segments}
            assert files == {name for name in entries if name.endswith(".log")}
            for each in log.segments:
                file = entries[each.name]
                assert isinstance(file, Content)
                size = len(file.shown)
                assert size == each.size or (each is log.segments[-1] and size > each.size)
                assert not file.shown[each.size :].strip(b"\0")
        self.start, self.end, self.log_epoch = log.start, log.tip.offset, log.tip.log_epoch
        self.synced_end = log.synced_end

    def is_cut(self, offset: int, since: int, until: int) -> bool:
        """Whether something below `offset` was lost between those log epochs."""
        return any(kept < offset for epoch, kept in self.cuts if since < epoch <= until)

    # -- What retention may take -------------------------------------------------------------

    @property
    def has_limits(self) -> bool:
        options = self.options
        return any((options.keep_bytes, options.keep_s, options.keep_count))

    def may_go_to(self, now_ns: int, acked: int | None) -> int | None:
        """As of the last look; `acked`: all groups have done with what is before that."""
        options = self.options
        keep = Keep(
            bytes_max=options.keep_bytes, age_s_max=options.keep_s, count_max=options.keep_count
        )
        return trim_to(self.sealed, self.last_bytes, self.end, keep, now_ns, acked)


def records_in(log: Log) -> Iterator[tuple[int, Header, Any, Any]]:
    """Offset, header, payload, and the columns of its batch."""
    cursor = Cursor(log, log.start)
    while batches := cursor.read(1 << 20):
        assert isinstance(batches, list), batches
        for each in batches:
            columns = columns_of(each.header, each.body)
            for n, payload in enumerate(payloads_of(each.header, each.body)):
                yield each.header.offset + n, each.header, payload, columns
    cursor.close()
