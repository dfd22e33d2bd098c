"""What is appended, as batches: encoded in the caller's thread, before any lock.

Fails with the caller's own errors, so that nothing was appended then. Reads the wall clock, for
records that are to wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any, Final

import msgspec

from mesh import limits
from mesh.durable.batch import HEADER_BYTES, Batch
from mesh.durable.dedup_ids import as_bytes
from mesh.durable.derivations import source_number
from mesh.durable.reading import Record
from mesh.durable.records import (
    Derived,
    Item,
    NewRecord,
    Plain,
    batch_of,
    pack_headers,
    pack_key,
    pack_payload,
)
from mesh.errors import InvalidOption, PayloadTooLarge
from mesh.options import check_count, check_function, check_seconds
from mesh.sockets.codec import Headers

KeyOf = Callable[[Any], str | bytes | None]
"""The key of the record with that payload."""
HeadersOf = Callable[[Any], Headers | None]
"""Likewise its headers."""

BATCH_RECORDS: Final = 1024
"""Most records that share a batch."""
BATCH_BYTES: Final = 256 * 1024
"""Of them; or one record, if that is larger."""
_BESIDE_BYTES: Final = 5
"""Before a payload, at most, in MessagePack."""
_COLUMNS_BYTES: Final = 100
"""Likewise before all that stands beside a payload; and what of that has a fixed size."""
AROUND_BYTES: Final = limits.NAME_BYTES_MAX + 32
"""Of what a batch travels in, besides it: at most, with the stream's name."""
_ALONE_BYTES: Final = HEADER_BYTES + 10 + AROUND_BYTES
"""Around a record that has a batch of its own."""


def item_of(
    payload: Any,
    *,
    bytes_max: int,
    key: str | bytes | None = None,
    headers: Headers | None = None,
    dedup_id: str | bytes | None = None,
    delay: float | None = None,
    derived: Derived | None = None,
) -> tuple[Item, int]:
    """A record to be appended, and its bytes at most. Raises `NotSerializable`, `PayloadTooLarge`,
    `InvalidOption`."""
    item: Item
    if key is None and not headers and dedup_id is None and delay is None and derived is None:
        item = plain = _plain(payload, bytes_max)
        size = len(plain) + _BESIDE_BYTES
    else:
        packed_headers, header_bytes = pack_headers(headers)
        item = NewRecord(
            pack_payload(payload, bytes_max),
            pack_key(key),
            packed_headers,
            0 if delay is None else _due_ns(delay),
            None if dedup_id is None else as_bytes(dedup_id),
            derived,
        )
        beside = len(item.key or b"") + header_bytes + len(item.dedup_id or b"")
        size = len(item.payload) + beside + _COLUMNS_BYTES
    _check_size(size + _ALONE_BYTES, bytes_max)
    return item, size


def _due_ns(delay: float) -> int:
    return time.time_ns() + round(check_seconds(delay, "delay", limits.DELAY_S_MAX) * 1e9)


def _plain(payload: Any, bytes_max: int) -> Plain:
    return payload if type(payload) is bytes else msgspec.Raw(pack_payload(payload, bytes_max))


def batches_of(
    payloads: Iterable[Any],
    bytes_max: int,
    key: KeyOf | None = None,
    headers: HeadersOf | None = None,
) -> Iterator[Batch]:
    """Batches of them, as they come. Raises what `item_of` raises, and what `key` and `headers`
    do."""
    if isinstance(payloads, str | bytes | bytearray | memoryview | Mapping):
        text = "append_many takes several payloads, each a record, and not one"
        raise InvalidOption(f"{text}: {payloads!r:.80}")
    for function, what in ((key, "key"), (headers, "headers")):
        if function is not None:
            check_function(function, what)
    bare = key is None and headers is None
    items: list[Item] = []
    size, size_max = 0, min(BATCH_BYTES, bytes_max // 2)
    for payload in payloads:
        item: Item
        if bare:
            item = plain = _plain(payload, bytes_max)
            item_bytes = len(plain) + _BESIDE_BYTES
        else:
            item, item_bytes = item_of(
                payload,
                bytes_max=bytes_max,
                key=None if key is None else key(payload),
                headers=None if headers is None else headers(payload),
            )
        if items and (len(items) >= BATCH_RECORDS or size + item_bytes > size_max):
            yield batch_of(items)
            items, size = [], 0
        if item_bytes > size_max:
            _check_size(item_bytes + _ALONE_BYTES, bytes_max)
        items.append(item)
        size += item_bytes
    if items:
        yield batch_of(items)


def derived_of(record: Record | None, output: int) -> Derived | None:
    """What stands in a record that is made of another. Raises `InvalidOption`."""
    if record is None:
        return None
    if not isinstance(record, Record):
        raise InvalidOption(f"derived_from takes a record of a stream, not {record!r}")
    check_count(output, "output", 0, limits.DERIVED_OUTPUTS_MAX - 1)
    group = getattr(record, "group", "")
    source = source_number(record.stream, int(record.partition, 16), record.log_epoch, group)
    return Derived(source, record.offset, output)


def producer_number(name: str) -> int:
    """Of a producer with that name. Never 0."""
    if not isinstance(name, str) or not 1 <= len(name) <= limits.NAME_BYTES_MAX:
        raise InvalidOption(
            f"producer must be a str of 1 to {limits.NAME_BYTES_MAX:,} characters, not {name!r}"
        )
    digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, person=b"producer")
    return int.from_bytes(digest.digest(), "little") or 1


def _check_size(size: int, bytes_max: int) -> None:
    if size > bytes_max:
        raise PayloadTooLarge(
            f"record of {size:,} bytes over the limit of {bytes_max:,} (option message_bytes_max)"
        )
