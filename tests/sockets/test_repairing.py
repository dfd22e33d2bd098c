"""A subscription whose gaps are open for a while, with a raw publisher and somebody who finds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mesh.errors import Timeout
from mesh.message import Loss, Message, Origin, Run
from mesh.options import SubscriberOptions
from mesh.sockets import codec, repairing
from mesh.sockets.frame import Kind, encode, wire_name
from mesh.sockets.home import node_text
from mesh.sockets.repairing import RepairingSubscription
from mesh.sockets.repairs import FlowKey, Want
from mesh.sockets.subscriber import Subscriber
from tests.support.homes import Homes
from tests.support.topics import RAW, SUBSCRIBER, RawPublisher
from tests.support.waiting import until

SENDER = node_text(RAW)
A: FlowKey = (RAW << 1, "a/1")


class Setup:
    """One that repairs, of a raw publisher, which has said that its topics stand at 0."""

    def __init__(self, homes: Homes, timeout_s: float = 60.0, *, views: bool = False) -> None:
        self.wanted = 0
        self.rooms = 0
        options = SubscriberOptions(repair=True, repair_timeout_s=timeout_s, views=views)
        self.core = RepairingSubscription(
            homes.make(SUBSCRIBER), "a/*", options, self._want, self._room
        )
        self.subscriber = Subscriber(self.core, None, lambda: None)
        self.publisher = RawPublisher(homes)
        self.publisher.attach(self.core)
        self.publisher.mark({"a/1": 0, "a/2": 0})

    def _want(self, core: RepairingSubscription) -> None:
        assert core is self.core
        self.wanted += 1

    def _room(self) -> None:
        self.rooms += 1

    def sends(self, topic: str, *seqs: int) -> None:
        for seq in seqs:
            self.publisher.data(topic, seq, seq)

    def finds(self, *seqs: int, payload: Any = None) -> None:
        for seq in seqs:
            origin = Origin("a/1", SENDER, seq, 0)
            run = Run([seq if payload is None else payload], 0, origin)
            self.core.found([(A, run, 1)])

    def receives(self, count: int) -> list[tuple[str, Any]]:
        return [
            (message.channel, message.payload)
            for message in (self.subscriber.recv(timeout=5) for _ in range(count))
        ]

    def misses(self, *wants: tuple[int, int]) -> None:
        """Read until that is what it wants."""

        def wanted() -> bool:
            self.core.read_ahead()
            with self.core.link:
                self.core._read()
            return [(want.first, want.last) for want in self.core.wants()] == list(wants)

        until(wanted)


@pytest.fixture
def setup(homes: Homes) -> Iterator[Setup]:
    setup = Setup(homes)
    yield setup
    setup.core.close(0)
    setup.publisher.close()


def test_what_was_missed_comes_in_its_place_and_other_topics_at_once(setup: Setup) -> None:
    setup.sends("a/1", 1, 2, 5, 6)
    setup.sends("a/2", 1)
    assert setup.receives(3) == [("a/1", 1), ("a/1", 2), ("a/2", 1)]
    assert setup.core.wants() == [Want(A, 3, 4, 0)]
    assert setup.wanted == 1
    with pytest.raises(Timeout):
        setup.subscriber.recv(timeout=0)
    setup.finds(4, 9, 2, 3, 3)
    assert setup.receives(4) == [("a/1", seq) for seq in (3, 4, 5, 6)]
    assert dict(setup.subscriber.repaired) == {SENDER: 2}
    assert dict(setup.subscriber.lost) == {}
    setup.sends("a/1", 7, 4)
    assert setup.receives(1) == [("a/1", 7)]
    assert setup.core.counters.received == 8
    assert setup.core.is_whole


def test_frames_of_several_messages_wait_as_well_and_what_came_twice_does_not(
    setup: Setup,
) -> None:
    def batch(first: int, count: int) -> None:
        items = [codec.pack(seq) for seq in range(first, first + count)]
        body, name = codec.pack_body(items), wire_name("a/1")
        setup.publisher.socket.send(
            encode(name, Kind.DATA, body, sender=RAW, seq=first, count=count)
        )

    batch(1, 2)
    batch(5, 2)
    batch(6, 3)
    assert setup.receives(2) == [("a/1", 1), ("a/1", 2)]
    setup.misses((3, 4))
    with pytest.raises(Timeout):
        setup.subscriber.recv_many(timeout=0)
    setup.finds(3, 4)
    assert setup.receives(6) == [("a/1", seq) for seq in range(3, 9)]
    assert setup.core.counters.received == 8


def test_who_waits_is_woken_by_what_is_found(setup: Setup) -> None:
    setup.sends("a/1", 2)
    setup.misses((1, 1))
    got: list[Message] = []
    thread = threading.Thread(target=lambda: got.append(setup.subscriber.recv(timeout=20)))
    thread.start()
    until(lambda: not setup.core.link.alone)
    setup.finds(1)
    thread.join(5)
    assert [message.payload for message in got] == [1]


def test_a_mark_of_a_quiet_topic_opens_a_gap(setup: Setup) -> None:
    setup.sends("a/1", 1)
    setup.publisher.idle_mark("a/1", 3)
    assert setup.receives(1) == [("a/1", 1)]
    setup.misses((2, 3))
    setup.finds(2, 3)
    assert setup.receives(2) == [("a/1", 2), ("a/1", 3)]


def test_a_gap_that_nobody_fills_is_counted_and_what_came_behind_it_delivered(
    homes: Homes,
) -> None:
    setup = Setup(homes, timeout_s=0.0)
    losses: list[Loss] = []
    setup.subscriber.on_loss(losses.append)
    setup.sends("a/1", 1, 4)
    assert setup.receives(1) == [("a/1", 1)]
    setup.misses((2, 3))
    setup.core.tick()  # as if it had been held up before that
    setup.core.tick()
    assert losses == [Loss(SENDER, "a/1", 2, 3)]
    assert setup.receives(1) == [("a/1", 4)]
    assert dict(setup.subscriber.lost) == {SENDER: 2}
    assert setup.core.counters.lost == 2
    setup.core.close(0)
    setup.publisher.close()


def test_a_process_that_was_stopped_gives_nothing_up_before_it_has_looked(
    homes: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock: Any = SimpleNamespace(now=100.0, monotonic=lambda: clock.now, time_ns=lambda: 0)
    monkeypatch.setattr(repairing, "time", clock)
    setup = Setup(homes, timeout_s=5.0)
    setup.core.tick()
    setup.sends("a/1", 2)
    setup.misses((1, 1))
    clock.now += 60.0
    for _ in range(20):
        setup.core.tick()
        clock.now += 0.25
    assert setup.core.wants()
    setup.core.tick()
    assert dict(setup.subscriber.lost) == {SENDER: 1}
    setup.core.close(0)
    setup.publisher.close()


def test_nothing_is_wanted_while_nobody_takes_what_is_there(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairing, "_AHEAD", 2)
    setup.sends("a/1", 4)
    setup.misses((1, 3))
    setup.finds(1, 2)
    assert setup.core.wants() == []
    rooms = setup.rooms
    assert setup.receives(2) == [("a/1", 1), ("a/1", 2)]
    with pytest.raises(Timeout):
        setup.subscriber.recv(timeout=0)
    assert setup.rooms > rooms, "whoever finds is told that there is room"
    assert setup.core.wants() != []


@pytest.mark.slow
def test_what_is_held_is_bounded_and_then_nothing_is_read(
    homes: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.limits.REPAIR_BYTES_MAX", 1000)
    setup = Setup(homes)
    setup.sends("a/1", *range(2, 100))
    with pytest.raises(Timeout):
        setup.subscriber.recv(timeout=0.3)
    held = setup.core.counters.received
    assert 5 < held < 15
    setup.publisher.close()  # of which the descriptor tells
    with pytest.raises(Timeout):
        setup.subscriber.recv(timeout=0.3)
    assert setup.core.link.attempts < 50, "nor does anybody spin"
    setup.finds(1)
    assert [payload for _, payload in setup.receives(99)] == list(range(1, 100))
    setup.core.close(0)


def test_large_payloads_are_views_if_that_is_asked_for(homes: Homes) -> None:
    setup = Setup(homes, views=True)
    setup.sends("a/1", 3)
    setup.misses((1, 2))
    setup.finds(1, payload=b"x" * 100_000)
    setup.finds(2, payload=b"small")
    (_, large), (_, small) = setup.receives(2)
    assert (type(large), bytes(large), small) == (memoryview, b"x" * 100_000, b"small")
    setup.core.close(0)
    setup.publisher.close()


def test_the_time_before_a_gap_is_that_of_the_last_message(setup: Setup) -> None:
    began_ns = setup.core.arrivals._began_ns
    setup.sends("a/1", 2)
    setup.misses((1, 1))
    assert setup.core.wants()[0].since_ns == began_ns
    setup.core.arrivals._times[A] = 77
    setup.sends("a/1", 4)
    setup.misses((1, 1), (3, 3))
    assert setup.core.wants()[1].since_ns == 77
