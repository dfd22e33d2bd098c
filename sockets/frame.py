"""Wire format v1: the layout of a frame, and nothing else. docs/wire.md draws the same.

A frame is one ZeroMQ message part::

    ┌───────────────────┬───┬────────────────────┬──────┐
    │ name, UTF-8       │ 0 │ header, 36 bytes   │ body │
    └───────────────────┴───┴────────────────────┴──────┘

    header, little endian
     0  u8   version      1
     1  u8   kind         `Kind`
     2  u8   codec        `Codec` of the payload
     3  u8   flags        `Flag`
     4  u32  count        messages in the body
     8  u64  sender       incarnation of the sending node
    16  u64  seq          sequence of the first message; what it counts depends on the kind
    24  u64  time_ns      wall clock of the sender, nanoseconds since 1970
    32  u32  remaining    REQUEST: milliseconds the caller still waits, 0xffffffff for ever;
                          in queues: the account number

The name comes first because ZeroMQ's subscriptions filter by it, and ends with a zero byte so that
``a`` is not a prefix of ``ab``. A channel's name begins with ``/`` here, a subscriber's own address
with ``@``. With `Flag.DETACHED` the one payload, or the bytes of one array in it, are a second
message part, so that a large buffer need not be copied to stand behind its header.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from mesh import limits

VERSION: Final = 1
HEADER: Final = struct.Struct("<BBBBIQQQI")
"""Whole, and below in parts for those who read or write some of it. Who does so for each message
binds the method (`_pack = REST.pack`): CPython 3.11 calls one of an imported name the slow way."""
HEADER_BYTES: Final = HEADER.size
BEGINNING: Final = struct.Struct("<BBBBI")
"""Version, kind, codec, flags, count: mostly known before a frame is written or read."""
REST: Final = struct.Struct("<QQQI")
"""Sender, seq, time, remaining."""
NUMBER: Final = struct.Struct("<Q")
"""The sender by itself, or the seq."""
SEQ_AND_TIME: Final = struct.Struct("<QQ")
TIME_AND_REMAINING: Final = struct.Struct("<QI")
assert (
    HEADER.format
    == BEGINNING.format + REST.format[1:]
    == BEGINNING.format + NUMBER.format[1:] + NUMBER.format[1:] + TIME_AND_REMAINING.format[1:]
    == BEGINNING.format + NUMBER.format[1:] + SEQ_AND_TIME.format[1:] + "I"
), "one layout"
SEQ_AT: Final = BEGINNING.size + NUMBER.size
SEQ_END: Final = 1 << 63
"""Below that is every sequence."""
FOR_EVER: Final = 0xFFFFFFFF
QUESTION: Final = b"?"
"""A subscription to this and a subscriber's address asks for a mark there."""


CUT_OFF: Final = b""
"""Instead of the last part of a message whose sender was interrupted in its midst."""

Part = bytes | memoryview
"""Of a ZeroMQ message."""


class Kind:
    """What a frame is. Plain integers, here and below: an enum costs more than the comparison."""

    DATA: Final = 1
    """Messages of a topic, or tasks of a queue."""
    MARK: Final = 2
    """Where sequences stand: to one subscriber (answering its subscription) or on a topic."""
    LAST: Final = 3
    """To one newcomer: the last message of a topic, with its original sequence and time."""
    REQUEST: Final = 4
    REPLY: Final = 5
    ERROR: Final = 6
    CANCEL: Final = 7
    CREDIT: Final = 8
    """To a pusher: `seq` tasks of yours, counted from the first, are off this worker's hands."""
    CONTROL: Final = 9
    """One message of `mesh.sockets.control`."""
    PAD: Final = 10
    """Nothing: sent after a large frame, so that high-water marks, which count frames, count it for
    what it weighs."""


class Codec:
    """What payloads are encoded in."""

    RAW: Final = 0
    """The payload is bytes as they are (only with `Flag.DETACHED`)."""
    MSGPACK: Final = 1
    """The body is a MessagePack array of payloads. With `Flag.DETACHED` it lacks the bytes of one
    array."""


class Flag:
    """Bits."""

    HEADERS: Final = 1
    """The array alternates payload, headers, payload, headers …"""
    DETACHED: Final = 2
    """There is a second message part: the payload (`Codec.RAW`; the body holds its headers, if
    any), or the bytes of an array in it."""
    LZ4: Final = 4
    """The body, or with `DETACHED` the second part, is an LZ4 frame with content size and content
    checksum."""
    WAITS: Final = 8
    """From the sockets of topics that wait, whose sequences and marks are apart from the others."""


KINDS: Final = frozenset(range(Kind.DATA, Kind.PAD + 1))
CODECS: Final = frozenset((Codec.RAW, Codec.MSGPACK))
_ALL_FLAGS: Final = Flag.HEADERS | Flag.DETACHED | Flag.LZ4 | Flag.WAITS
_COPY_MAX: Final = 4096
"""Up to here a copy costs less than a view."""
_DETACHED: Final = Flag.DETACHED
_RAW: Final = Codec.RAW
_COUNT_MAX: Final = limits.FRAME_MESSAGES_MAX
NAME_MAX: Final = limits.SUBSCRIPTION_BYTES_MAX
"""Where the zero byte behind a name is at the latest."""
_CODEC_AT: Final = 3
_FLAGS_AT: Final = 4
"""From the zero byte that ends the name."""
_unpack_header: Final = HEADER.unpack_from


