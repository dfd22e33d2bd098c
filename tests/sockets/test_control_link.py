"""The control link's sockets: what comes in rounds, and what a flood may cost."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import zmq

from mesh.sockets.control import Ping, encode_control
from mesh.sockets.control_link import ControlLink, Heard
from mesh.sockets.frame import Kind, encode
from mesh.sockets.parts import has_input
from tests.support.homes import Homes
from tests.support.waiting import until

ROUND = 256


@dataclass
class Wire:
    """A control link, and strangers who dial it."""

    homes: Homes
    strangers: list[zmq.Socket[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.transport = self.homes.make(1).transport
        self.link = ControlLink(self.transport, 1, 0)

    def stranger(self) -> zmq.Socket[bytes]:
        home = self.homes.make(2 + len(self.strangers))
        socket = home.transport.connecting(zmq.DEALER, "ipc", hwm=10_000)
        socket.connect(self.link.endpoints()[0])
        self.strangers.append(socket)
        return socket

    def arrived(self) -> None:
        until(lambda: has_input(self.link._bound[0].socket), "what was sent")

    def hear(self, count: int) -> list[Heard]:
        """In as many rounds as it takes."""
        heard: list[Heard] = []

        def enough() -> bool:
            heard.extend(self.link.receive())
            return len(heard) >= count

        until(enough, "what was said")
        return heard


@pytest.fixture
def wire(homes: Homes) -> Iterator[Wire]:
    wire = Wire(homes)
    yield wire
    for socket in wire.strangers:
        socket.close(linger=0)
    wire.link.close()


def ping(stamp: int) -> bytes:
    return encode(b"\0", Kind.CONTROL, encode_control(Ping(stamp)), sender=9, seq=1)


@pytest.mark.parametrize("frame", [b"garbage", ping(1)])
def test_a_flood_comes_in_bounded_rounds_whatever_it_is(wire: Wire, frame: bytes) -> None:
    flooding = wire.stranger()
    for _ in range(4 * ROUND):
        flooding.send(frame)
    seen = 0
    while seen < 4 * ROUND:
        wire.arrived()
        dropped = wire.link.dropped.total()
        of_this_round = len(wire.link.receive()) + wire.link.dropped.total() - dropped
        assert of_this_round <= ROUND
        seen += of_this_round


def test_what_a_round_leaves_is_noticed(wire: Wire) -> None:
    flooding = wire.stranger()
    for _ in range(2 * ROUND):
        flooding.send(ping(1))
    rounds: list[int] = []
    while sum(rounds) < 2 * ROUND:
        wire.arrived()
        rounds.append(len(wire.link.receive()))
        assert wire.link.noticed or rounds[-1] < ROUND // 2, "each is two parts there"
    assert not wire.link.receive()
    assert not wire.link.noticed


def test_a_newcomer_is_heard_in_the_midst_of_a_flood(wire: Wire) -> None:
    flooding, over = wire.stranger(), threading.Event()

    def flood() -> None:
        while not over.is_set():
            with contextlib.suppress(zmq.Again):
                flooding.send(b"garbage", zmq.NOBLOCK)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        wire.arrived()
        wire.stranger().send(ping(7))
        assert [heard.message for heard in wire.hear(1)] == [Ping(7)]
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("parts", [3, 5, ROUND - 1, ROUND, ROUND + 1, 10 * ROUND])
def test_a_message_of_too_many_parts_is_counted_once_and_the_next_is_heard(
    wire: Wire, parts: int
) -> None:
    stranger = wire.stranger()
    stranger.send_multipart([b"x"] * parts)
    for stamp in range(3):
        stranger.send(ping(stamp))
    assert [each.message for each in wire.hear(3)] == [Ping(0), Ping(1), Ping(2)]
    assert wire.link.dropped == {"malformed": 1}


def test_no_message_is_cut_where_a_round_ends(wire: Wire) -> None:
    """The parts of those before may be odd in number."""
    stranger = wire.stranger()
    stranger.send_multipart([b"x", b"y"])  # three parts there
    for stamp in range(ROUND):
        stranger.send(ping(stamp))
    assert [each.message for each in wire.hear(ROUND)] == [Ping(stamp) for stamp in range(ROUND)]
    assert wire.link.dropped == {"malformed": 1}


def test_the_files_of_its_sockets_are_gone_with_it(homes: Homes) -> None:
    removed: list[str] = []
    transport = homes.make(1, remove_path=removed.append).transport
    link = ControlLink(transport, 1, 0)
    path = link.endpoints()[0].removeprefix("ipc://")
    link.close()
    assert removed == [path]
