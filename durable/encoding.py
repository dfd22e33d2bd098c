"""What is appended, as batches: encoded in the caller's thread, before any lock.

Fails with the caller's own errors, so that nothing was appended then. Reads the wall clock, for
records that are to wait.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
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
    batch_of,
    batch_of_payloads,
    pack_headers,
    pack_key,
    pack_payload,
)
from mesh.errors import InvalidOption, PayloadTooLarge
from mesh.options import check_count
from mesh.sockets.codec import Headers

RECORDS: Final = 1024
"""Of many in one batch."""
BYTES: Final = 256 * 1024
"""Likewise."""
_AROUND_BYTES: Final = 2 * HEADER_BYTES + 10
"""Of a batch of one record, and of what it travels in, besides the payload."""


def one_record(
    payload: Any,
    *,
    bytes_max: int,
    key: str | bytes | None = None,
    headers: Headers | None = None,
    dedup_id: str | bytes | None = None,
    delay: float | None = None,
    derived: Derived | None = None,
) -> Batch:
    """A batch of one record. Raises `NotSerializable`, `PayloadTooLarge`, `InvalidOption`."""
    if is_plain(key, headers, dedup_id, delay, derived):
        return _checked(batch_of_payloads([_item(payload, bytes_max)]), bytes_max)
    record = NewRecord(
        pack_payload(payload, bytes_max),
        pack_key(key),
        pack_headers(headers),
        0 if delay is None else time.time_ns() + round(_check_delay(delay) * 1e9),
        None if dedup_id is None else as_bytes(dedup_id),
        derived,
    )
    return _checked(batch_of([record]), bytes_max)


def is_plain(
    key: object, headers: Headers | None, dedup_id: object, delay: object, derived: object
) -> bool:
    """Whether a record has nothing beside its payload."""
    return key is None and not headers and dedup_id is None and delay is None and derived is None


def plain_item(payload: Any, bytes_max: int) -> Item:
    """A record with nothing beside its payload, to share a batch. Raises `NotSerializable`,
    `PayloadTooLarge`."""
    item = _item(payload, bytes_max)
    _check_size(len(item) + _AROUND_BYTES, bytes_max)
    return item


def _item(payload: Any, bytes_max: int) -> Item:
    return payload if type(payload) is bytes else msgspec.Raw(pack_payload(payload, bytes_max))


def batches_of(payloads: Iterable[Any], bytes_max: int) -> Iterator[Batch]:
    """Batches of them, as they come. Raises `NotSerializable`, `PayloadTooLarge`."""
    items: list[Item] = []
    size = 0
    for payload in payloads:
        item = _item(payload, bytes_max)
        if items and (len(items) >= RECORDS or size + len(item) > BYTES):
            yield _checked(batch_of_payloads(items), bytes_max)
            items, size = [], 0
        items.append(item)
        size += len(item)
    if items:
        yield _checked(batch_of_payloads(items), bytes_max)


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
            f"producer must be a str of 1 to {limits.NAME_BYTES_MAX} characters, not {name!r}"
        )
    digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, person=b"producer")
    return int.from_bytes(digest.digest(), "little") or 1


def _checked(batch: Batch, bytes_max: int) -> Batch:
    _check_size(batch.header.size + HEADER_BYTES, bytes_max)
    return batch


def _check_size(size: int, bytes_max: int) -> None:
    if size > bytes_max:
        raise PayloadTooLarge(
            f"record of {size:,} bytes over the limit of {bytes_max:,} (option message_bytes_max)"
        )


def _check_delay(delay: float) -> float:
    is_number = isinstance(delay, int | float) and not isinstance(delay, bool)
    if not is_number or not 0 <= delay <= limits.DELAY_S_MAX:
        raise InvalidOption(f"delay must be 0 to {limits.DELAY_S_MAX:g} s, not {delay!r}")
    return delay
