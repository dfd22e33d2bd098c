"""What streams and sidecars say to each other: typed messages, strictly validated. No I/O.

Each travels as the one payload, `bytes`, of a request or of its answer (`mesh.sockets.server`), as
a MessagePack array whose first item names the message. A batch is in there as it will stand in the
log (`mesh.durable.batch`): its producer's own check covers it from end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final
from zlib import crc32

import msgspec

from mesh import limits
from mesh.durable.batch import HEADER_BYTES, Batch, Flags, Header, decode, encode
from mesh.durable.deliveries import AskedOptions, Delivery, Settlements
from mesh.durable.group import GroupOptions
from mesh.durable.outcomes import Appended, Opened, Refused
from mesh.durable.records import may_be_read
from mesh.errors import PayloadTooLarge
from mesh.message import StreamStats
from mesh.options import StreamOptions
from mesh.sockets.frame import Malformed

Text = Annotated[str, msgspec.Meta(max_length=255)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Raw = bytes | memoryview


class Wire(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The root of the messages."""


# -- What streams ask


class Open(Wire, frozen=True, tag="O"):
    """A run of a producer begins. The stream is made if there is none. → `Opened`"""

    stream: Text
    producer: Natural
    options: StreamOptions | None = None
    """None: whichever the stream has."""


class Append(Wire, frozen=True, tag="A"):
    """→ `Appended`, `Refused`"""

    stream: Text
    batch: memoryview


class Find(Wire, frozen=True, tag="F"):
    """Where a stream's partition begins, ends, and has the first record of a time. → `Place`"""

    stream: Text
    time_ns: Natural | None = None


class Read(Wire, frozen=True, tag="R"):
    """Records from an offset on; where there are none yet, once there are, or after `wait_ms`.
    → `Batches`"""

    stream: Text
    offset: Natural
    bytes_max: Natural = limits.READ_BYTES
    """About so many; at least one batch, if there is one."""
    wait_ms: Annotated[int, msgspec.Meta(ge=0, le=limits.READ_WAIT_MS_MAX)] = 0
    log_epoch: Natural = 0
    """The log's when what is below `offset` was read. 0: not known."""
    message_bytes_max: Natural = limits.MESSAGE_BYTES_MAX
    """What who asks lets in. A batch by itself may be as large."""


class Inspect(Wire, frozen=True, tag="I"):
    """How a stream's partition is. → `Inspected`"""

    stream: Text


class Join(Wire, frozen=True, tag="J"):
    """A member of a group comes, or says anew how many records it may hold. → `Joined`"""

    stream: Text
    group: Text
    member: Text
    """Begins with the id of its node."""
    prefetch: Annotated[int, msgspec.Meta(ge=1, le=limits.PREFETCH_MAX)]
    options: AskedOptions = AskedOptions()
    from_ns: Natural | None = None
    """A new group begins with the first record of that time or later. None: with the first."""
    resume: Natural | None = None
    """All below that offset is done with: its member keeps account of that. None: it does not."""
    log_epoch: Natural = 0
    """The log's when this member joined before. 0: it did not."""
    said: Natural = 0
    """Number of the last `Settle` before this."""
    message_bytes_max: Natural = limits.MESSAGE_BYTES_MAX
    """As in `Read`."""


class Fetch(Wire, frozen=True, tag="G"):
    """What a member is to get; where there is nothing, once there is, or after `wait_ms`.
    → `Delivered`, `Refused` with ``unknown`` if it has to join (again)"""

    stream: Text
    group: Text
    member: Text
    number: Natural
    """Of this question: asked again, it gets the same answer."""
    wait_ms: Annotated[int, msgspec.Meta(ge=0, le=limits.READ_WAIT_MS_MAX)] = 0


class Settle(Wire, frozen=True, tag="S"):
    """What a member says of records. → `Settled`"""

    stream: Text
    group: Text
    member: Text
    log_epoch: Natural
    """The log's when this member joined."""
    said: Settlements
    leave: bool = False
    """It goes, and what it holds otherwise is for others."""
    number: Natural = 0
    """Which of this member's it is."""
    fetched: Natural = 0
    """Number of the last `Fetch` whose answer it has seen, from who leaves."""


def room_for_settlements(stream: str, group: str, member: str, message_bytes_max: int) -> int:
    """In a `Settle` of that member."""
    most = (1 << 64) - 1
    nothing = Settle(stream, group, member, most, Settlements(), True, most, most)
    return message_bytes_max - len(encode_message(nothing)) - _LENGTHS_BYTES


