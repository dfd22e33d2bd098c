"""Who writes to a partition and how far each has come, so that a repeated append is recognised and
gets its original receipt, across restarts of both sides. No I/O, no clock, no luck.

A producer numbers its records in the partition 0, 1, 2 … and sends them in batches. It has an epoch
that goes up with each of its runs: who still writes under an earlier one is fenced. `open` and
`check` decide and change nothing; `opened` and `appended` note what was written. So the table
follows from the log alone: a snapshot and what was written since make it anew, and so does the
whole log.

What the log has to see to:

- `appended` is called when a batch has been given its offset, in the order of offsets, and before
  the next batch is checked. If the write then fails the table is ahead of the log, and is made anew
  with it. An original named by a repeat may itself still be on its way to the disk.
- `opened` is told what stands in the record of an opening, which is on disk before the producer is
  told. It says where the sequence stood, in case retention removed all that came before.
- A record turned away for its dedup id, or as derived already, has used up its number in the
  producer's sequence: that is written, too, and told to `appended` with the original's offset and
  time, which a retry then gets.

**What is forgotten.** Of each producer the last `limits.PRODUCER_BATCHES` batches are remembered
exactly; a repeat of an earlier one is a `Gap`. Of all producers the `limits.PRODUCERS_MAX` that
wrote last are remembered. The next append of one that was forgotten is from an `Unknown` producer:
nothing is written, and the client opens it anew. So no append is ever doubled in silence; but
whether a batch that was in flight at that time is in the log, nobody can tell any more. Its outcome
is unknown, and who appends it again may have it twice, unless its records have dedup ids or are
derived. No run gets the epoch of an earlier one, though the table no longer knows that one, or the
log has lost its opening: epochs are at least the seconds of the clock, and above those of all that
were forgotten, or lost while the log was open. Only an opening that a crash takes, as it may
without fsync, may have its epoch given once more: if the clock was set back, or was behind the
openings, of which there were more than seconds; or one that a failed sync took before its process
ended, with durability ``interval`` or ``os``: what was appended under it was never durable.

A snapshot, little endian::

     0  4 bytes  magic     "MPRD"
     4  u32      version   1
     8  u32      checksum  CRC-32 of all that follows
    12  u64      length    of the body, in bytes
    20           body      MessagePack, see `Body`

Each batch that is remembered, in `Producer.batches`::

     0  u64  seq      of its first record
     8  u32  count
    12  u64  offset   of its first record
    20  u64  time_ns
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from collections import Counter, OrderedDict
from typing import Final

import msgspec

from mesh import limits
from mesh.durable.dedup_ids import NS_PER_S, DedupIds, Original, UsedId
from mesh.durable.derivations import Derivations, DerivedOutputs, LatestOutput

MAGIC: Final = b"MPRD"
VERSION: Final = 1
_HEADER: Final = struct.Struct("<4sIIQ")
_CHECKED_FROM: Final = 12
_BATCH: Final = struct.Struct("<QIQQ")
_pack_batch: Final = _BATCH.pack
_BATCH_BYTES: Final = _BATCH.size
FIRST_EPOCH_MAX: Final = 1 << 31
"""A clock that is a century ahead leaves room for as many epochs after it."""


class SnapshotDamaged(Exception):
    """These bytes are no snapshot of this version; the text says what is wrong. Never raised to
    users: the log makes the table anew from its batches."""


class NewRun(msgspec.Struct, frozen=True):
    """What a new run of a producer writes under, and the number of its next record."""

    epoch: int
    next_seq: int


class New(msgspec.Struct, frozen=True):
    """Append it."""


class Fenced(msgspec.Struct, frozen=True):
    """A later run of that producer has begun."""

    epoch: int
    current: int

    def __str__(self) -> str:
        return f"epoch {self.epoch} of this producer was ended by epoch {self.current}"


class Unknown(msgspec.Struct, frozen=True):
    """No such producer, or no such epoch of it, is known: open it anew."""

    producer_id: int
    epoch: int

    def __str__(self) -> str:
        return f"producer {self.producer_id:016x} with epoch {self.epoch} is not known here"


class Gap(msgspec.Struct, frozen=True):
    """The batch neither follows the last one nor is, or is part of, one of those remembered."""

    seq: int
    count: int
    next_seq: int

    def __str__(self) -> str:
        last = self.seq + self.count - 1
        if self.seq > self.next_seq:
            return f"records {self.seq:,} to {last:,} came where {self.next_seq:,} is the next"
        return (
            f"records {self.seq:,} to {last:,} came, where {self.next_seq:,} is the next "
            "and no batch that has them is remembered"
        )


Verdict = New | Original | Fenced | Unknown | Gap
"""`Original`: the records of this batch are there already."""
NEW: Final = New()


class Producer(msgspec.Struct, array_like=True):
    """What is kept of one, and written in a snapshot."""

    id: int
    epoch: int
    next_seq: int
    batches: bytearray


class Body(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Of a snapshot. Each list begins with what will be forgotten first."""

    epoch_forgotten_max: int
    producers: list[Producer]
    dedup_ids: list[UsedId]
    derived: list[DerivedOutputs]
    latest: list[LatestOutput]


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Body).decode


