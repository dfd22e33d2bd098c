"""What is appended, as batches: none is made that cannot travel."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mesh import limits
from mesh.durable.batch import Batch
from mesh.durable.encoding import batches_of, item_of
from mesh.durable.protocol import Append, encode_message, pack_batch
from mesh.durable.records import Derived, batch_of, payloads_of
from mesh.errors import PayloadTooLarge
from mesh.sockets.single import encode

BYTES_MAX = 4096


def plain(payload: bytes) -> Batch:
    return batch_of([item_of(payload, bytes_max=BYTES_MAX)[0]])


def with_all(payload: bytes) -> Batch:
    item, _ = item_of(
        payload,
        bytes_max=BYTES_MAX,
        key="k" * 100,
        headers={"trace": "x" * 50, "n": 7},
        dedup_id="i" * 60,
        delay=1.0,
        derived=Derived(1 << 63, 1 << 62, 255),
    )
    return batch_of([item])


def one_of_many(payload: bytes) -> Batch:
    return list(batches_of([b"x", payload], BYTES_MAX))[-1]


def one_with_a_key(payload: bytes) -> Batch:
    return list(batches_of([b"x", payload], BYTES_MAX, lambda _: "k" * 100))[-1]


def one_with_headers(payload: bytes) -> Batch:
    return list(batches_of([b"x", payload], BYTES_MAX, headers=lambda _: {"trace": "x" * 100}))[-1]


@pytest.mark.parametrize("made", [plain, with_all, one_of_many, one_with_a_key, one_with_headers])
def test_what_is_not_refused_can_travel_whatever_the_name_of_its_stream(
    made: Callable[[bytes], Batch],
) -> None:
    """Or it would be in the way of all that is appended behind it."""
    refused = 0
    for size in range(BYTES_MAX - 900, BYTES_MAX):
        try:
            batch = made(b"x" * size)
        except PayloadTooLarge:
            refused += 1
        else:
            asked = Append("s" * limits.NAME_BYTES_MAX, memoryview(pack_batch(batch)))
            encode(encode_message(asked), None, BYTES_MAX)
    assert 100 < refused < 900


def test_many_are_as_many_batches_as_it_takes() -> None:
    batches = list(batches_of((b"x" * 100 for _ in range(1000)), BYTES_MAX))
    assert sum(batch.header.count for batch in batches) == 1000
    assert 20 < len(batches) < 100
    assert all(payloads_of(each.header, b"".join(each.body))[0] == b"x" * 100 for each in batches)
    batches = list(batches_of([b""] * 2000, BYTES_MAX))
    assert sum(batch.header.count for batch in batches) == 2000