def room_for_many_batches(message_bytes_max: int) -> int:
    """In an answer, which has more in it."""
    return message_bytes_max - message_bytes_max // 16


def room_for_a_batch(message_bytes_max: int) -> int:
    """In an answer that has no other."""
    return message_bytes_max - _AROUND_BYTES


def check_room(header: Header, message_bytes_max: int) -> None:
    """Raises `PayloadTooLarge` if an answer that has that batch alone is more than who asks lets
    in: it would end their connection."""
    if header.size > room_for_a_batch(message_bytes_max):
        records = f"records {header.offset} to {header.end - 1}"
        text = f"a batch of {header.size:,} bytes, with {records}, has no room within the limit"
        raise PayloadTooLarge(
            f"{text} of {message_bytes_max:,} of who reads it (option message_bytes_max)"
        )


# -- What sidecars answer


class Place(Wire, frozen=True, tag="P"):
    start: Natural
    end: Natural
    """Behind the last record that may be read."""
    offset: Natural
    """Of the first record of that time or later."""
    log_epoch: Natural


class Batches(Wire, frozen=True, tag="B"):
    """The first may begin before what was asked for."""

    batches: list[memoryview]
    end: Natural
    """Of what may be read."""
    log_epoch: Natural
    """For the next `Read`."""
    gap_end: Natural = 0
    """Records before this are gone, where some of these were asked for."""
    cut_at: Natural | None = None
    """From there on it is not what was read before."""


class Inspected(Wire, frozen=True, tag="i"):
    stats: StreamStats


class Joined(Wire, frozen=True, tag="j"):
    options: GroupOptions
    committed: Natural
    log_epoch: Natural
    cut_at: Natural | None = None
    """From there on it is not what was delivered before."""


class Delivered(Wire, frozen=True, tag="d"):
    delivery: Delivery
    gaps: tuple[tuple[int, int, int], ...] = ()
    """What retention took from the group unsettled: first, last, and how many."""
    heard: Natural = 0
    """Number of the last `Settle` that had come from this member."""


class Settled(Wire, frozen=True, tag="s"):
    """It is remembered."""

    committed: Natural
    """All records of the group below that are settled."""


Query = Open | Append | Find | Read | Inspect | Join | Fetch | Settle
Reply = Opened | Appended | Refused | Place | Batches | Inspected | Joined | Delivered | Settled

Answer = Callable[[Reply], object]
"""Called once with what a question is answered, in whichever thread knows that."""

_LENGTHS_BYTES: Final = 5 * len(Settlements.__struct_fields__)
_encode: Final = msgspec.msgpack.Encoder().encode
_MOST: Final = ((1 << 64) - 1,) * 3
_AROUND_BYTES: Final = len(_encode(Delivered(Delivery((_MOST,), (b"",)), (_MOST,), _MOST[0]))) + 10
"""Around a batch that is delivered alone; the lengths of it and of the answer take 5 bytes each."""
_decode_query: Final = msgspec.msgpack.Decoder(Query).decode
_decode_reply: Final = msgspec.msgpack.Decoder(Reply).decode


def encode_message(message: Query | Reply) -> bytes:
    return _encode(message)


def decode_query(data: Raw) -> Query:
    """Raises `Malformed`."""
    try:
        return _decode_query(data)  # type: ignore[no-any-return]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError) as error:
        raise Malformed("malformed") from error


def decode_reply(data: Raw) -> Reply:
    """Raises `Malformed`."""
    try:
        return _decode_reply(data)  # type: ignore[no-any-return]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError) as error:
        raise Malformed("malformed") from error


def pack_batch(new: Batch) -> bytes:
    """For `Append`."""
    return b"".join((encode(new.header), *new.body))


def unpack_batch(data: memoryview) -> Batch:
    """What a producer sent, as it made it. Raises `Malformed`."""
    header = decode(data)
    if header is None or len(data) != header.size:
        raise Malformed("malformed")
    body = data[HEADER_BYTES:]
    if (
        not 1 <= header.count <= limits.BATCH_RECORDS_MAX
        or header.flags & ~Flags.UNIQUE
        or not header.producer
        or crc32(body) != header.body_check
        or not may_be_read(header, body)
    ):
        raise Malformed("malformed")
    return Batch(header, (body,))


def read_batch(data: memoryview, partition: int) -> tuple[Header, memoryview]:
    """A batch as it stands in the log of that partition. Raises `Malformed`."""
    header = decode(data, partition=partition)
    if header is None or len(data) != header.size:
        raise Malformed("malformed")
    body = data[HEADER_BYTES:]
    if crc32(body) != header.body_check:
        raise Malformed("malformed")
    return header, body
