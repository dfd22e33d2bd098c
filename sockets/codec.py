"""Payloads and headers to bodies and back: MessagePack, bounded; LZ4, bounded. No pickle, ever.

Encoding fails with the caller's errors (`NotSerializable`) before anything is sent, by the same
bounds that decoding applies: what one side lets out, the other lets in. Decoding fails with
`Malformed` alone, whatever the bytes are.
"""

from __future__ import annotations

import datetime
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import lz4.frame
import msgpack
import msgspec

from mesh import limits
from mesh.errors import NotSerializable
from mesh.message import EMPTY
from mesh.sockets.frame import Codec, Flag, Frame, Kind, Malformed

_SCALARS: Final = frozenset(
    {str, bytes, int, float, bool, type(None), bytearray, memoryview, datetime.datetime}
)
_KEYS: Final = frozenset({str, bytes, int, float, bool, type(None)})
_HEADER_VALUES: Final = frozenset({str, bytes, int, float, bool, type(None)})

Headers = Mapping[str, Any]


class _Packers(threading.local):
    """A packer for each thread: one packer must not be used by two at a time."""

    def __init__(self) -> None:
        self.pack = msgpack.Packer(use_bin_type=True, datetime=True, autoreset=True).pack


_packers = _Packers()
_encode = (
    msgspec.msgpack.Encoder().encode
)  # of bytes and of what is packed: the same bytes as msgpack


def pack(value: Any) -> bytes:
    """`value` in MessagePack, within the bounds. Raises `NotSerializable`."""
    if type(value) not in _SCALARS:
        _check_outgoing(value)
    try:
        return _packers.pack(value)  # type: ignore[no-any-return]
    except (TypeError, ValueError, OverflowError, RecursionError, BufferError) as error:
        raise NotSerializable(f"MessagePack has no form for it: {error}") from error


def pack_body(payloads: Sequence[bytes], headers: Sequence[bytes] | None = None) -> bytes:
    """A body out of payloads (and headers, one for each) that are packed already."""
    items = payloads
    if headers is None and len(payloads) == 1:
        return b"\x91" + payloads[0]
    if headers is not None:
        items = [part for pair in zip(payloads, headers, strict=True) for part in pair]
    return _array_header(len(items)) + b"".join(items)


def pack_items(items: Sequence[bytes | msgspec.Raw]) -> bytes:
    """A body out of payloads that are bytes, or packed already, in one call of C."""
    return _encode(items)


def pack_headers(headers: Headers | None) -> bytes | None:
    """Headers as a flat array of keys and values, or None if there are none.

    An array and not a map, so that a receiver can tell a repeated key.
    """
    if not headers:
        return None
    if not isinstance(headers, Mapping):
        raise NotSerializable(f"headers must be a mapping, not {type(headers).__name__}")
    flat = [item for pair in headers.items() for item in pair]
    if (fault := _header_fault(flat)) is not None:
        raise NotSerializable(f"headers {fault}")
    return pack(flat)


def unpack_frame(frame: Frame, bytes_max: int) -> tuple[Sequence[Any], Sequence[Headers] | None]:
    """The payloads of a frame, and their headers if it has any. Raises `Malformed`."""
    body = frame.body
    if frame.flags & Flag.LZ4:
        body = decompress(body, bytes_max + limits.FRAME_OVERHEAD_BYTES_MAX)
    has_headers = frame.flags & Flag.HEADERS
    if frame.detached is not None:
        if not has_headers:
            if body:
                raise Malformed("malformed")
            return (frame.detached,), None
        return (frame.detached,), (read_headers(unpack(body)),)
    if frame.codec != Codec.MSGPACK:
        raise Malformed("malformed")
    arrays = 2 if frame.kind == Kind.LAST else 1  # around each payload
    items = unpack(
        body,
        depth_max=limits.DEPTH_MAX + arrays,
        containers_max=limits.CONTAINERS_MAX + arrays + frame.count,
    )
    expected = frame.count * 2 if has_headers else frame.count
    if type(items) is not list or len(items) != expected:
        raise Malformed("malformed")
    if not has_headers:
        return items, None
    return items[0::2], [read_headers(flat) for flat in items[1::2]]


