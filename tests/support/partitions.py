"""Partitions on a disk in memory: producers that append to them, and what they must hold then."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mesh.durable.batch import Batch
from mesh.durable.cursor import Cursor
from mesh.durable.outcomes import Appended, Opened, Outcome
from mesh.durable.partition import Opening, Partition
from mesh.durable.records import Derived, NewRecord, batch_of, payloads_of
from mesh.durable.storage import Storage
from mesh.options import StreamOptions
from mesh.sockets import codec

PARTITION = 0x0123456789ABCDEF
SECOND_NS = 1_000_000_000


def open_partition(
    storage: Storage, options: StreamOptions | None = None, *, segment_bytes: int = 1000
) -> Partition:
    return Partition(
        storage, PARTITION, options or StreamOptions(), now_ns=0, segment_bytes=segment_bytes
    )


def record(
    payload: object, *, dedup_id: bytes | None = None, derived: Derived | None = None
) -> NewRecord:
    return NewRecord(codec.pack(payload), dedup_id=dedup_id, derived=derived)


def numbered(batch: Batch, producer: int, epoch: int, seq: int) -> Batch:
    """The batch as that producer sends it."""
    header = msgspec.structs.replace(batch.header, producer=producer, producer_epoch=epoch, seq=seq)
    return Batch(header, batch.body)


class Writing:
    """One run of a producer, which numbers what it appends."""

    def __init__(self, partition: Partition, producer: int, now_ns: int = 0) -> None:
        opened = only(partition.commit([Opening(producer)], now_ns))
        assert isinstance(opened, Opened), opened
        self.partition = partition
        self.producer = producer
        self.epoch = opened.epoch
        self.seq = opened.seq

    def batch(self, *records: NewRecord) -> Batch:
        """The next one."""
        new = numbered(batch_of(records), self.producer, self.epoch, self.seq)
        self.seq += len(records)
        return new

    def append(self, *payloads: object, now_ns: int = 0) -> Appended:
        """All of them in one batch."""
        new = self.batch(*map(record, payloads))
        return appended(self.partition.commit([new], now_ns))


def only(outcomes: Sequence[Outcome]) -> Outcome:
    (outcome,) = outcomes
    return outcome


def appended(outcomes: Sequence[Outcome]) -> Appended:
    outcome = only(outcomes)
    assert isinstance(outcome, Appended), outcome
    return outcome


def payloads(partition: Partition, offset: int | None = None) -> list[object]:
    """Of all records that a reader gets, from there on."""
    log = partition.log
    cursor, read = Cursor(log, log.start if offset is None else offset), []
    while found := cursor.read(1 << 20):
        assert isinstance(found, list), found
        for each in found:
            if each.header.count:
                read += payloads_of(each.header, each.body)
    cursor.close()
    return read
