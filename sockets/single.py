"""A frame with one message: how requests, answers and cancellations travel.

The same layout as any frame (`mesh.sockets.frame`), written and read the short way: a round trip
pays four times what a batch of hundreds spreads over all of them, each time right after a wake-up,
when everything costs two or three times as much. A *plain* message (no headers, no LZ4, no part of
its own) is the `bytes` of its body; its frame begins with bytes that are known beforehand. What is
out of the ordinary goes the general way. Encoded in its sender's thread, before any lock is taken.
Knows frames, not sockets.
"""

from __future__ import annotations

from typing import Any, Final

import msgpack

from mesh import limits
from mesh.sockets import codec
from mesh.sockets.compression import Compression
from mesh.sockets.frame import (
    BEGINNING,
    REST,
    SEQ_END,
    VERSION,
    Codec,
    Frame,
    Kind,
    Malformed,
    Part,
    decode,
)
from mesh.sockets.outgoing import Outgoing, encode_message

REQUEST: Final = Kind.REQUEST
REPLY: Final = Kind.REPLY
ERROR: Final = Kind.ERROR
CANCEL: Final = Kind.CANCEL

_pack_rest: Final = REST.pack
_unpack_rest: Final = REST.unpack_from
_unpack: Final = msgpack.unpackb
QUICK: Final = frozenset({bytes, str, int, float, bool, type(None)})
ARRAY_OF_ONE: Final = b"\x91"
_NOT_SCALAR: Final = frozenset(
    [*range(0x80, 0xA0), 0xC1, *range(0xC7, 0xCA), *range(0xD4, 0xD9), *range(0xDC, 0xE0)]
)
"""First bytes of what MessagePack nests or extends, or never uses: to be decoded within bounds."""


_BIN8: Final = 0xC4
_BODY_OF: Final = [ARRAY_OF_ONE + bytes((_BIN8, size)) for size in range(256)]
"""What stands before `bytes` of a size in a body that holds nothing else."""


def quick_body(payload: Any) -> bytes:
    """The body for a payload of a `QUICK` type. Raises `ValueError`, `OverflowError`."""
    if type(payload) is bytes and len(payload) < 256:
        return _BODY_OF[len(payload)] + payload
    packed: bytes = codec.packers.pack(payload)
    return ARRAY_OF_ONE + packed


Message = bytes | Outgoing
"""Encoded. A plain one is its body."""


def encode(payload: Any, headers: codec.Headers | None, bytes_max: int) -> Message:
    """Encode `payload`. Raises `NotSerializable`; `PayloadTooLarge` beyond `bytes_max`, or for
    headers that a frame has no room for."""
    if not headers and type(payload) in QUICK:
        try:
            body = quick_body(payload)
        except (ValueError, OverflowError):
            pass  # it has no form: told below
        else:
            if len(body) < limits.COMPRESS_BYTES_MIN and len(body) <= bytes_max:
                return body
    message = encode_message(payload, headers, bytes_max)
    if message.flags or len(message.body) >= limits.COMPRESS_BYTES_MIN:
        return message
    return message.body


class Writer:
    """Frames messages of one kind, of one sender, on one channel."""

    __slots__ = ("_beginning", "_kind", "_name", "_sender")

    def __init__(self, name: bytes, kind: int, sender: int) -> None:
        self._name = name
        self._kind = kind
        self._sender = sender
        self._beginning = beginning(name, kind)

    def parts(
        self,
        message: Message,
        seq: int,
        remaining: int = 0,
        compression: Compression | None = None,
    ) -> list[Part]:
        """The ZeroMQ message. `compression`: what decides whether to compress it, for tcp."""
        if type(message) is bytes:
            return [self.frame(message, seq, remaining)]
        assert type(message) is Outgoing
        return message.parts(
            self._name,
            self._kind,
            sender=self._sender,
            seq=seq,
            remaining=remaining,
            compression=compression,
        )

    def frame(self, message: bytes, seq: int, remaining: int = 0) -> bytes:
        """The only part of one that is plain."""
        return self._beginning + _pack_rest(self._sender, seq, 0, remaining) + message


class Reader:
    """Reads frames of one kind, on one channel: such as are plain, quickly."""

    __slots__ = ("_beginning", "_body_at", "_rest_at")

    def __init__(self, name: bytes, kind: int) -> None:
        self._beginning = beginning(name, kind)
        self._rest_at = len(self._beginning)
        self._body_at = self._rest_at + REST.size

    def read(self, part: bytes) -> tuple[int, int, int, bytes] | None:
        """(sender, seq, remaining, message) of a frame that is this part alone; None if it is not
        plain, or nothing that is read here: see `receive`."""
        if not part.startswith(self._beginning) or len(part) < self._body_at:
            return None
        sender, seq, _, remaining = _unpack_rest(part, self._rest_at)
        return (sender, seq, remaining, part[self._body_at :]) if seq < SEQ_END else None


def receive(parts: list[Part], name: bytes) -> Frame:
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
    if message[:1] != ARRAY_OF_ONE or len(message) < 2:
        return _unpack_general(message)
    if message[1] == _BIN8 and len(message) > 2 and message[2] == len(message) - 3:
        return message[3:]
    if message[1] in _NOT_SCALAR:
        return _unpack_general(message)
    try:
        return _unpack(message[1:])
    except (ValueError, msgpack.UnpackException) as error:
        raise Malformed("malformed") from error


def _unpack_general(message: bytes) -> Any:
    """The one payload in a body of any form."""
    items = codec.unpack(
        message,
        depth_max=limits.DEPTH_MAX + 1,
        containers_max=limits.CONTAINERS_MAX + 2,
        ext_hook=codec.restore,
    )
    if type(items) is not list or len(items) != 1:
        raise Malformed("malformed")
    return items[0]


def beginning(name: bytes, kind: int) -> bytes:
    return name + BEGINNING.pack(VERSION, kind, Codec.MSGPACK, 0, 1)
