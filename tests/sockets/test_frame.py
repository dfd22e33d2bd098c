"""The layout of frames: what is written is what docs/wire.md draws, and nothing else is read."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import limits
from mesh.names import literal_prefix, matches
from mesh.sockets.frame import (
    HEADER,
    KINDS,
    Codec,
    Flag,
    Kind,
    Malformed,
    channel_name,
    decode,
    encode,
    pattern_of,
    subscriber_address,
    subscriptions,
    wire_name,
)


def test_the_layout_is_the_documented_one() -> None:
    frame = encode(
        b"/a\0", Kind.REQUEST, b"\x91\xc0", sender=0x1122, seq=3, time_ns=4, remaining=5, count=1
    )
    assert (
        frame == b"/a\0" + struct.pack("<BBBBIQQQI", 1, 4, 1, 0, 1, 0x1122, 3, 4, 5) + b"\x91\xc0"
    )
    assert HEADER.size == 36


@given(
    kind=st.sampled_from(sorted(KINDS)),
    body=st.binary(max_size=50),
    count=st.integers(1, limits.FRAME_MESSAGES_MAX),
    sender=st.integers(0, (1 << 64) - 1),
    seq=st.integers(0, (1 << 63) - 1),
    remaining=st.integers(0, 0xFFFFFFFF),
)
def test_what_is_encoded_is_decoded(
    kind: int, body: bytes, count: int, sender: int, seq: int, remaining: int
) -> None:
    raw = encode(
        wire_name("x"), kind, body, count=count, sender=sender, seq=seq, remaining=remaining
    )
    frame = decode([raw])
    assert (frame.kind, frame.body, frame.count) == (kind, body, count)
    assert (frame.sender, frame.seq, frame.remaining) == (sender, seq, remaining)
    assert frame.name == b"/x\0"
    assert frame.size == len(body)


def test_a_frame_is_as_large_as_its_body_and_what_is_detached() -> None:
    for body in (b"", b"headers", bytes(8000)):
        raw = encode(b"\0", Kind.DATA, body, flags=Flag.DETACHED, sender=1, seq=1)
        for second in (b"p", b"payload", memoryview(bytes(9000))):
            assert decode([raw, second]).size == len(body) + len(second)


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=3))
def test_no_bytes_raise_anything_but_malformed(parts: list[bytes]) -> None:
    with contextlib.suppress(Malformed):
        assert decode(parts).kind in KINDS


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        (0, 2, "version"),
        (1, 0, "malformed"),
        (1, 200, "malformed"),
        (2, 7, "malformed"),
        (3, 16, "malformed"),
        (4, 0, "malformed"),
        (4, limits.FRAME_MESSAGES_MAX + 1, "malformed"),
        (6, 1 << 63, "malformed"),
        (2, Codec.RAW, "malformed"),
        (3, Flag.DETACHED, "malformed"),
    ],
)
def test_a_header_out_of_its_bounds_is_refused(field: int, value: int, reason: str) -> None:
    fields = [1, 1, 1, 0, 1, 1, 1, 0, 0]
    assert decode([b"\0" + HEADER.pack(*fields)]).count == 1
    fields[field] = value
    with pytest.raises(Malformed, match=reason):
        decode([b"\0" + HEADER.pack(*fields)])


def test_the_number_of_parts_must_be_what_the_flags_say() -> None:
    raw = encode(b"\0", Kind.DATA, b"", codec=Codec.RAW, flags=Flag.DETACHED, sender=1, seq=1)
    assert decode([raw, b"payload"]).detached == b"payload"
    for parts in ([raw], [raw, b"1", b"2"], [encode(b"\0", 1, b"", sender=1, seq=1), b"1"]):
        with pytest.raises(Malformed):
            decode(parts)


def test_a_name_that_does_not_end_is_refused() -> None:
    with pytest.raises(Malformed):
        decode([b"/" * 10_000])


def test_addresses_name_their_pattern() -> None:
    address = subscriber_address("0123456789abcdef", "a/*")
    assert pattern_of(address) == "a/*"
    for bad in (b"", b"@", b"@short:a\0", address[:-1], b"/" + address[1:], b"@" + b"\xff" * 20):
        assert pattern_of(bad) is None
    assert channel_name(address) is None
    assert channel_name(b"/\xff\0") is None


LEVEL = st.sampled_from(["a", "ab", "b", "*", "**"])
NAME = st.lists(st.sampled_from(["a", "ab", "b"]), min_size=1, max_size=4).map("/".join)


@given(st.lists(LEVEL, min_size=1, max_size=4).map("/".join), NAME)
def test_what_a_pattern_matches_gets_through_zeromqs_filter(pattern: str, name: str) -> None:
    passes = any(wire_name(name).startswith(p) for p in subscriptions(*literal_prefix(pattern)))
    assert passes or not matches(pattern, name)


def test_a_subscription_to_one_topic_lets_no_other_through() -> None:
    assert subscriptions(*literal_prefix("a")) == [b"/a\0"]
    assert subscriptions(*literal_prefix("a/**")) == [b"/a\0", b"/a/"]
    assert subscriptions(*literal_prefix("**")) == [b"/"]
