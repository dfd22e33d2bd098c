"""Payloads and headers to bodies and back: MessagePack, bounded; LZ4, bounded. No pickle, ever.

Encoding fails with the caller's errors (`NotSerializable`) before anything is sent, by the same
bounds that decoding applies: what one side lets out, the other lets in. Decoding fails with
`Malformed` alone, whatever the bytes are.

An array (`mesh.sockets.arrays`) is an extension type, wherever it stands: its description, and
behind that its bytes. The bytes of one large array may be left out, to travel by themselves.
"""

from __future__ import annotations

import datetime
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import lz4.frame
import msgpack
import msgspec

from mesh import limits
from mesh.errors import NotSerializable
from mesh.message import EMPTY
from mesh.sockets import arrays
from mesh.sockets.arrays import NotAnArray
from mesh.sockets.batch import ALONE_BYTES_MIN
from mesh.sockets.frame import Codec, Flag, Frame, Kind, Malformed, Part

_SCALARS: Final = frozenset(
    {str, bytes, int, float, bool, type(None), bytearray, memoryview, datetime.datetime}
)
_KEYS: Final = frozenset({str, bytes, int, float, bool, type(None)})
_HEADER_VALUES: Final = frozenset({str, bytes, int, float, bool, type(None)})
ARRAY: Final = 1
"""The extension type of arrays."""
DETACH_BYTES_MIN: Final = ALONE_BYTES_MIN
"""From here on bytes, and those of an array, travel as a part of their own. Below 32 KiB that is
slower over ipc, from 64 KiB on faster."""
_SAMPLE_BYTES: Final = 16 * 1024
_UNPACKABLE: Final = (TypeError, ValueError, OverflowError, RecursionError, BufferError)

Headers = Mapping[str, Any]


class _Packers(threading.local):
    """Packers for each thread: one packer must not be used by two at a time."""

    def __init__(self) -> None:
        self.aside: list[memoryview] = []
        """The large array that `pack_aside` has put aside."""
        make = partial(msgpack.Packer, use_bin_type=True, datetime=True, autoreset=True)
        self.pack = make(default=_array).pack
        self.pack_aside = make(default=_array_aside).pack


def _describe(value: Any) -> tuple[bytes, memoryview]:
    try:
        described = arrays.describe(value)
    except NotAnArray as error:
        raise TypeError(f"can not serialize {error}") from None
    if described is not None:
        return described
    if isinstance(value, int):
        raise OverflowError(f"an integer of {value.bit_length()} bits is out of range")
    if isinstance(value, datetime.datetime):
        raise ValueError("a datetime without tzinfo says no time")
    raise TypeError(f"can not serialize {type(value).__name__!r} object")


def _array(value: Any) -> msgpack.ExtType:
    """For a packer that met what MessagePack has no form for."""
    return msgpack.ExtType(ARRAY, b"".join(_describe(value)))


def _array_aside(value: Any) -> msgpack.ExtType:
    """Likewise; the first large one is put aside."""
    description, data = _describe(value)
    if len(data) < DETACH_BYTES_MIN or packers.aside:
        return msgpack.ExtType(ARRAY, b"".join((description, data)))
    packers.aside.append(data)
    return msgpack.ExtType(ARRAY, description)


packers = _Packers()
"""The calling thread's: for `pack`, and for who knows that there is nothing to check."""
_decode_raw = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
_encode = msgspec.msgpack.Encoder().encode
"""For bytes and what is packed already, of which it makes what msgpack does, in half the time."""


def pack(value: Any) -> bytes:
    """`value` in MessagePack, within the bounds. Raises `NotSerializable`."""
    if type(value) not in _SCALARS:
        _check_outgoing(value)
    try:
        return packers.pack(value)  # type: ignore[no-any-return]
    except _UNPACKABLE as error:
        raise NotSerializable(f"MessagePack has no form for it: {error}") from error


def pack_aside(value: Any) -> tuple[bytes, memoryview | None]:
    """`pack`, and the bytes of the first large array in it, which were left out."""
    if type(value) in _SCALARS:
        return pack(value), None
    _check_outgoing(value)
    aside = packers.aside
    try:
        packed: bytes = packers.pack_aside(value)
        return packed, aside[0] if aside else None
    except _UNPACKABLE as error:
        raise NotSerializable(f"MessagePack has no form for it: {error}") from error
    finally:
        aside.clear()


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


def bytes_header(size: int) -> bytes:
    """What stands before `bytes` of that size, in MessagePack."""
    if size < 1 << 8:
        return bytes((0xC4, size))
    if size < 1 << 16:
        return b"\xc5" + size.to_bytes(2, "big")
    return b"\xc6" + size.to_bytes(4, "big")


def split(body: bytes) -> tuple[memoryview, bytes]:
    """One's own body of a payload and its headers, in two, each packed still."""
    payload, headers = _decode_raw(body)
    return memoryview(payload), bytes(headers)


def put_back(body: bytes, aside: memoryview) -> bytes:
    """The body with the bytes that `pack_aside` left out of it."""

    def whole(code: int, data: bytes) -> msgpack.ExtType:
        if code == ARRAY and arrays.lacks_bytes(data):
            data += aside
        return msgpack.ExtType(code, data)

    value = msgpack.unpackb(body, strict_map_key=False, timestamp=3, ext_hook=whole)
    return packers.pack(value)  # type: ignore[no-any-return]


