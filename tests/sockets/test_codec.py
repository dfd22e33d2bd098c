"""Payloads: everything that goes in comes out, and hostile bytes cost next to nothing."""

from __future__ import annotations

import datetime
import random
import resource
import sys
from typing import Any

import lz4.frame
import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import limits
from mesh.errors import NotSerializable
from mesh.sockets import codec
from mesh.sockets.frame import Flag, Frame, Kind, Malformed, decode, encode

MIB = 1 << 20
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
PAYLOADS = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner, max_size=5)
    ),
    max_leaves=20,
)


def framed(body: bytes, *, kind: int = Kind.DATA, count: int = 1, flags: int = 0) -> Frame:
    return decode([encode(b"/a\0", kind, body, count=count, flags=flags, sender=1, seq=1)])


@given(st.lists(PAYLOADS, min_size=1, max_size=20))
def test_what_is_packed_is_unpacked(payloads: list[Any]) -> None:
    body = codec.pack_body([codec.pack(payload) for payload in payloads])
    got, headers = codec.unpack_frame(framed(body, count=len(payloads)), MIB)
    assert list(got) == payloads
    assert headers is None


def test_headers_travel_with_their_own_message() -> None:
    flat = codec.pack_headers({"a": 1, "b": "x"})
    assert flat is not None
    body = codec.pack_body([codec.pack(1), codec.pack(2)], [flat, b"\xc0"])
    payloads, headers = codec.unpack_frame(framed(body, count=2, flags=Flag.HEADERS), MIB)
    assert list(payloads) == [1, 2]
    assert [dict(each) for each in headers or ()] == [{"a": 1, "b": "x"}, {}]


def test_times_with_a_zone_and_buffers_are_payloads() -> None:
    now = datetime.datetime.now(datetime.UTC)
    assert codec.unpack(codec.pack(now)) == now
    assert codec.unpack(codec.pack(bytearray(b"x"))) == b"x"
    assert codec.unpack(codec.pack(memoryview(b"x"))) == b"x"


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def recursive() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (object(), "can not serialize 'object'"),
        ({1, 2}, "can not serialize 'set'"),
        (1 << 64, "out of range"),
        (datetime.datetime(2026, 1, 1), "tzinfo"),  # noqa: DTZ001
        ({(1, 2): 3}, "map key of type tuple"),
        (nested(limits.DEPTH_MAX + 1), "deeper than 32 levels"),
        (recursive(), "deeper than 32 levels"),
        ([0] * (limits.ARRAY_ITEMS_MAX + 1), "list of 1,048,577 items over the limit"),
        ("\ud800", "surrogates"),
    ],
)
def test_what_no_peer_would_take_is_the_callers_error(payload: object, text: str) -> None:
    with pytest.raises(NotSerializable, match=text):
        codec.pack(payload)
    assert codec.pack(1) == b"\x01", "the packer is as good as new"


@pytest.mark.parametrize("kind", [Kind.DATA, Kind.REQUEST, Kind.LAST])
def test_the_deepest_that_is_let_out_is_let_in(kind: int) -> None:
    """A body wraps what the user sent in an array, that of a last value in two; 32 levels are the
    user's own."""
    deepest = nested(limits.DEPTH_MAX)
    packed, deeper = codec.pack(deepest), b"\x91" + codec.pack(deepest)
    wrapped = deepest
    if kind == Kind.LAST:
        packed, deeper, wrapped = b"\x91" + packed, b"\x91" + deeper, [deepest]
    payloads, _ = codec.unpack_frame(framed(codec.pack_body([packed]), kind=kind), MIB)
    assert payloads[0] == wrapped
    with pytest.raises(Malformed):
        codec.unpack_frame(framed(codec.pack_body([deeper]), kind=kind), MIB)


