"""A frame with one message: the short way and the general way read and write the same."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import limits
from mesh.errors import NotSerializable, PayloadTooLarge
from mesh.sockets import codec
from mesh.sockets.codec import DETACH_BYTES_MIN
from mesh.sockets.compression import Compression
from mesh.sockets.frame import HEADER, Flag, Frame, Kind, Malformed, decode, encode, wire_name
from mesh.sockets.single import REPLY, REQUEST, Reader, Writer, payload_of, receive
from mesh.sockets.single import encode as encode_single

NAME = wire_name("add")
BYTES_MAX = 1 << 20
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=300)
)
PAYLOADS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(PAYLOADS, st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 63) - 1))
def test_what_is_written_the_short_way_is_read_either_way(
    payload: Any, sender: int, seq: int
) -> None:
    message = encode_single(payload, None, BYTES_MAX)
    (part,) = Writer(NAME, REQUEST, sender).parts(message, seq, 77)
    frame = decode([part])
    assert (frame.name, frame.kind, frame.count, frame.flags) == (NAME, Kind.REQUEST, 1, 0)
    assert (frame.sender, frame.seq, frame.remaining) == (sender, seq, 77)
    assert codec.unpack_frame(frame, BYTES_MAX)[0][0] == payload
    plain = Reader(NAME, REQUEST).read(bytes(part))
    assert plain is not None
    assert plain[:3] == (sender, seq, 77)
    assert payload_of(plain[3], BYTES_MAX) == payload


@given(PAYLOADS | st.just(datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)))
def test_what_is_written_the_general_way_is_read_the_short_way(payload: Any) -> None:
    body = codec.pack_body([codec.pack(payload)])
    part = encode(NAME, Kind.REPLY, body, sender=5, seq=6, time_ns=7, remaining=8)
    plain = Reader(NAME, REPLY).read(part)
    assert plain is not None
    assert plain[:3] == (5, 6, 8)
    assert payload_of(plain[3], BYTES_MAX) == payload


@given(st.binary(max_size=40))
def test_both_ways_agree_on_what_is_malformed(tail: bytes) -> None:
    for body in (tail, b"\x91" + tail):
        part = encode(NAME, Kind.REPLY, body, sender=1, seq=1)
        plain = Reader(NAME, REPLY).read(part)
        assert plain is not None
        assert outcome(plain[3]) == outcome(decode([part]))


def outcome(message: bytes | Frame) -> str:
    try:
        return repr(payload_of(message, BYTES_MAX))  # NaN does not equal itself
    except Malformed as fault:
        return fault.reason


def test_what_is_nested_too_deep_or_extended_is_malformed_the_short_way() -> None:
    deep = b"\x91" * (limits.DEPTH_MAX + 1)
    assert payload_of(deep + b"\x01", BYTES_MAX)
    for body in (
        b"\x91" + deep + b"\x01",
        b"\x91\xdd\xff\xff\xff\xff",
        b"\x91\xc1",
        b"\x91\x01\x01",
        b"\x92\x01\x01",
        b"\x91\xc4\x05x",
        b"\x91\xa1\xff",
    ):
        with pytest.raises(Malformed):
            payload_of(body, BYTES_MAX)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": Kind.ERROR},
        {"codec": 0},
        {"flags": int(Flag.HEADERS)},
        {"flags": int(Flag.LZ4)},
        {"count": 2},
        {"seq": 1 << 63},
        {"name": wire_name("other")},
        {"name": wire_name("ad")},
    ],
)
def test_what_is_not_plain_is_left_to_the_general_way(change: dict[str, Any]) -> None:
    usual: dict[str, Any] = {
        "name": NAME,
        "kind": Kind.REPLY,
        "body": b"\x91\x01",
        "sender": 1,
        "seq": 1,
    }
    assert Reader(NAME, REPLY).read(encode(**usual)) is not None
    assert Reader(NAME, REPLY).read(encode(**usual | change)) is None


def test_a_frame_that_is_cut_is_nothing_to_read() -> None:
    part = encode(NAME, Kind.REPLY, b"", sender=1, seq=1)
    assert len(part) == len(NAME) + HEADER.size
    assert Reader(NAME, REPLY).read(part) is not None
    for size in range(len(part)):
        assert Reader(NAME, REPLY).read(part[:size]) is None


def test_large_bytes_travel_apart_and_small_ones_do_not() -> None:
    large = bytes(DETACH_BYTES_MIN)
    writer = Writer(NAME, REQUEST, 1)
    assert writer.parts(encode_single(large, None, BYTES_MAX), 1)[1] is large
    assert len(writer.parts(encode_single(large[1:], None, BYTES_MAX), 1)) == 1
    parts = writer.parts(encode_single(large, {"k": 1}, BYTES_MAX), 1)
    assert parts[1] is large
    frame = receive(parts, NAME)
    assert payload_of(frame, BYTES_MAX) is large
    assert codec.unpack_frame(frame, BYTES_MAX)[1] == [{"k": 1}]


def test_headers_travel_with_their_payload() -> None:
    parts = Writer(NAME, REQUEST, 1).parts(encode_single([1], {"k": 1}, BYTES_MAX), 1)
    payloads, headers = codec.unpack_frame(receive(parts, NAME), BYTES_MAX)
    assert (payloads, headers) == ([[1]], [{"k": 1}])


def test_only_what_goes_by_tcp_is_compressed() -> None:
    message = encode_single("x" * 10_000, None, BYTES_MAX)
    writer = Writer(NAME, REQUEST, 1)
    (plain,), (packed,) = writer.parts(message, 1), writer.parts(message, 1, 0, Compression())
    assert len(packed) < 200 < len(plain)
    for part in (plain, packed):
        assert payload_of(receive([part], NAME), BYTES_MAX) == "x" * 10_000
    assert len(message) > 10_000


def test_what_has_no_form_or_no_room_is_refused() -> None:
    with pytest.raises(NotSerializable):
        encode_single(object(), None, BYTES_MAX)
    with pytest.raises(PayloadTooLarge, match=r"payload of 103 bytes over the limit of 100"):
        encode_single(b"x" * 101, None, 100)
    with pytest.raises(PayloadTooLarge, match=r"headers of .* bytes over the limit of 32,768"):
        encode_single(1, {"k": "x" * 40_000}, BYTES_MAX)
