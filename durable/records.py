"""What is inside a batch: records, each with its payload and what stands beside it. No I/O.

A batch's body is two parts::

    columns    MessagePack of `Columns`: a map of what some of the records have beside their
               payloads; none of it where no record has any. Keys that are not known are skipped
    payloads   MessagePack: one array of all payloads, which is decoded in one call; LZ4 where the
               header's codec says so

Encoded where records are made, in their producer's thread, and decoded where they are used: what
keeps them looks at columns only, and at these only where it has to. Whoever decodes does not trust
what is there: all is bounded, and what does not fit raises `Malformed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec

from mesh import limits
from mesh.durable.batch import Batch, Bytes, Flags, Header, batch
from mesh.errors import InvalidOption, NotSerializable, PayloadTooLarge
from mesh.message import EMPTY
from mesh.sockets import codec
from mesh.sockets.codec import Headers
from mesh.sockets.frame import SEQ_END, Malformed

PLAIN: Final = 0
LZ4: Final = 1


class Derived(msgspec.Struct, frozen=True, array_like=True):
    """What a record was made of: see `mesh.durable.derivations`."""

    source: int
    offset: int
    output: int


class BatchOrigin(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a topic carried: the records of a batch are messages `seq`, ``seq + 1`` … of one sender
    on one topic, and left together."""

    sender: Annotated[int, msgspec.Meta(ge=0)]
    channel: str
    seq: Annotated[int, msgspec.Meta(ge=1, le=SEQ_END - 1)]
    time_ns: Annotated[int, msgspec.Meta(ge=0)]
    """The sender's wall clock when they left, since 1970."""
    waits: bool = False
    """Whether it was a topic that waits: such count apart from one of the same name that drops."""


_EACH: Final = msgspec.Meta(max_length=limits.BATCH_RECORDS_MAX)
"""Looked at before the first item is decoded."""