def unpack_frame(frame: Frame, bytes_max: int) -> tuple[list[Any], Sequence[Headers] | None]:
    """The payloads of a frame, and their headers if it has any. A payload that is a part of its own
    is that part, bytes or a view. Raises `Malformed`."""
    body, detached = frame.body, frame.detached
    if frame.flags & Flag.LZ4:
        if detached is None:
            body = decompress(body, bytes_max + limits.FRAME_OVERHEAD_BYTES_MAX)
        else:
            detached = decompress(detached, bytes_max)
    has_headers = frame.flags & Flag.HEADERS
    if frame.codec == Codec.RAW:
        assert detached is not None, "or it was no frame"
        if not has_headers:
            if body:
                raise Malformed("malformed")
            return [detached], None
        return [detached], [read_headers(unpack(body))]
    around = 2 if frame.kind == Kind.LAST else 1  # arrays around each payload
    restoring = None if detached is None else _Restoring(detached)
    items = unpack(
        body,
        depth_max=limits.DEPTH_MAX + around,
        containers_max=limits.CONTAINERS_MAX + around + frame.count,
        ext_hook=restoring or restore,
    )
    if restoring is not None and restoring.detached is not None:
        raise Malformed("malformed")
    expected = frame.count * 2 if has_headers else frame.count
    if type(items) is not list or len(items) != expected:
        raise Malformed("malformed")
    if not has_headers:
        return items, None
    return items[0::2], [read_headers(flat) for flat in items[1::2]]


def restore(code: int, data: bytes, detached: memoryview | None = None) -> Any:
    """What an extension type stands for; of one that is not known here, that it is one."""
    if code != ARRAY:
        return msgpack.ExtType(code, data)
    try:
        return arrays.restore(data, detached)
    except NotAnArray as error:
        raise Malformed("malformed") from error


class _Restoring:
    """Restores the arrays of a frame, one of which is detached."""

    def __init__(self, detached: Part) -> None:
        self.detached: memoryview | None = memoryview(detached).toreadonly()

    def __call__(self, code: int, data: bytes) -> Any:
        if self.detached is None or code != ARRAY or not arrays.lacks_bytes(data):
            return restore(code, data)
        detached, self.detached = self.detached, None
        return restore(code, data, detached)


def unpack(
    body: Part,
    *,
    depth_max: int = limits.DEPTH_MAX,
    containers_max: int = limits.CONTAINERS_MAX,
    ext_hook: Callable[[int, bytes], Any] = msgpack.ExtType,
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
            ext_hook=ext_hook,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise Malformed("malformed") from error
    flat = left[0] >= containers_max - 1 and type(value) is list  # nothing in it but scalars
    if not flat and type(value) not in _SCALARS and _fault(value, depth_max, containers_max):
        raise Malformed("malformed")
    return value


def compress(body: Part) -> bytes | None:
    """`body` as an LZ4 frame, or None where that saves less than a tenth (of a large one: where it
    would not of its beginning, which tells in 10 us what all of 1 MiB tells in 700)."""
    if len(body) < limits.COMPRESS_BYTES_MIN:
        return None
    if len(body) >= 4 * _SAMPLE_BYTES and not _shrinks(body[:_SAMPLE_BYTES]):
        return None
    return _shrinks(body)


def _shrinks(body: Part) -> bytes | None:
    packed: bytes = lz4.frame.compress(body, content_checksum=True, store_size=True)
    return packed if len(packed) * 10 < len(body) * 9 else None


def decompress(body: Part, bytes_max: int) -> bytes:
    """What `compress` was given. Raises `Malformed`; never makes more than `bytes_max` bytes.

    The content checksum is required: without it LZ4 takes flipped bits for other data.
    """
    size = _size_before(body, bytes_max)
    try:
        decompressor = lz4.frame.LZ4FrameDecompressor()
        out: bytes = decompressor.decompress(body, max_length=size)
        if len(out) == size and not decompressor.eof:
            out += decompressor.decompress(b"", max_length=1)
    except (RuntimeError, ValueError, EOFError, MemoryError) as error:
        raise Malformed("malformed") from error
    if not decompressor.eof or decompressor.unused_data or len(out) != size:
        raise Malformed("malformed")
    return out


def is_compressed(body: Part, bytes_max: int) -> bool:
    """Whether it begins as what `decompress` takes."""
    try:
        _size_before(body, bytes_max)
    except Malformed:
        return False
    return True


def _size_before(body: Part, bytes_max: int) -> int:
    """What it had before it was compressed, as it says. Raises `Malformed`."""
    try:
        info = lz4.frame.get_frame_info(body)
    except (RuntimeError, ValueError) as error:
        raise Malformed("malformed") from error
    size: int = info["content_size"]
    if not info["content_checksum"] or not 0 < size <= bytes_max:
        raise Malformed("oversize" if size > bytes_max else "malformed")
    return size


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
                if isinstance(value, msgpack.ExtType) and value[0] == ARRAY:
                    return f"has an extension type {ARRAY}, which stands for arrays"
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


def read_headers(flat: Any, entries_max: int = limits.HEADERS_MAX) -> Headers:
    """Headers out of the flat array that `pack_headers` makes. Raises `Malformed`."""
    if flat is None:
        return EMPTY
    if type(flat) is not list or _header_fault(flat, entries_max) is not None:
        raise Malformed("malformed")
    return dict(zip(flat[0::2], flat[1::2], strict=True))


def _header_fault(flat: list[Any], entries_max: int = limits.HEADERS_MAX) -> str | None:
    keys, values = flat[0::2], flat[1::2]
    if len(keys) != len(values) or len(keys) > entries_max:
        return f"have {len(keys):,} entries over the limit of {entries_max:,}"
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


def array_items(body: Part, at: int = 0) -> int:
    """How many items the array has that begins there, as it says; -1: none does."""
    kind = body[at] if len(body) > at else 0
    if kind & 0xF0 == 0x90:
        return kind & 0x0F
    size = 2 if kind == 0xDC else 4 if kind == 0xDD else 0
    end = at + 1 + size
    return int.from_bytes(body[at + 1 : end], "big") if size and len(body) >= end else -1
