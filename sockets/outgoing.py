"""Messages on their way out: encoded once, a single one in its sender's thread before any lock.

Fails with the sender's own errors (`NotSerializable`, `PayloadTooLarge`), so that nothing was sent
then. Knows frames, not sockets: where it goes, and under which sequence, is said when it is framed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from mesh import limits
from mesh.errors import PayloadTooLarge
from mesh.sockets import codec
from mesh.sockets.batch import BYTES_MAX, ITEM_BYTES_MAX, Item, fitting
from mesh.sockets.codec import DETACH_BYTES_MIN
from mesh.sockets.compression import Compression
from mesh.sockets.frame import Codec, Flag, Part, encode


class Outgoing:
    """A payload with its headers, or a batch of them, ready to be framed as often as it is sent."""

    __slots__ = ("_packed", "body", "codec", "count", "detached", "flags")

    def __init__(
        self,
        body: bytes,
        detached: Part | None = None,
        flags: int = 0,
        count: int = 1,
        codec: int = Codec.MSGPACK,
    ) -> None:
        self.codec = codec
        self.count = count
        self.body = body
        self.detached = detached
        self.flags = flags
        self._packed: bytes | None = b""
        """What is compressed of it; None if that does not pay, empty before it was tried."""

    def __len__(self) -> int:
        """Bytes of payload and headers, before compression."""
        return len(self.body) + len(self.detached or b"")

    @property
    def item(self) -> Item | None:
        """It as one of a batch; None if it is to have a frame of its own."""
        if self.flags or self.count != 1 or len(self.body) > ITEM_BYTES_MAX:
            return None
        return msgspec.Raw(self.body[1:])  # behind the header of an array of one

    def last_of(self, channel: str) -> bytes:
        """The body of a LAST frame that repeats this one message."""
        if self.detached is not None and self.codec == Codec.RAW:
            both = codec.pack(self.detached) + (self.body or b"\xc0")
        else:
            body = self.body
            if self.detached is not None:
                body = codec.put_back(body, memoryview(self.detached))
            both = body[1:] + (b"" if self.flags & Flag.HEADERS else b"\xc0")
        return codec.pack_body([b"\x93" + codec.pack(channel) + both])

    def kept(self) -> tuple[list[Part], bytes | None]:
        """It as a log keeps it: the array of payloads, in pieces, and the packed headers of the
        only one, if it has any."""
        body, detached = self.body, self.detached
        if detached is not None and self.codec == Codec.RAW:
            return [b"\x91" + codec.bytes_header(len(detached)), detached], body or None
        if detached is not None:
            body = codec.put_back(body, memoryview(detached))
        if not self.flags & Flag.HEADERS:
            return [body], None
        payload, headers = codec.split(body)
        return [b"\x91", payload], headers

    def parts(
        self,
        name: bytes,
        kind: int,
        *,
        sender: int,
        seq: int,
        time_ns: int = 0,
        remaining: int = 0,
        flags: int = 0,
        compression: Compression | None = None,
    ) -> list[Part]:
        """The ZeroMQ message. `compression`: what decides whether to compress it, for tcp."""
        body, detached, flags = self.body, self.detached, self.flags | flags
        if compression is not None:
            if self._packed == b"":
                self._packed = compression.compress(body if detached is None else detached)
            if self._packed:
                flags |= Flag.LZ4
                if detached is None:
                    body = self._packed
                else:
                    detached = self._packed
        first = encode(
            name,
            kind,
            body,
            codec=self.codec,
            flags=flags,
            count=self.count,
            sender=sender,
            seq=seq,
            time_ns=time_ns,
            remaining=remaining,
        )
        return [first] if detached is None else [first, detached]


def encode_batch(items: Sequence[Item]) -> Outgoing:
    """Payloads that share a frame: those of `items` that come first and fit, `Outgoing.count` of
    them."""
    body = codec.pack_items(items)
    if len(body) > BYTES_MAX and (count := fitting(items)) < len(items):
        items = items[:count]
        body = codec.pack_items(items)
    return Outgoing(body, count=len(items))


def encode_message(payload: Any, headers: codec.Headers | None, bytes_max: int) -> Outgoing:
    """Encode `payload`. Raises `NotSerializable`; `PayloadTooLarge` beyond `bytes_max`, or for
    headers that a frame has no room for."""
    packed_headers = codec.pack_headers(headers)
    if packed_headers and len(packed_headers) > limits.HEADERS_BYTES_MAX:
        raise PayloadTooLarge(
            f"headers of {len(packed_headers):,} bytes over the limit of "
            f"{limits.HEADERS_BYTES_MAX:,}"
        )
    flags = Flag.HEADERS if packed_headers else 0
    raw = _large_buffer(payload)
    if raw is not None:
        _check_size(len(raw), bytes_max)
        return Outgoing(packed_headers or b"", raw, flags | Flag.DETACHED, codec=Codec.RAW)
    packed, aside = codec.pack_aside(payload)
    body = codec.pack_body([packed], [packed_headers] if packed_headers else None)
    if aside is None:
        _check_size(len(packed), bytes_max)
        return Outgoing(body, None, flags)
    _check_size(len(packed) + len(aside), bytes_max)
    return Outgoing(body, aside, flags | Flag.DETACHED)


def _large_buffer(payload: Any) -> Part | None:
    """The bytes that travel by themselves; a copy if somebody may write to them."""
    if type(payload) is bytes:
        return payload if len(payload) >= DETACH_BYTES_MIN else None
    if type(payload) is bytearray:
        return bytes(payload) if len(payload) >= DETACH_BYTES_MIN else None
    if type(payload) is memoryview and payload.nbytes >= DETACH_BYTES_MIN and payload.c_contiguous:
        return payload.cast("B") if payload.readonly else bytes(payload)
    return None


def _check_size(size: int, bytes_max: int) -> None:
    if size > bytes_max:
        raise PayloadTooLarge(
            f"payload of {size:,} bytes over the limit of {bytes_max:,} (option message_bytes_max)"
        )
