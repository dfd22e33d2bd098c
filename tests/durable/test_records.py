"""What is inside a batch, where whoever made it may be anybody: bounded before it is decoded."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from mesh import limits
from mesh.durable.batch import batch
from mesh.durable.deliveries import Settlements
from mesh.durable.protocol import Settle, decode_query, encode_message
from mesh.durable.records import (
    LZ4,
    NewRecord,
    batch_of,
    columns_of,
    headers_of,
    pack_headers,
    raw_payloads_of,
)
from mesh.message import EMPTY
from mesh.sockets import codec
from mesh.sockets.codec import Headers
from mesh.sockets.frame import Malformed

MANY = 200_000
"""Of items of a byte each, where one is meant."""
CLAIM = b"\xdd" + MANY.to_bytes(4, "big")


def refused_at_once(decode: Callable[[], object]) -> None:
    """Not after all of it was made: empty lists take seventy times as much then, and long."""
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            decode()
        assert tracemalloc.get_traced_memory()[1] < 16 * MANY
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "column",
    [
        b"k" + CLAIM + b"\xc4\x02ab" * MANY,
        b"h" + CLAIM + b"\x90" * MANY,
        b"d" + CLAIM + b"\xcd\x7f\xff" * MANY,
    ],
    ids=["keys", "headers", "due_ns"],
)
def test_columns_of_more_records_than_a_batch_may_have_are_not_decoded(column: bytes) -> None:
    columns = b"\x81\xa1" + column
    made = batch([columns, b"\x91\x01"], count=1, column_bytes=len(columns))
    refused_at_once(lambda: columns_of(made.header, columns))


def test_headers_with_lists_in_them_are_not_decoded() -> None:
    columns = b"\x81\xa1h\x91" + CLAIM + b"\x90" * MANY
    made = batch([columns, b"\x91\x01"], count=1, column_bytes=len(columns))

    def decode() -> Headers:
        headers = columns_of(made.header, columns).headers
        assert headers is not None
        return headers_of(headers[0])

    refused_at_once(decode)


@pytest.mark.parametrize("text", ["x", "x" * 10_000])
@pytest.mark.parametrize("value", [[], {}, b"", None, 7, "y"])
def test_headers_are_plain_however_large_they_are(text: str, value: Any) -> None:
    plain = not isinstance(value, list | dict)
    made = batch_of([NewRecord(b"\x01", headers=["text", text, "n", value]), NewRecord(b"\x02")])
    headers = columns_of(made.header, b"".join(made.body)).headers
    assert headers is not None
    packed, none = headers
    assert headers_of(none) == EMPTY
    if plain:
        assert headers_of(packed) == {"text": text, "n": value}
        assert pack_headers(headers_of(packed))[0] == ["text", text, "n", value]
    else:
        with pytest.raises(Malformed):
            headers_of(packed)


def test_more_payloads_than_there_are_records_are_not_decoded() -> None:
    packed = codec.compress(CLAIM + b"\xc0" * MANY)
    assert packed is not None
    made = batch([packed], count=1, codec=LZ4)
    refused_at_once(lambda: raw_payloads_of(made.header, packed))


@pytest.mark.parametrize("field", Settlements.__struct_fields__)
def test_more_settlements_than_a_member_can_have_are_not_decoded(field: str) -> None:
    items: dict[str, Any] = {"extends": 7, "naks": (7, 1.0), "rejects": (7, "")}

    def packed(count: int) -> bytes:
        said = Settlements(**{field: (items.get(field, (7, 8)),) * count})
        return encode_message(Settle("orders", "billing", "member", 1, said))

    query = decode_query(packed(limits.SETTLED_MAX))
    assert isinstance(query, Settle)
    assert len(getattr(query.said, field)) == limits.SETTLED_MAX
    data = packed(limits.SETTLED_MAX + 1)
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            decode_query(data)
        assert tracemalloc.get_traced_memory()[1] < len(data)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [0, 1, 15, 16, 65535, 65536])
def test_how_many_payloads_there_are_is_in_the_first_bytes(count: int) -> None:
    packed = msgspec.msgpack.encode([0] * count)
    assert codec.array_items(packed) == count
    assert codec.array_items(memoryview(b"\x93" + packed), 1) == count


@pytest.mark.parametrize(
    "data", [b"", b"\xc0", b"\x81\x01\x01", b"\xdc", b"\xdc\x00", b"\xdd\x00\x00\x01"]
)
def test_what_is_no_array_has_no_payloads(data: bytes) -> None:
    assert codec.array_items(data) == -1