@pytest.mark.parametrize("kind", [Kind.DATA, Kind.LAST])
def test_a_payload_of_as_many_lists_and_maps_as_may_be_sent_arrives(
    kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with headers, and in whatever a frame wraps it."""
    monkeypatch.setattr(limits, "CONTAINERS_MAX", 1000)
    most: list[Any] = [[], {}] * 499 + [[]]
    with pytest.raises(NotSerializable, match="the payload has over 1,000 lists and maps"):
        codec.pack([*most, {}])
    packed, headers = codec.pack(most), codec.pack_headers({"k": "v"})
    assert headers is not None
    if kind == Kind.LAST:
        body = codec.pack_body([codec.pack_body([b"\xa1a", packed, headers])])
        payloads, _ = codec.unpack_frame(framed(body, kind=kind), MIB)
        assert payloads[0] == ["a", most, ["k", "v"]]
    else:
        body = codec.pack_body([packed], [headers])
        assert codec.unpack_frame(framed(body, flags=Flag.HEADERS), MIB) == ([most], [{"k": "v"}])


@pytest.mark.parametrize("empty", [b"\x90", b"\x80"], ids=["lists", "maps"])
def test_a_body_of_nothing_but_containers_is_given_up_in_time(
    empty: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """63 MB of empty lists took 23 s and gigabytes. Counted as they are decoded, so that no more of
    them are made than may be."""
    made: list[int] = []
    at_most = codec._at_most

    def counting(left: list[int]) -> Any:
        count = at_most(left)

        def noting(container: Any) -> Any:
            made.append(1)
            return count(container)

        return noting

    monkeypatch.setattr(limits, "CONTAINERS_MAX", 1000)
    monkeypatch.setattr(codec, "_at_most", counting)
    array = b"\xdd" + (100_000).to_bytes(4, "big") + empty * 100_000
    with pytest.raises(Malformed):
        codec.unpack_frame(framed(codec.pack_body([array])), MIB)
    assert 1000 < len(made) < 1010


def test_whatever_is_no_container_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of its bytes look like one."""
    monkeypatch.setattr(limits, "CONTAINERS_MAX", 3)
    for payload in (b"\x90" * 5000, "a" * 5000, [-3.1] * 1000, [b"\x90\x80"] * 1000):
        payloads, _ = codec.unpack_frame(framed(codec.pack_body([codec.pack(payload)])), MIB)
        assert payloads[0] == payload


HOSTILE = {
    "array of 2³¹": b"\xdd\x7f\xff\xff\xff",
    "map of 2³¹": b"\xdf\x7f\xff\xff\xff",
    "600 nested arrays": b"\x91" * 600 + b"\xc0",
    "nested to 33": b"\x91" * 33 + b"\x90",
    "500 claims of 15 M items": (b"\xdd\x00\xf0\x00\x00") * 500 + bytes(16 * MIB),
    "500 claims at the limit": (b"\xdd\x00\x10\x00\x00") * 500,
    "trailing bytes": b"\xc0\xc0",
    "empty": b"",
    "0xc1": b"\xc1",
    "bad UTF-8": b"\xa2\xff\xff",
    "unhashable key": b"\x81\x90\xc0",
    "timestamp overflow": b"\xc7\x0c\xff" + b"\xff" * 12,
    "cut short": b"\xc4\x05abc",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_malformed_and_cost_no_memory(body: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Malformed):
        codec.unpack(body)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_malformed(body: bytes) -> None:
    for flags in range(8):
        try:
            codec.unpack_frame(framed(body, flags=flags), MIB)
        except Malformed:
            continue


@pytest.mark.parametrize(
    "flat",
    [
        ["a", 1, "a", 2],
        ["a"],
        [1, 2],
        ["a", float("nan")],
        ["a", []],
        ["a", msgpack.ExtType(5, b"x")],
        {"a": 1},
        [x for i in range(65) for x in (str(i), 1)],
    ],
)
def test_bad_headers_are_malformed(flat: object) -> None:
    body = codec.pack_body([b"\xc0"], [msgpack.packb(flat)])
    with pytest.raises(Malformed):
        codec.unpack_frame(framed(body, flags=Flag.HEADERS), MIB)


def test_a_count_that_is_not_the_bodys_is_malformed() -> None:
    with pytest.raises(Malformed):
        codec.unpack_frame(framed(codec.pack_body([b"\xc0"]), count=2), MIB)
    with pytest.raises(Malformed):
        codec.unpack_frame(framed(b"\x01"), MIB)


def test_compression_is_used_only_where_it_pays() -> None:
    assert codec.compress(b"x" * 100) is None
    assert codec.compress(random.Random(1).randbytes(5000)) is None
    packed = codec.compress(b"abc" * 5000)
    assert packed is not None
    assert len(packed) < 1000
    assert codec.decompress(packed, 15_000) == b"abc" * 5000


def test_a_bomb_is_stopped_at_the_cap() -> None:
    bomb = lz4.frame.compress(bytes(200 * MIB), content_checksum=True, store_size=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Malformed, match="oversize"):
        codec.decompress(bomb, 16 * MIB)
    lying = bytearray(lz4.frame.compress(bytes(8 * MIB), content_checksum=True, store_size=True))
    lying[6:14] = (MIB).to_bytes(8, "little")
    with pytest.raises(Malformed):
        codec.decompress(bytes(lying), 16 * MIB)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000


def test_every_flipped_bit_of_a_compressed_body_is_noticed() -> None:
    original = b"some text that repeats, " * 100
    packed = codec.compress(original)
    assert packed is not None
    for bit in range(len(packed) * 8):
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            got = codec.decompress(bytes(flipped), MIB)
        except Malformed:
            continue
        assert got == original, f"bit {bit}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"junk",
        lz4.frame.compress(bytes(2000), store_size=True),
        lz4.frame.compress(bytes(2000), content_checksum=True, store_size=False),
        lz4.frame.compress(bytes(2000), content_checksum=True) + b"junk",
        lz4.frame.compress(bytes(2000), content_checksum=True)[:-3],
        lz4.frame.compress(b"", content_checksum=True),
    ],
)
def test_lz4_that_is_not_ours_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        codec.decompress(body, MIB)


def test_one_thread_does_not_disturb_anothers_packer() -> None:
    """`default` hooks do not exist here, so a packer is never entered twice; but two threads may
    pack at once, and a packer is one buffer."""
    import threading

    wrong: list[int] = []

    def work(n: int) -> None:
        expected = msgpack.packb([n] * 100)
        wrong.extend(n for _ in range(300) if codec.pack([n] * 100) != expected)

    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(old)
    assert wrong == []