def unpack(
    body: bytes | memoryview,
    *,
    depth_max: int = limits.DEPTH_MAX,
    containers_max: int = limits.CONTAINERS_MAX,
) -> Any:
    """The one value in `body`. Raises `Malformed`: for trailing bytes, too deep nesting, claims of
    more items than allowed, and whatever else is wrong with it."""
    left = [containers_max]
    count = _at_most(left)
    try:
        value = msgpack.unpackb(
            body,
            strict_map_key=False,
            timestamp=3,
            max_array_len=limits.ARRAY_ITEMS_MAX,
            max_map_len=limits.MAP_ITEMS_MAX,
            list_hook=count,
            object_hook=count,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise Malformed("malformed") from error
    flat = left[0] >= containers_max - 1 and type(value) is list  # nothing in it but scalars
    if not flat and type(value) not in _SCALARS and _fault(value, depth_max, containers_max):
        raise Malformed("malformed")
    return value


def compress(body: bytes) -> bytes | None:
    """`body` as an LZ4 frame, or None where that saves less than a tenth."""
    if len(body) < limits.COMPRESS_BYTES_MIN:
        return None
    packed = lz4.frame.compress(body, content_checksum=True, store_size=True)
    return packed if len(packed) * 10 < len(body) * 9 else None


def decompress(body: bytes | memoryview, bytes_max: int) -> bytes:
    """What `compress` was given. Raises `Malformed`; never makes more than `bytes_max` bytes.

    The content checksum is required: without it LZ4 takes flipped bits for other data.
    """
    try:
        info = lz4.frame.get_frame_info(body)
        size = info["content_size"]
        if not info["content_checksum"] or not 0 < size <= bytes_max:
            raise Malformed("oversize" if size > bytes_max else "malformed")
        decompressor = lz4.frame.LZ4FrameDecompressor()
        out: bytes = decompressor.decompress(body, max_length=size)
        if len(out) == size and not decompressor.eof:
            out += decompressor.decompress(b"", max_length=1)
    except (RuntimeError, ValueError, EOFError, MemoryError) as error:
        raise Malformed("malformed") from error
    if not decompressor.eof or decompressor.unused_data or len(out) != size:
        raise Malformed("malformed")
    return out


def _at_most(left: list[int]) -> Callable[[Any], Any]:
    """A hook for each list and map as it is decoded: counts down, and stops at one too many."""

    def count(container: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Malformed("malformed")
        return container

    return count


def _check_outgoing(value: Any) -> None:
    fault = _fault(value, limits.DEPTH_MAX, limits.CONTAINERS_MAX)
    if fault is not None:
        raise NotSerializable(f"the payload {fault}")


def _fault(root: Any, depth_max: int, containers_max: int) -> str | None:
    """What makes a container one that no peer would take, or None. A loop over levels, not a
    recursion: a hostile value is as deep as it likes."""
    level = [root]
    containers = 0
    for _depth in range(depth_max):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                containers += 1
                if len(value) > limits.MAP_ITEMS_MAX:
                    return _too_long("map", len(value), limits.MAP_ITEMS_MAX)
                for key in value:
                    if type(key) not in _KEYS and not isinstance(key, str | bytes | int | float):
                        return f"has a map key of type {type(key).__name__}"
                inner += [item for item in value.values() if type(item) not in _SCALARS]
            elif isinstance(value, list | tuple):
                containers += 1
                if len(value) > limits.ARRAY_ITEMS_MAX:
                    return _too_long("list", len(value), limits.ARRAY_ITEMS_MAX)
                inner += [item for item in value if type(item) not in _SCALARS]
        if containers > containers_max:
            return f"has over {containers_max:,} lists and maps"
        if not inner:
            return None
        level = inner
    if not any(isinstance(value, dict | list | tuple) for value in level):
        return None
    return f"is nested deeper than {depth_max} levels"


def _too_long(what: str, items: int, items_max: int) -> str:
    return f"has a {what} of {items:,} items over the limit of {items_max:,}"


def read_headers(flat: Any) -> Headers:
    """Headers out of the flat array that `pack_headers` makes. Raises `Malformed`."""
    if flat is None:
        return EMPTY
    if type(flat) is not list or _header_fault(flat) is not None:
        raise Malformed("malformed")
    return dict(zip(flat[0::2], flat[1::2], strict=True))


def _header_fault(flat: list[Any]) -> str | None:
    keys, values = flat[0::2], flat[1::2]
    if len(keys) != len(values) or len(keys) > limits.HEADERS_MAX:
        return f"have {len(keys)} entries over the limit of {limits.HEADERS_MAX}"
    if any(type(key) is not str for key in keys) or len(set(keys)) != len(keys):
        return "must have distinct str keys"
    for value in values:
        if type(value) not in _HEADER_VALUES:
            return f"must have plain values, not {type(value).__name__}"
        if type(value) is float and not math.isfinite(value):
            return "must not have NaN or infinity"
    return None


def _array_header(count: int) -> bytes:
    if count < 16:
        return bytes((0x90 | count,))
    if count < 1 << 16:
        return b"\xdc" + count.to_bytes(2, "big")
    return b"\xdd" + count.to_bytes(4, "big")
