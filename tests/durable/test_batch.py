"""The layout of batches and segments."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.durable import batch as layout
from mesh.durable.batch import (
    HEAD_BYTES,
    HEADER_BYTES,
    Flags,
    Head,
    Header,
    batch,
    decode,
    decode_head,
    encode,
    encode_head,
)

PARTITION = 0x1122334455667788
U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    body_bytes = draw(U32)
    return Header(
        body_check=draw(U32),
        body_bytes=body_bytes,
        column_bytes=draw(st.integers(0, body_bytes)),
        count=draw(U32),
        offset=draw(U64),
        time_ns=draw(U64),
        producer=draw(U64),
        seq=draw(U64),
        producer_epoch=draw(U32),
        log_epoch=draw(U32),
        synced=draw(U32),
        codec=draw(st.integers(0, 255)),
    )


@given(headers(), U64, st.binary(max_size=5))
def test_a_header_is_read_as_it_was_written(header: Header, partition: int, before: bytes) -> None:
    packed = encode(header, partition)
    assert len(packed) == HEADER_BYTES == 72
    assert decode(before + packed, len(before), partition) == header
    assert decode(memoryview(packed), 0, partition) == header


@given(U64, U64, U64, U32)
def test_a_head_is_read_as_it_was_written(
    partition: int, offset: int, time_ns: int, log_epoch: int
) -> None:
    head = Head(partition=partition, offset=offset, time_ns=time_ns, log_epoch=log_epoch)
    packed = encode_head(head)
    assert len(packed) == HEAD_BYTES == 48
    assert decode_head(packed + b"more") == head


def drawn(title: str) -> dict[str, tuple[int, str]]:
    """Where the module's own drawing has each field, and in which form."""
    rows = (layout.__doc__ or "").partition(f"{title}, little endian")[2].partition("\n\n")[0]
    found = re.findall(r"^ +(\d+)  (u8|u16|u32|u64) +(\w+(?: \w+)?)", rows, re.MULTILINE)
    return {name.replace(" ", "_"): (int(at), form) for at, form, name in found if name != "0"}


def test_each_field_is_where_it_is_drawn() -> None:
    """In the module, and so on the page of streams, which has the same drawing."""
    head = Head(partition=PARTITION, offset=2, time_ns=3, log_epoch=4)
    header = Header(
        body_check=1,
        body_bytes=3,
        column_bytes=2,
        count=4,
        offset=5,
        time_ns=6,
        producer=7,
        seq=8,
        producer_epoch=9,
        log_epoch=10,
        synced=11,
        codec=12,
        flags=Flags.UNIQUE,
    )
    for title, record, packed in (
        ("head", head, encode_head(head)),
        ("header", header, encode(header, PARTITION)),
    ):
        fields = drawn(title)
        assert fields.keys() - {"check"} == set(record.__struct_fields__)
        for name, (at, form) in fields.items():
            if name != "check":
                size = int(form[1:]) // 8
                assert int.from_bytes(packed[at : at + size], "little") == getattr(record, name)


SOME = Header(body_check=1, body_bytes=2, count=3, offset=4, time_ns=5, producer=6, seq=7)


@pytest.mark.parametrize("at", range(HEADER_BYTES))
def test_no_flipped_bit_goes_unnoticed_in_a_header(at: int) -> None:
    packed = encode(SOME, PARTITION)
    for bit in range(8):
        flipped = bytearray(packed)
        flipped[at] ^= 1 << bit
        assert decode(bytes(flipped), 0, PARTITION) is None


@pytest.mark.parametrize("at", range(HEAD_BYTES))
def test_no_flipped_bit_goes_unnoticed_in_a_head(at: int) -> None:
    packed = encode_head(Head(partition=PARTITION, offset=4, time_ns=5, log_epoch=6))
    for bit in range(8):
        flipped = bytearray(packed)
        flipped[at] ^= 1 << bit
        assert decode_head(bytes(flipped)) is None


def test_a_batch_of_another_log_is_none_of_this_one() -> None:
    assert decode(encode(SOME, PARTITION), 0, PARTITION + 1) is None


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1])
def test_what_is_too_short_is_no_header(length: int) -> None:
    assert decode(encode(SOME)[:length]) is None
    assert decode(encode(SOME), HEADER_BYTES - length) is None


@pytest.mark.parametrize("change", [{"flags": 16}, {"column_bytes": 3}])
def test_what_this_version_does_not_write_is_not_read(change: dict[str, int]) -> None:
    assert decode(encode(msgspec.structs.replace(SOME, **change))) is None


def test_a_body_may_come_in_pieces() -> None:
    whole = batch([b"columnspayloads"], count=2, column_bytes=7, producer=5, seq=9)
    pieces = batch(
        [b"columns", memoryview(b"pay"), b"", b"loads"], count=2, column_bytes=7, producer=5, seq=9
    )
    assert pieces.header == whole.header
    assert (whole.header.size, whole.header.end) == (HEADER_BYTES + 15, 2)