class Columns(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What stands beside payloads. A list has an item for each record."""

    keys: Annotated[list[bytes | None], _EACH] | None = msgspec.field(name="k", default=None)
    headers: Annotated[list[msgspec.Raw], _EACH] | None = msgspec.field(name="h", default=None)
    """Flat arrays of keys and values (see `codec.pack_headers`) or nil, packed still: they are
    whatever their producer says, and are decoded, within bounds, when somebody looks at them."""
    due_ns: Annotated[list[int], _EACH] | None = msgspec.field(name="d", default=None)
    """When groups may have it, since 1970; 0: at once."""
    dedup_id: bytes | None = msgspec.field(name="i", default=None)
    """Of the only record."""
    derived: Derived | None = msgspec.field(name="f", default=None)
    """Likewise."""
    origin: BatchOrigin | None = msgspec.field(name="o", default=None)
    """Of all of them, where a topic carried them: see `mesh.durable.recording`."""


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Columns).decode
_decode_raw: Final = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
_decode_headers: Final = msgspec.msgpack.Decoder(list[Any] | None).decode
_NONE: Final = Columns()
_HEADERS_MAX: Final = limits.HEADERS_MAX + limits.LETTER_HEADERS
_SMALL_BYTES: Final = 4096
"""Headers that can do no harm, whatever they are: they are decoded in a quarter of the time."""


class NewRecord(msgspec.Struct, frozen=True, gc=False):
    """One to be appended, encoded."""

    payload: bytes
    """In MessagePack."""
    key: bytes | None = None
    headers: list[Any] | None = None
    due_ns: int = 0
    dedup_id: bytes | None = None
    derived: Derived | None = None

    @property
    def unique(self) -> bool:
        """Whether it may turn out to be there already, and so has a batch of its own."""
        return self.dedup_id is not None or self.derived is not None


Plain = bytes | msgspec.Raw
"""A payload that is bytes, or packed already."""
Item = Plain | NewRecord
"""A record with nothing but that, or with more."""


def pack_key(key: str | bytes | None) -> bytes | None:
    """Raises `InvalidOption`, `NotSerializable`."""
    if key is None or type(key) is bytes:
        packed = key
    elif isinstance(key, str):
        try:
            packed = key.encode()
        except UnicodeEncodeError as error:
            raise NotSerializable(f"the key has no form: {error}") from None
    else:
        raise InvalidOption(f"key must be str or bytes, not {type(key).__name__}")
    if packed is not None and len(packed) > limits.KEY_BYTES_MAX:
        raise NotSerializable(
            f"the key has {len(packed):,} bytes over the limit of {limits.KEY_BYTES_MAX:,}"
        )
    return packed


def pack_headers(headers: Headers | None) -> tuple[list[Any] | None, int]:
    """Checked, as they stand in `Columns`, and their bytes. Raises `NotSerializable`."""
    if not headers:
        return None, 0
    packed = codec.pack_headers(headers) or b""
    return [item for pair in headers.items() for item in pair], len(packed)


def pack_payload(payload: Any, bytes_max: int) -> bytes:
    """Raises `NotSerializable`, `PayloadTooLarge`."""
    packed = codec.pack(payload)
    if len(packed) > bytes_max:
        raise PayloadTooLarge(
            f"record of {len(packed):,} bytes over the limit of {bytes_max:,} "
            "(option message_bytes_max)"
        )
    return packed


def batch_of(items: Sequence[Item], *, compress: bool = False) -> Batch:
    """A batch that holds them; one that is `unique` has to be the only one."""
    records = [each for each in items if isinstance(each, NewRecord)]
    if not records:
        return _batch(b"", codec.pack_items(items), len(items), 0, compress)  # type: ignore[arg-type]
    if len(records) < len(items):
        records = [each if isinstance(each, NewRecord) else _record(each) for each in items]
    keys = headers = due_ns = None
    if any(record.key is not None for record in records):
        keys = [record.key for record in records]
    if any(record.headers is not None for record in records):
        headers = [record.headers for record in records]
    if any(record.due_ns for record in records):
        due_ns = [record.due_ns for record in records]
    first = records[0]
    columns = b""
    if keys or headers or due_ns or first.unique:
        columns = _encode(
            Columns(
                keys=keys,
                headers=headers,  # type: ignore[arg-type]
                due_ns=due_ns,
                dedup_id=first.dedup_id,
                derived=first.derived,
            )
        )
    payloads = codec.pack_body([record.payload for record in records])
    return _batch(columns, payloads, len(records), Flags.UNIQUE if first.unique else 0, compress)


def _record(item: Plain) -> NewRecord:
    return NewRecord(bytes(item) if type(item) is msgspec.Raw else codec.pack(item))


def batch_of_published(
    origin: BatchOrigin, payloads: Sequence[Bytes], count: int, headers: bytes | None
) -> Batch:
    """A batch of what a topic carried in one frame. `payloads`: the array of them, packed, in
    pieces; `headers`: those of the only one, packed."""
    flat = None if headers is None else [msgspec.Raw(headers)]
    columns = _encode(Columns(origin=origin, headers=flat))
    return batch([columns, *payloads], count=count, column_bytes=len(columns), codec=PLAIN)


def _batch(columns: bytes, payloads: bytes, count: int, flags: int, compress: bool) -> Batch:
    packed = codec.compress(payloads) if compress else None
    return batch(
        [columns, payloads if packed is None else packed] if columns else [packed or payloads],
        count=count,
        column_bytes=len(columns),
        codec=PLAIN if packed is None else LZ4,
        flags=flags,
    )


def columns_of(header: Header, body: bytes | memoryview) -> Columns:
    """Raises `Malformed`."""
    if not header.column_bytes:
        return _NONE
    try:  # a copy: headers point to it, and are not to keep the payloads
        columns: Columns = _decode(bytes(memoryview(body)[: header.column_bytes]))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed("malformed") from error
    for column in (columns.keys, columns.headers, columns.due_ns):
        if column is not None and len(column) != header.count:
            raise Malformed("malformed")
    return columns


def may_be_read(header: Header, body: bytes | memoryview) -> bool:
    """Whether its payloads are what it says, as far as their first bytes tell."""
    if header.codec == PLAIN:
        return codec.array_items(body, header.column_bytes) == header.count
    packed = memoryview(body)[header.column_bytes :]
    return header.codec == LZ4 and codec.is_compressed(packed, limits.BATCH_BYTES_MAX)


def payloads_of(header: Header, body: bytes | memoryview) -> list[Any]:
    """All payloads of a batch. Raises `Malformed`."""
    payloads = codec.unpack(
        _packed_payloads(header, body),
        depth_max=limits.DEPTH_MAX + 1,
        containers_max=limits.CONTAINERS_MAX + 1 + header.count,
        ext_hook=codec.restore,
    )
    if type(payloads) is not list or len(payloads) != header.count:
        raise Malformed("malformed")
    return payloads


def raw_payloads_of(header: Header, body: bytes | memoryview) -> list[bytes]:
    """The same, each in MessagePack still. Raises `Malformed`."""
    packed = _packed_payloads(header, body)
    if codec.array_items(packed) != header.count:  # before so many are made
        raise Malformed("malformed")
    try:
        raw = _decode_raw(packed)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Malformed("malformed") from error
    return [bytes(each) for each in raw]


def _packed_payloads(header: Header, body: bytes | memoryview) -> bytes | memoryview:
    packed = memoryview(body)[header.column_bytes :]
    if header.codec == LZ4:
        return codec.decompress(packed, limits.BATCH_BYTES_MAX)
    if header.codec != PLAIN:
        raise Malformed("malformed")
    return packed


def headers_of(packed: msgspec.Raw | None) -> Headers:
    """Of one record, which may be a dead letter. Raises `Malformed`."""
    if packed is None:
        return EMPTY
    if len(packed) > _SMALL_BYTES:
        return codec.read_headers(codec.unpack(packed, depth_max=1, containers_max=1), _HEADERS_MAX)
    try:
        flat = _decode_headers(packed)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed("malformed") from error
    return codec.read_headers(flat, _HEADERS_MAX)
