"""A record batch: what is appended, stored and delivered as one. Its layout, and nothing else.

A segment of a log is a head, and then batch after batch with nothing between::

    ┌────────────────┬──────────────────┬─────────────────────────┬──────────
    │ head, 48 bytes │ header, 72 bytes │ body: columns, payloads │ header …
    └────────────────┴──────────────────┴─────────────────────────┴──────────

    head, little endian                             written once, when the segment is made
     0  8s   magic          "MESHLOG\\0"
     8  u32  check          CRC-32 of the 36 bytes that follow
    12  u32  format         1
    16  u64  partition      whose log it is
    24  u64  offset         of its first record
    32  u64  time_ns        when it was made
    40  u32  log epoch      the highest so far
    44  u32  0

    header, little endian
     0  4s   magic          "mREC"
     4  u32  check          CRC-32 of the 64 bytes that follow, begun with the partition's low half
     8  u32  body check     CRC-32 of the body, as its producer made it
    12  u32  body bytes
    16  u32  column bytes   the first part of the body; what follows are the payloads
    20  u32  count          records; 0: a note of the log's own
    24  u64  offset         of the first record
    32  u64  time_ns        when the log took it in, since 1970; never goes back
    40  u64  producer       0: nobody's
    48  u64  seq            its producer's own number of the first record
    56  u32  producer epoch
    60  u32  log epoch      of the opening; higher if something was cut off since
    64  u32  synced         bytes of this segment that were on disk for sure when it was written
    68  u8   codec          of the payloads
    69  u8   flags          see `Flags`
    70  u16  0

The two checks cover everything, the position (`offset`) and whose log it is included: a batch that
a disk has put in the wrong place, or one of another partition inside a payload, is not taken for
the one that belongs there. (All streams of a sidecar have the same partition: one of another stream
is told by its offset alone.) `synced` tells a torn tail from damage: what lies before it was on
disk before this batch was written, so where that does not read well no crash explains it. What a
payload says so of is believed, too: see `mesh.durable.scan.torn`.
A producer sends its batches in this form, with what the log decides left 0.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final
from zlib import crc32

import msgspec

Bytes = bytes | memoryview

FORMAT: Final = 1
HEAD: Final = struct.Struct("<8sIIQQQII")
HEAD_BYTES: Final = HEAD.size
HEAD_MAGIC: Final = b"MESHLOG\0"
HEADER: Final = struct.Struct("<4sIIIIIQQQQIIIBBH")
HEADER_BYTES: Final = HEADER.size
MAGIC: Final = b"mREC"
_CHECK: Final = struct.Struct("<I")
_LOW_HALF: Final = 0xFFFFFFFF
_pack: Final = HEADER.pack
_unpack: Final = HEADER.unpack_from


class Flags:
    """What a batch is besides a number of records."""

    UNIQUE: Final = 1
    """Its one record has a dedup id, or was derived: its columns say so."""
    OPENED: Final = 2
    """No record: a run of `producer` begins under `producer epoch`, its next record being `seq`."""
    REPEATED: Final = 4
    """No record: the one with that `seq` is there already, at the offset and of the time that the
    body says."""
    SNAPSHOT: Final = 8
    """No record: the body is a snapshot of what notes had said, and takes the place of them."""
    ALL: Final = UNIQUE | OPENED | REPEATED | SNAPSHOT


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """How a segment begins."""

    format: int = FORMAT
    partition: int
    offset: int
    time_ns: int
    log_epoch: int


class Header(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a batch says of itself: the fields that are drawn above."""

    body_check: int
    body_bytes: int
    column_bytes: int = 0
    count: int
    offset: int = 0
    time_ns: int = 0
    producer: int = 0
    seq: int = 0
    producer_epoch: int = 0
    log_epoch: int = 0
    synced: int = 0
    codec: int = 0
    flags: int = 0

    @property
    def end(self) -> int:
        """The offset behind its last record."""
        return self.offset + self.count

    @property
    def size(self) -> int:
        """Bytes of the whole batch."""
        return HEADER_BYTES + self.body_bytes


class Batch(msgspec.Struct, frozen=True, gc=False):
    """One as its producer made it: where and when it is, the log says."""

    header: Header
    body: Sequence[Bytes]
    """In as many pieces as is convenient: a large payload is not copied to stand behind others."""


def batch(
    body: Sequence[Bytes],
    *,
    count: int,
    column_bytes: int = 0,
    producer: int = 0,
    seq: int = 0,
    producer_epoch: int = 0,
    codec: int = 0,
    flags: int = 0,
) -> Batch:
    """A batch to append."""
    check = size = 0
    for piece in body:
        check = crc32(piece, check)
        size += memoryview(piece).nbytes
    header = Header(
        body_check=check,
        body_bytes=size,
        column_bytes=column_bytes,
        count=count,
        producer=producer,
        seq=seq,
        producer_epoch=producer_epoch,
        codec=codec,
        flags=flags,
    )
    return Batch(header, body)


def encode(header: Header, partition: int = 0) -> bytes:
    """The header as bytes."""
    packed = _pack(
        MAGIC,
        0,
        header.body_check,
        header.body_bytes,
        header.column_bytes,
        header.count,
        header.offset,
        header.time_ns,
        header.producer,
        header.seq,
        header.producer_epoch,
        header.log_epoch,
        header.synced,
        header.codec,
        header.flags,
        0,
    )
    rest = packed[8:]
    return b"".join((MAGIC, _CHECK.pack(crc32(rest, partition & _LOW_HALF)), rest))


def decode(data: Bytes, at: int = 0, partition: int = 0) -> Header | None:
    """The header that stands there; None if none does, or it is damaged, or another log's."""
    if len(data) - at < HEADER_BYTES:
        return None
    (
        magic,
        check,
        body_check,
        body_bytes,
        column_bytes,
        count,
        offset,
        time_ns,
        producer,
        seq,
        producer_epoch,
        log_epoch,
        synced,
        codec,
        flags,
        rest,
    ) = _unpack(data, at)
    if magic != MAGIC:
        return None
    if check != crc32(memoryview(data)[at + 8 : at + HEADER_BYTES], partition & _LOW_HALF):
        return None
    if flags & ~Flags.ALL or rest or column_bytes > body_bytes:
        return None
    return Header(
        body_check=body_check,
        body_bytes=body_bytes,
        column_bytes=column_bytes,
        count=count,
        offset=offset,
        time_ns=time_ns,
        producer=producer,
        seq=seq,
        producer_epoch=producer_epoch,
        log_epoch=log_epoch,
        synced=synced,
        codec=codec,
        flags=flags,
    )


def encode_head(head: Head) -> bytes:
    """The head of a segment."""
    packed = HEAD.pack(
        HEAD_MAGIC, 0, head.format, head.partition, head.offset, head.time_ns, head.log_epoch, 0
    )
    rest = packed[12:]
    return b"".join((HEAD_MAGIC, _CHECK.pack(crc32(rest)), rest))


def decode_head(data: Bytes) -> Head | None:
    """The head that `data` begins with, of whichever format; None if it is none, or damaged."""
    if len(data) < HEAD_BYTES:
        return None
    magic, check, format, partition, offset, time_ns, log_epoch, _ = HEAD.unpack_from(data)
    if magic != HEAD_MAGIC or check != crc32(memoryview(data)[12:HEAD_BYTES]):
        return None
    return Head(
        format=format, partition=partition, offset=offset, time_ns=time_ns, log_epoch=log_epoch
    )
