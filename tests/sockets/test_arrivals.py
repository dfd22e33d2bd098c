"""Frames of one message go a short way once one like them came: it must lead to the same place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.options import SubscriberOptions
from mesh.sockets import codec, flow
from mesh.sockets.arrivals import Arrivals
from mesh.sockets.flow import Flows
from mesh.sockets.frame import Codec, Flag, Kind, encode, pad, wire_name
from mesh.sockets.home import node_text
from mesh.sockets.outgoing import encode_batch, encode_message

NO_SOCKET: Any = None
"""Frames of one part are read from nowhere else."""

PAYLOADS: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.integers(-5, 300), st.binary(max_size=300), st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=3), st.dictionaries(st.text(max_size=2), st.none()),
)  # fmt: skip
BODIES = st.one_of(
    PAYLOADS.map(lambda payload: codec.pack_body([codec.pack(payload)])),
    st.binary(max_size=12),
    st.sampled_from(
        [
            b"\x91\xc1",
            b"\x92\x01\x02",
            b"\x91\x01\x01",
            b"\x91",
            b"\xdc\x00\x01\x07",
            b"\xdd\x00\x00\x00\x01\x07",
        ]
    ),
)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """What may come: mostly plain and in order, and all kinds of other things in between."""
    name = wire_name(draw(st.sampled_from(["a", "a/b", "other"])))
    sender, seq = draw(st.sampled_from([5, 6])), draw(st.integers(1, 6))
    flags = draw(st.sampled_from([0, 0, 0, 0, Flag.WAITS, Flag.HEADERS, Flag.LZ4]))
    what = draw(st.sampled_from(["plain"] * 6 + ["batch", "headers", "mark", "pad", "cut", "raw"]))
    if what == "batch":
        message = encode_batch([b"1", b"2", b"3"])
    elif what == "headers":
        message = encode_message(1, {"k": 1}, 1 << 20)
    elif what == "mark":
        return encode(name, Kind.MARK, b"", flags=flags, sender=sender, seq=seq)
    elif what == "pad":
        return pad(name)
    elif what == "raw":
        return encode(name, Kind.DATA, draw(BODIES), codec=Codec.RAW, sender=sender, seq=seq)
    else:
        body = draw(BODIES)
        count = draw(st.sampled_from([1, 1, 1, 1, 2]))
        whole = encode(
            name, Kind.DATA, body, flags=flags, count=count, sender=sender, seq=seq, time_ns=seq
        )
        return whole[: draw(st.integers(0, len(whole)))] if what == "cut" else whole
    first = message.parts(name, Kind.DATA, sender=sender, seq=seq)[0]
    assert isinstance(first, bytes)
    return first


class Blind(Flows):
    """It knows no short way."""

    def __init__(self) -> None:
        super().__init__(views=False)

    def read(self, socket: Any, first: bytes) -> None:
        return None


def arrivals_of(pattern: str = "a/**") -> Arrivals:
    home: Any = SimpleNamespace(transport=SimpleNamespace(message_bytes_max=1 << 20))
    return Arrivals(home, pattern, b"@0123456789abcdef:a/**\0", SubscriberOptions())


@given(st.lists(frames(), max_size=30))
def test_both_ways_lead_to_the_same(sent: list[bytes]) -> None:
    ends = []
    for flows in (None, Blind()):
        arrivals = arrivals_of()
        arrivals._flows = flows or arrivals._flows
        got = []
        for frame in sent:
            arrivals.take_in(NO_SOCKET, frame)
            while (message := arrivals.pop()) is not None:
                got.append(message)
        standing = arrivals._sequences._expected
        ends.append((got, arrivals.counters, arrivals.lost, arrivals.heard, dict(standing)))
    assert ends[0] == ends[1]


def test_the_second_plain_frame_goes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = arrivals_of("a")
    name, body = wire_name("a"), codec.pack_body([codec.pack("x")])
    arrivals.take_in(NO_SOCKET, encode(name, Kind.DATA, body, sender=5, seq=1))
    monkeypatch.setattr(arrivals, "_accept", None)
    arrivals.take_in(NO_SOCKET, encode(name, Kind.DATA, body, sender=5, seq=2, time_ns=9))
    got = arrivals.inbox.pop_many(3)
    assert got.payloads == ["x", "x"]
    assert (got[1].seq, got[1].time_ns, got[1].channel, got[1].sender) == (2, 9, "a", node_text(5))


def test_what_is_known_of_flows_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "_FLOWS_MAX", 3)
    arrivals, body = arrivals_of("a/*"), codec.pack_body([codec.pack("x")])
    for seq in (1, 2):
        for n in range(5):
            name = wire_name(f"a/{n}")
            arrivals.take_in(NO_SOCKET, encode(name, Kind.DATA, body, sender=5, seq=seq))
            assert len(arrivals._flows._flows) <= 3
    assert len(arrivals.inbox) == 10


def test_a_batch_that_a_ctrl_c_takes_away_is_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals, name = arrivals_of("a"), wire_name("a")

    def batch(seq: int) -> bytes:
        body = codec.pack_body([codec.pack("x")] * 3)
        return encode(name, Kind.DATA, body, sender=5, seq=seq, count=3)

    def interrupted(owner: int, run: object, size: int) -> None:
        raise KeyboardInterrupt

    arrivals.take_in(NO_SOCKET, batch(1))
    with monkeypatch.context() as patch:
        patch.setattr(arrivals, "_deliver", interrupted)
        with pytest.raises(KeyboardInterrupt):
            arrivals.take_in(NO_SOCKET, batch(4))
    arrivals.take_in(NO_SOCKET, batch(7))
    assert [message.seq for message in arrivals.inbox.pop_many(9)] == [1, 2, 3, 7, 8, 9]
    assert arrivals.lost == {node_text(5): 3}