class Producers:
    """The producers of one partition, and what else tells a repeated append from a new one."""

    def __init__(self, *, dedup_window_s: float = limits.DEDUP_WINDOW_S) -> None:
        self.forgotten: Counter[str] = Counter()
        """What the bounds cost, by kind, since this table was made."""
        self.dedup_ids = DedupIds(dedup_window_s, self.forgotten)
        self.derivations = Derivations(self.forgotten)
        self._producers: OrderedDict[int, Producer] = OrderedDict()
        """By id; the one idle longest comes first."""
        self._epoch_forgotten_max = 0

    def __len__(self) -> int:
        return len(self._producers)

    # -- What is decided ---------------------------------------------------------------------

    def open(self, producer_id: int, now_ns: int) -> NewRun:
        """What a new run of that producer is to get. It holds once it is written and `opened`."""
        epoch = max(min(now_ns // NS_PER_S, FIRST_EPOCH_MAX), self._epoch_forgotten_max + 1)
        producer = self._producers.get(producer_id)
        if producer is None:
            return NewRun(epoch, 0)
        # Openings behind the one that is known may be lost, while their runs go on.
        return NewRun(max(epoch, producer.epoch + 1), producer.next_seq)

    def check(self, producer_id: int, epoch: int, seq: int, count: int) -> Verdict:
        """What a batch of `count` records, 1 or more, from `seq` on, is to the log."""
        producer = self._producers.get(producer_id)
        if producer is None or epoch > producer.epoch:
            return Unknown(producer_id, epoch)
        if epoch < producer.epoch:
            return Fenced(epoch, producer.epoch)
        if seq == producer.next_seq:
            return NEW
        return _find(producer.batches, seq, count) or Gap(seq, count, producer.next_seq)

    # -- What was written --------------------------------------------------------------------

    def opened(self, producer_id: int, epoch: int, next_seq: int) -> None:
        """The log has the opening of a run, with what `open` said."""
        producer = self._wrote(producer_id, next_seq)
        producer.epoch = epoch

    def appended(
        self, producer_id: int, epoch: int, seq: int, count: int, offset: int, time_ns: int
    ) -> None:
        """The log has that batch, its first record at `offset`."""
        producer = self._wrote(producer_id, seq)
        producer.epoch = epoch
        producer.next_seq = seq + count
        batches = producer.batches
        batches += _pack_batch(seq, count, offset, time_ns)
        if len(batches) > limits.PRODUCER_BATCHES * _BATCH_BYTES:
            del batches[:_BATCH_BYTES]

    def _wrote(self, producer_id: int, seq: int) -> Producer:
        """The producer, as the one that wrote last, whose next record is `seq`."""
        producers = self._producers
        producer = producers.get(producer_id)
        if producer is None:
            producer = producers[producer_id] = Producer(producer_id, 0, seq, bytearray())
            self._bound()
            return producer
        producers.move_to_end(producer_id)
        if seq != producer.next_seq:  # as the log says: part of it was taken out
            producer.next_seq = seq
            producer.batches.clear()
        return producer

    def _bound(self) -> None:
        while len(self._producers) > limits.PRODUCERS_MAX:
            _, idle = self._producers.popitem(last=False)
            self.forgot(idle.epoch)
            self.forgotten["producer"] += 1

    def forgot(self, epoch: int) -> None:
        """No run gets an epoch up to that one any more, whatever the log has of them."""
        self._epoch_forgotten_max = max(self._epoch_forgotten_max, epoch)

    # -- Snapshots ---------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """All of it: with what is appended and opened from here on, the same table again."""
        body = _encode(
            Body(
                self._epoch_forgotten_max,
                list(self._producers.values()),
                list(self.dedup_ids),
                self.derivations.outputs(),
                self.derivations.latest(),
            )
        )
        header = _HEADER.pack(MAGIC, VERSION, 0, len(body))
        checksum = zlib.crc32(body, zlib.crc32(header[_CHECKED_FROM:]))
        return _HEADER.pack(MAGIC, VERSION, checksum, len(body)) + body

    @classmethod
    def restore(
        cls, snapshot: bytes, *, dedup_window_s: float = limits.DEDUP_WINDOW_S
    ) -> Producers:
        """The table that `snapshot` was taken of. Raises `SnapshotDamaged`."""
        body = _read(snapshot)
        table = cls(dedup_window_s=dedup_window_s)
        table._epoch_forgotten_max = body.epoch_forgotten_max
        table._producers.update((producer.id, producer) for producer in body.producers)
        table._bound()
        table.dedup_ids.restore(body.dedup_ids)
        table.derivations.restore(body.derived, body.latest)
        return table


def _find(batches: bytearray, seq: int, count: int) -> Original | None:
    """Where those records are, if one batch has them all; sequences ascend."""

    def seq_of(index: int) -> int:
        first: int = _BATCH.unpack_from(batches, index * _BATCH_BYTES)[0]
        return first

    size = len(batches) // _BATCH_BYTES
    index = bisect_right(range(size), seq, key=seq_of) - 1
    if index >= 0:
        first, length, offset, time_ns = _BATCH.unpack_from(batches, index * _BATCH_BYTES)
        if seq + count <= first + length:
            return Original(offset + seq - first, time_ns)
    return None


def _read(snapshot: bytes) -> Body:
    """The body of a snapshot, which is what was written, to the bit."""
    if len(snapshot) < _HEADER.size:
        raise SnapshotDamaged(
            f"a snapshot of {len(snapshot):,} bytes is shorter than its header of {_HEADER.size}"
        )
    magic, version, checksum, length = _HEADER.unpack_from(snapshot)
    if magic != MAGIC:
        raise SnapshotDamaged(f"it begins with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise SnapshotDamaged(f"version {version:,}, where {VERSION} is known")
    rest = len(snapshot) - _HEADER.size
    if rest != length:
        raise SnapshotDamaged(f"a body of {rest:,} bytes, where the header says {length:,}")
    checked = memoryview(snapshot)[_CHECKED_FROM:]
    if (found := zlib.crc32(checked)) != checksum:
        raise SnapshotDamaged(f"checksum {found:08x}, where the header says {checksum:08x}")
    try:
        body = _decode(checked[_HEADER.size - _CHECKED_FROM :])
    except msgspec.MsgspecError as error:
        raise SnapshotDamaged(f"its body is none: {error}") from None
    for producer in body.producers:
        if len(producer.batches) % _BATCH_BYTES:
            raise SnapshotDamaged(
                f"{len(producer.batches):,} bytes of batches, where each has {_BATCH_BYTES}"
            )
    return body
