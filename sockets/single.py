"""A frame with one message: how requests, answers and cancellations travel.

The same layout as any frame (`mesh.sockets.frame`), written and read the short way: a round trip
pays four times what a batch of hundreds spreads over all of them, each time right after a wake-up,
when everything costs two or three times as much. A *plain* message (no headers, no LZ4, no part of
its own) is the `bytes` of its body; its frame begins with bytes that are known beforehand. What is
out of the ordinary goes the general way. Encoded in its sender's thread, before any lock is taken.
Knows frames, not sockets.
"""

from __future__ import annotations

import struct
import threading
from typing import Any, Final

import msgpack

from mesh import limits
from mesh.errors import PayloadTooLarge
from mesh.sockets import codec
from mesh.sockets.frame import HEADER, VERSION, Codec, Flag, Frame, Kind, Malformed, decode
from mesh.sockets.outgoing import DETACH_BYTES_MIN

# As plain integers: an operation on an enum member costs more than all the rest here.
REQUEST: Final = int(Kind.REQUEST)
REPLY: Final = int(Kind.REPLY)
ERROR: Final = int(Kind.ERROR)
CANCEL: Final = int(Kind.CANCEL)
_MSGPACK: Final = int(Codec.MSGPACK)
_RAW: Final = int(Codec.RAW)
_HEADERS: Final = int(Flag.HEADERS)
_DETACHED: Final = int(Flag.DETACHED)
_LZ4: Final = int(Flag.LZ4)

_BEGINNING: Final = struct.Struct("<BBBBI")
"""Version, kind, codec, flags, count: known beforehand."""
_REST: Final = struct.Struct("<QQQI")
"""Sender, seq, time, remaining. With the beginning it makes `HEADER`."""
assert _BEGINNING.size + _REST.size == HEADER.size
_SEQ_END: Final = 1 << 63

_unpack: Final = msgpack.unpackb
_QUICK: Final = frozenset({bytes, str, int, float, bool, type(None)})
_ARRAY_OF_ONE: Final = b"\x91"
_NOT_SCALAR: Final = frozenset(
    [*range(0x80, 0xA0), 0xC1, *range(0xC7, 0xCA), *range(0xD4, 0xD9), *range(0xDC, 0xE0)]
)
"""First bytes of what MessagePack nests or extends, or never uses: to be decoded within bounds."""


class _Own(threading.local):
    """A packer for each thread: one packer must not be used by two at a time."""

    def __init__(self) -> None:
        self.pack = msgpack.Packer(use_bin_type=True, autoreset=True).pack


_own = _Own()


class Special:
    """A message that is not plain, encoded: as often as it is sent."""

    __slots__ = ("_body", "_codec", "_detached", "_flags", "_packed")

    def __init__(self, body: bytes, detached: bytes | None = None, flags: int = 0) -> None:
        self._body = body
        self._detached = detached
        self._codec = _MSGPACK if detached is None else _RAW
        self._flags = flags
        self._packed: bytes | None = b""
        """The body compressed, None if that does not pay; empty before it was tried."""

    def __len__(self) -> int:
        """Bytes of payload and headers, before compression."""
        return len(self._body) + len(self._detached or b"")

    def parts(
        self, name: bytes, kind: int, sender: int, seq: int, remaining: int, compressed: bool
    ) -> list[bytes]:
        body, flags = self._body, self._flags
        if compressed and self._detached is None:
            if self._packed == b"":
                self._packed = codec.compress(body)
            if self._packed:
                body, flags = self._packed, flags | _LZ4
        head = HEADER.pack(VERSION, kind, self._codec, flags, 1, sender, seq, 0, remaining)
        first = name + head + body
        return [first] if self._detached is None else [first, self._detached]


Message = bytes | Special
"""Encoded. A plain one is its body."""


