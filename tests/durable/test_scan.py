"""Reading a segment: nothing wrong is ever read, and why it ends is told apart."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.durable.batch import HEADER_BYTES, Header, batch, encode
from mesh.durable.scan import Damage, Walk, torn

PARTITION = 7


def written(bodies: Sequence[bytes], *, synced: Sequence[int] = (), offset: int = 0) -> bytes:
    """Batches of one record each; `synced` of each of them, 0 if it is not said."""
    data = b""
    for i, body in enumerate(bodies):
        header = msgspec.structs.replace(
            batch([body], count=1).header,
            offset=offset + i,
            time_ns=100 + i,
            synced=synced[i] if i < len(synced) else 0,
        )
        data += encode(header, PARTITION) + body
    return data


def walk(data: bytes, *, position: int = 0, offset: int = 0, end: int | None = None) -> Walk:
    return Walk(
        lambda at, length: data[at : at + length],
        len(data) if end is None else end,
        position=position,
        offset=offset,
        partition=PARTITION,
    )


def end_of(data: bytes) -> tuple[Walk, Damage | None]:
    """Having read what is there: where it ended, and whether that is damage."""
    reading = walk(data)
    for _ in reading:
        pass
    return reading, torn(reading, lambda at, n: data[at : at + n], len(data), PARTITION)


@given(st.lists(st.binary(max_size=50), max_size=20))
def test_what_was_written_is_read(bodies: list[bytes]) -> None:
    data = written(bodies)
    reading = walk(data)
    assert [bytes(found.body) for found in reading] == bodies
    assert (reading.position, reading.offset, reading.fault) == (len(data), len(bodies), "")
    assert reading.time_ns == (99 + len(bodies) if bodies else 0)


def test_large_bodies_are_read_whole() -> None:
    bodies = [bytes([i]) * (700_000 * i) for i in range(1, 5)]
    assert [bytes(found.body) for found in walk(written(bodies))] == bodies


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=5), st.data())
def test_a_file_that_ends_early_yields_all_whole_batches_and_no_more(
    bodies: list[bytes], data: st.DataObject
) -> None:
    whole = written(bodies)
    length = data.draw(st.integers(0, len(whole)))
    reading = walk(whole[:length])
    read = [bytes(found.body) for found in reading]
    assert read == bodies[: len(read)]
    assert reading.position == len(written(read)) <= length
    assert (reading.fault == "") == (reading.position == length)


def test_reading_begins_anywhere_and_ends_where_it_may() -> None:
    bodies = [b"a", b"b", b"c", b"d"]
    data, size = written(bodies), HEADER_BYTES + 1
    reading = walk(data, position=size, offset=1, end=3 * size)
    assert [bytes(found.body) for found in reading] == [b"b", b"c"]
    assert (reading.position, reading.offset, reading.fault) == (3 * size, 3, "")


@pytest.mark.parametrize(
    ("second", "fault"),
    [
        ({"offset": 2}, "the batch that is there begins with offset 2"),
        ({"offset": 0}, "the batch that is there begins with offset 0"),
        ({"offset": 1, "time_ns": 99}, "time goes back"),
        (
            {"offset": 1, "time_ns": 101, "body_bytes": 1_000_000},
            "the batch has 1,000,072 bytes, of which some are missing",
        ),
        (
            {"offset": 1, "time_ns": 101, "body_check": 1},
            "the batch's body is not what was appended",
        ),
    ],
)
def test_what_does_not_belong_there_ends_the_reading(second: dict[str, int], fault: str) -> None:
    header: Header = msgspec.structs.replace(batch([b"b"], count=1).header, **second)
    reading = walk(written([b"a"]) + encode(header, PARTITION) + b"b")
    assert [bytes(found.body) for found in reading] == [b"a"]
    assert reading.fault == fault


# -- Torn, or damaged


def test_a_hole_in_one_append_is_a_torn_tail() -> None:
    """All three were written at once, and the disk took the last first."""
    size = HEADER_BYTES + 1
    data = bytearray(written([b"a", b"b", b"c"], synced=[0, size, size]))
    data[size : 2 * size] = bytes(size)
    reading, damage = end_of(bytes(data))
    assert (reading.position, damage) == (size, None)


def test_a_hole_in_what_had_been_synced_is_damage() -> None:
    """The third says that the second had been on disk when it was written."""
    size = HEADER_BYTES + 1
    data = bytearray(written([b"a", b"b", b"c"], synced=[0, size, 2 * size]))
    data[2 * size - 1] ^= 1
    reading, damage = end_of(bytes(data))
    assert damage == Damage(size, 1, "the batch's body is not what was appended")
    assert reading.offset == 1


def test_a_later_batch_need_not_be_whole_to_tell() -> None:
    size = HEADER_BYTES + 1
    data = bytearray(written([b"a", b"b", b"c"], synced=[0, size, 2 * size]))
    data[size + 9] ^= 1
    assert end_of(bytes(data[:-1]))[1] is not None


def test_what_only_looks_like_a_batch_tells_nothing() -> None:
    """Inside a payload: a batch of another log, and the letters that one begins with."""
    other = encode(msgspec.structs.replace(batch([], count=1).header, synced=10_000), PARTITION + 1)
    data = bytearray(written([b"a", b"mREC" * 30 + other], synced=[0, 0]))
    data[-1] ^= 1
    assert end_of(bytes(data))[1] is None


def test_a_batch_far_behind_is_found_wherever_it_lies() -> None:
    """Also across the places where reading is interrupted."""
    size = HEADER_BYTES + 1
    for filling in range((1 << 20) - 2 * size - 80, (1 << 20) + 10, 13):
        data = bytearray(written([b"a", bytes(filling), b"c"], synced=[0, 0, 2 * size]))
        data[size] ^= 1
        assert end_of(bytes(data))[1] is not None, filling