class Malformed(Exception):
    """What came from a socket is no frame; `reason` is the counter it goes under. Never raised to
    users: a peer's fault is dropped and counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Frame:
    """A frame as received: header fields, and the body not yet decoded."""

    __slots__ = (
        "body",
        "codec",
        "count",
        "detached",
        "flags",
        "kind",
        "name",
        "remaining",
        "sender",
        "seq",
        "size",
        "time_ns",
    )

    name: bytes
    kind: int
    codec: int
    flags: int
    count: int
    sender: int
    seq: int
    time_ns: int
    remaining: int
    body: Part
    detached: Part | None
    size: int
    """Bytes of payload and headers, as they came: compressed, if they were."""


def encode(
    name: bytes,
    kind: int,
    body: bytes,
    *,
    codec: int = Codec.MSGPACK,
    flags: int = 0,
    count: int = 1,
    sender: int,
    seq: int,
    time_ns: int = 0,
    remaining: int = 0,
) -> bytes:
    """The first (mostly only) part of a frame. `name` ends with its zero byte, see `wire_name`."""
    header = HEADER.pack(
        VERSION, kind, codec, flags, count, sender, seq, time_ns & (1 << 64) - 1, remaining
    )
    return b"".join((name, header, body))


def decode(parts: Sequence[Part]) -> Frame:
    """The frame in `parts`, its header checked and bounded. Raises `Malformed`."""
    if parts[-1] == CUT_OFF:
        raise Malformed("cut off")
    first = bytes(parts[0])
    end = first.find(b"\0", 0, NAME_MAX)
    body_at = end + 1 + HEADER_BYTES
    if end < 0 or len(first) < body_at:
        raise Malformed("malformed")
    version, kind, codec, flags, count, sender, seq, time_ns, remaining = _unpack_header(
        first, end + 1
    )
    if version != VERSION:
        raise Malformed("version")
    detached = flags & _DETACHED
    if (
        kind not in KINDS
        or codec not in CODECS
        or flags & ~_ALL_FLAGS
        or not 1 <= count <= _COUNT_MAX
        or seq >= SEQ_END
        or (codec == _RAW and not detached)
        or len(parts) != (2 if detached else 1)
        or (detached and count != 1)
    ):
        raise Malformed("malformed")
    frame = Frame()
    frame.name = first[: end + 1]
    frame.kind = kind
    frame.codec = codec
    frame.flags = flags
    frame.count = count
    frame.sender = sender
    frame.seq = seq
    frame.time_ns = time_ns
    frame.remaining = remaining
    frame.body = first[body_at:] if len(first) < _COPY_MAX else memoryview(first)[body_at:]
    frame.detached = second = parts[1] if detached else None
    frame.size = len(first) - body_at + len(second or b"")
    return frame


def announces_more(first: bytes) -> bool:
    """Whether a second part belongs to it, if all is well."""
    end = first.find(b"\0", 0, NAME_MAX)
    return 0 <= end < len(first) - _FLAGS_AT and first[end + _FLAGS_AT] & _DETACHED != 0


_CODEC_OF_ARRAYS: Final = bytes((Codec.MSGPACK,))
_PAD: Final = HEADER.pack(VERSION, Kind.PAD, Codec.MSGPACK, 0, 1, 0, 0, 0, 0)


def pad(name: bytes) -> bytes:
    """A frame that holds nothing."""
    return name + _PAD


def is_array(part: Part) -> bool:
    """Whether the part that follows this one is the bytes of an array, if all is well."""
    end = bytes(part).find(b"\0", 0, NAME_MAX)
    return part[end + _CODEC_AT : end + _FLAGS_AT] == _CODEC_OF_ARRAYS


def is_pad(part: Part) -> bool:
    """Whether that is one: told by a glance, since many may follow a large frame."""
    part = bytes(part)
    return part.endswith(_PAD) and part.find(b"\0") == len(part) - len(_PAD) - 1


def wire_name(channel: str) -> bytes:
    """A channel's name as it stands in frames."""
    return b"/" + channel.encode() + b"\0"


def channel_name(name: bytes) -> str | None:
    """The channel that a frame's name stands for; None if it names none."""
    if name[:1] != b"/":
        return None
    try:
        return name[1:-1].decode()
    except UnicodeDecodeError:
        return None


def subscriber_address(token: str, pattern: str) -> bytes:
    """What a subscriber subscribes to besides its pattern, so that a publisher can answer it alone.

    The address names the pattern, so the publisher knows which topics it is about.
    """
    return b"@" + token.encode() + b":" + pattern.encode() + b"\0"


def pattern_of(address: bytes) -> str | None:
    """The pattern that a subscriber's address names; None if it is not an address."""
    token, colon, pattern = address[1:-1].partition(b":")
    if address[:1] != b"@" or address[-1:] != b"\0" or not colon or len(token) != 16:
        return None
    try:
        token.decode("ascii")
        return pattern.decode()
    except UnicodeDecodeError:
        return None


def subscriptions(prefix: str, open_ended: bool) -> list[bytes]:
    """What to subscribe to in ZeroMQ for a pattern's literal prefix (`names.literal_prefix`)."""
    if not open_ended:
        return [wire_name(prefix)]
    if not prefix:
        return [b"/"]
    exact = wire_name(prefix)
    return [exact, exact[:-1] + b"/"]