def encode(payload: Any, headers: codec.Headers | None, bytes_max: int) -> Message:
    """Encode `payload`. Raises `NotSerializable`; `PayloadTooLarge` beyond `bytes_max`, or for
    headers that a frame has no room for."""
    if not headers and type(payload) in _QUICK:
        try:
            body: bytes = _ARRAY_OF_ONE + _own.pack(payload)
        except (ValueError, OverflowError):
            pass  # it has no form: told below
        else:
            if len(body) < limits.COMPRESS_BYTES_MIN and len(body) <= bytes_max:
                return body
    packed_headers = codec.pack_headers(headers) if headers else None
    detached = type(payload) is bytes and len(payload) >= DETACH_BYTES_MIN
    packed: bytes = payload if detached else codec.pack(payload)
    size = len(packed)
    if size > bytes_max:
        raise PayloadTooLarge(
            f"payload of {size:,} bytes over the limit of {bytes_max:,} (option message_bytes_max)"
        )
    if packed_headers is None:
        if detached:
            return Special(b"", packed, _DETACHED)
        body = _ARRAY_OF_ONE + packed
        return body if size < limits.COMPRESS_BYTES_MIN else Special(body)
    if len(packed_headers) > limits.HEADERS_BYTES_MAX:
        raise PayloadTooLarge(
            f"headers of {len(packed_headers):,} bytes over the limit of "
            f"{limits.HEADERS_BYTES_MAX:,}"
        )
    if detached:
        return Special(packed_headers, packed, _HEADERS | _DETACHED)
    return Special(codec.pack_body([packed], [packed_headers]), None, _HEADERS)


class Writer:
    """Frames messages of one kind, of one sender, on one channel."""

    __slots__ = ("_beginning", "_kind", "_name", "_sender")

    def __init__(self, name: bytes, kind: int, sender: int) -> None:
        self._name = name
        self._kind = kind
        self._sender = sender
        self._beginning = _beginning(name, kind)

    def parts(
        self, message: Message, seq: int, remaining: int = 0, compressed: bool = False
    ) -> list[bytes]:
        """The ZeroMQ message. `compressed`: by LZ4, where that pays (for tcp)."""
        if type(message) is bytes:
            return [self._beginning + _REST.pack(self._sender, seq, 0, remaining) + message]
        assert type(message) is Special
        name, kind, sender = self._name, self._kind, self._sender
        return message.parts(name, kind, sender, seq, remaining, compressed)


class Reader:
    """Reads frames of one kind, on one channel: such as are plain, quickly."""

    __slots__ = ("_beginning", "_body_at", "_rest_at")

    def __init__(self, name: bytes, kind: int) -> None:
        self._beginning = _beginning(name, kind)
        self._rest_at = len(self._beginning)
        self._body_at = self._rest_at + _REST.size

    def read(self, part: bytes) -> tuple[int, int, int, bytes] | None:
        """(sender, seq, remaining, message) of a frame that is this part alone; None if it is not
        plain, or nothing that is read here: see `receive`."""
        if not part.startswith(self._beginning) or len(part) < self._body_at:
            return None
        sender, seq, _, remaining = _REST.unpack_from(part, self._rest_at)
        return (sender, seq, remaining, part[self._body_at :]) if seq < _SEQ_END else None


def receive(parts: list[bytes], name: bytes) -> Frame:
    """The frame of one message on the channel `name`, whatever it is. Raises `Malformed`."""
    frame = decode(parts)
    if frame.name != name or frame.count != 1:
        raise Malformed("malformed")
    return frame


def payload_of(message: bytes | Frame, bytes_max: int) -> Any:
    """The payload in a frame, or in the body of one that is plain. Raises `Malformed`."""
    if type(message) is not bytes:
        assert type(message) is Frame
        payloads, _ = codec.unpack_frame(message, bytes_max)
        return payloads[0]
    if message[:1] != _ARRAY_OF_ONE or len(message) < 2:
        raise Malformed("malformed")
    if message[1] in _NOT_SCALAR:
        items = codec.unpack(
            message, depth_max=limits.DEPTH_MAX + 1, containers_max=limits.CONTAINERS_MAX + 2
        )
        if type(items) is not list or len(items) != 1:
            raise Malformed("malformed")
        return items[0]
    try:
        return _unpack(message[1:])
    except (ValueError, msgpack.UnpackException) as error:
        raise Malformed("malformed") from error


def _beginning(name: bytes, kind: int) -> bytes:
    return name + _BEGINNING.pack(VERSION, kind, _MSGPACK, 0, 1)
