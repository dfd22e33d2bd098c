"""A subscriber's own part: what it takes of what comes, in which order, and whom it follows."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from mesh import limits
from mesh.errors import InvalidOption, Timeout
from mesh.message import Loss, Message, Origin, Run
from mesh.options import SubscriberOptions
from mesh.sockets import codec, turns
from mesh.sockets.control import Offer
from mesh.sockets.frame import Kind, encode, wire_name
from mesh.sockets.home import node_text
from mesh.sockets.subscriber import Subscriber
from mesh.sockets.subscription import Subscription
from tests.support.homes import Homes
from tests.support.links import long_before_its_deadline
from tests.support.topics import (
    NETWORKED,
    PUBLISHER,
    RAW,
    SUBSCRIBER,
    Net,
    RawPublisher,
    all_there,
    payloads,
)
from tests.support.waiting import until

ASKED = b"\1?"


class Reading:
    """One subscriber, and publishers that the test speaks for."""

    def __init__(self, homes: Homes) -> None:
        self.homes = homes
        self.home = homes.make(SUBSCRIBER, **NETWORKED)
        self.marks = homes.made[SUBSCRIBER].marks
        self.cores: list[Subscription] = []
        self.raws: list[RawPublisher] = []

    def core(self, pattern: str, *, latest_only: bool = False) -> Subscription:
        core = Subscription(self.home, pattern, SubscriberOptions(latest_only=latest_only))
        self.cores.append(core)
        return core

    def raw(self, label: str = "raw", node_id: int = RAW) -> RawPublisher:
        raw = RawPublisher(self.homes, label, node_id)
        self.raws.append(raw)
        return raw

    def pair(self, pattern: str, *, latest_only: bool = False) -> tuple[RawPublisher, Subscriber]:
        raw, core = self.raw(), self.core(pattern, latest_only=latest_only)
        raw.attach(core)
        return raw, Subscriber(core, None, lambda: None)

    def close(self) -> None:
        for core in self.cores:
            core.close(0)
        for raw in self.raws:
            raw.close()


@pytest.fixture
def reading(homes: Homes) -> Iterator[Reading]:
    reading = Reading(homes)
    yield reading
    reading.close()


def core_of(subscriber: Subscriber) -> Subscription:
    return subscriber._core


def tick_until(core: Subscription, condition: Callable[[], object]) -> None:
    def ticked() -> object:
        core.tick()
        return condition()

    until(ticked)


def lost(subscriber: Subscriber) -> int:
    return sum(subscriber.lost.values())


# What it takes


def test_one_level_is_one_level(reading: Reading) -> None:
    """ZeroMQ lets through whatever begins alike; what is not asked for is not even decoded."""
    raw, subscriber = reading.pair("a/*")
    for n, topic in enumerate(["a/x/y", "a", "ab/x", "a/x"], 1):
        raw.data(topic, 1, n)
    assert subscriber.recv(timeout=5).channel == "a/x"
    assert core_of(subscriber).counters.received == 1


def test_a_gap_is_told_with_its_range(reading: Reading) -> None:
    raw, subscriber = reading.pair("a")
    losses: list[Loss] = []
    subscriber.on_loss(losses.append)
    for seq in (4, 5, 8, 8, 7, 9):
        raw.data("a", seq, seq)
    assert payloads([subscriber.recv(timeout=5) for _ in range(4)]) == [4, 5, 8, 9]
    assert losses == [Loss(node_text(RAW), "a", 6, 7)]
    assert subscriber.lost == {node_text(RAW): 2}


def test_a_last_value_comes_once_and_what_it_skips_is_lost(reading: Reading) -> None:
    raw, subscriber = reading.pair("a/*")
    raw.data("a/1", 1, "heard")
    raw.last("a/1", 1, "heard")
    raw.last("a/1", 4, "new", time_ns=123)
    raw.data("a/1", 4, "new")
    raw.data("a/1", 5, "next")
    got = [subscriber.recv(timeout=5) for _ in range(3)]
    assert [(m.payload, m.seq) for m in got] == [("heard", 1), ("new", 4), ("next", 5)]
    assert got[1].time_ns == 123
    assert lost(subscriber) == 2


def test_a_last_value_that_was_not_asked_for_is_not_taken(reading: Reading) -> None:
    raw, subscriber = reading.pair("a/*")
    raw.last("b", 1, "not asked for")
    raw.last("a/b/c", 1, "not asked for")
    raw.last("a/b", 1, "asked for")
    assert subscriber.recv(timeout=5).payload == "asked for"


def test_a_last_value_is_taken_also_after_the_mark_of_its_quiet_topic(reading: Reading) -> None:
    raw, subscriber = reading.pair("a")
    raw.idle_mark("a", 7)
    raw.last("a", 7, "the last")
    assert subscriber.recv(timeout=5).payload == "the last"
    assert subscriber.lost == {}


def test_a_mark_in_parts_is_acknowledged_with_the_last(reading: Reading) -> None:
    raw, subscriber = reading.pair("a/*")
    raw.mark({"a/1": 7}, following=1)
    raw.data("a/1", 8, 8)
    assert subscriber.recv(timeout=5).payload == 8
    assert reading.marks == []
    raw.mark({"a/2": 3}, following=0)
    raw.data("a/1", 9, 9)
    assert subscriber.recv(timeout=5).payload == 9
    assert reading.marks == [(RAW, raw.address.decode(), False)]
    raw.data("a/2", 5, 5)
    raw.data("a/3", 2, 2)
    assert payloads([subscriber.recv(timeout=5) for _ in range(2)]) == [5, 2]
    assert lost(subscriber) == 2, "4 of a/2, and 1 of a/3, which is new since the mark"


def test_who_is_lost_to_is_bounded_and_counted_all_the_same(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SIGHTINGS_MAX", 2)
    raw, subscriber = reading.pair("a")
    for node_id in range(1, 5):
        raw.node_id = node_id
        raw.data("a", 1, 1)
        raw.data("a", 3, 3)
    assert len([subscriber.recv(timeout=5) for _ in range(8)]) == 8
    assert subscriber.lost == {node_text(1): 1, node_text(2): 1}
    assert core_of(subscriber).counters.lost == 4


# A tail that was lost


def test_a_lost_tail_shows_also_among_much_that_is_for_others(homes: Homes) -> None:
    net = Net(homes, buffer_messages=10)
    noise, wanted = net.publisher("a/x/d"), net.publisher("a/x/c")
    subscriber = net.subscriber("a/*/c")
    topics = net.topics["drop"]
    got: list[Message] = []
    sent = 0

    def told() -> int:
        nonlocal sent
        if len(got) == sent:  # on a busy machine there may have been room for one after all
            noise.send_many(bytes(1000) for _ in range(3000))
            wanted.send("dropped with the rest")
            sent += 1
            while topics._dirty:
                topics.tick()  # the marks of the topics are dropped with the rest
        got.extend(all_there(subscriber))
        return lost(subscriber)

    net.until(told)
    assert len(got) == sent - 1
    assert subscriber.lost == {node_text(PUBLISHER): 1}
    net.close()


def test_it_asks_where_a_publisher_stands_once_it_has_read_all_there_was(reading: Reading) -> None:
    raw, subscriber = reading.pair("a")
    core = core_of(subscriber)
    for n in (1, 2):
        raw.data("a", n, n)
        assert subscriber.recv(timeout=5).payload == n
        core.tick()
        assert not raw.socket.poll(0), "more came since the last look"
        core.tick()
        assert raw.heard(ASKED) == ASKED + raw.address
        assert raw.socket.recv() == b"\0?" + raw.address
    for _ in range(30):
        core.tick()
    raw.idle_mark("a", 5)
    tick_until(core, lambda: lost(subscriber) == 3)
    assert not raw.socket.poll(0), "it asks again only if it heard something since"


def test_it_asks_every_five_seconds_if_it_is_never_quiet(reading: Reading) -> None:
    raw, subscriber = reading.pair("a")
    seqs = itertools.count(1)

    def hear_and_tick() -> None:
        raw.data("a", seq := next(seqs), seq)
        assert subscriber.recv(timeout=5).payload == seq
        core_of(subscriber).tick()

    for _ in range(20):
        hear_and_tick()
    assert not raw.socket.poll(0)
    hear_and_tick()
    assert raw.heard(ASKED) == ASKED + raw.address


# A flood


class Flood:
    """In the place of ZeroMQ: there is always one more to read, on every socket."""

    def __init__(self, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.topic = topic
        self.left = 1 << 30
        self.seqs: dict[zmq.Socket[bytes], Iterator[int]] = {}
        monkeypatch.setattr(turns, "read_first", self.read_first)

    def read_first(self, socket: zmq.Socket[bytes], *, sure: bool) -> bytes | None:
        if not self.left:
            return None
        self.left -= 1
        seq = next(self.seqs.setdefault(socket, itertools.count(1)))
        sender = [*self.seqs].index(socket)
        body = codec.pack_body([codec.pack(seq)])
        return encode(wire_name(self.topic), Kind.DATA, body, sender=sender, seq=seq)

    @property
    def read(self) -> int:
        return (1 << 30) - self.left


def attached(core: Subscription) -> Subscriber:
    """To somebody who is not there, so that the mark that is awaited never comes."""
    core.attach(8, Offer(1, "publish", "any"), "ipc:///nowhere")
    assert core.expects_mark
    return Subscriber(core, None, lambda: None)


@pytest.mark.parametrize(
    ("topic", "latest_only"), [("a/b", False), ("a/b", True), ("a/x/y", False), ("a/x/y", True)]
)
def test_no_reading_goes_on_for_as_long_as_there_is_something_to_read(
    reading: Reading, monkeypatch: pytest.MonkeyPatch, topic: str, latest_only: bool
) -> None:
    """Nor holds the lock for so long: what is for others included."""
    core = reading.core("a/*", latest_only=latest_only)
    subscriber = attached(core)
    flood = Flood(topic, monkeypatch)
    received = 0
    readings: list[Callable[[], object]] = [
        core.read_ahead,
        core.tick,
        lambda: subscriber.recv(timeout=0),
        lambda: subscriber.recv_many(timeout=0),
        lambda: subscriber.recv(timeout=0.01),
    ]
    for each in readings:
        before = flood.read
        try:
            each()
            received += 1
        except Timeout:
            assert topic == "a/x/y", "there was one to receive"
        assert flood.read - before <= 20_000
    assert len(core.inbox) <= limits.BUFFER_MESSAGES


def test_what_is_read_ahead_is_bounded(reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    core = reading.core("a/*")
    attached(core)
    Flood("a/b", monkeypatch)
    for _ in range(5):
        core.tick()
    assert len(core.inbox) == limits.BUFFER_MESSAGES


def test_whoever_stops_reading_before_the_end_has_the_others_go_on(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And himself: for what is left over, no socket signals again."""
    core = reading.core("a/*")
    attached(core)
    flood = Flood("a/x/y", monkeypatch)
    woken: list[int] = []
    monkeypatch.setattr(core.link, "wake_all", lambda: woken.append(flood.read))
    assert core.take() is None
    assert woken == [flood.read]
    flood.left = 0
    assert core.take() is None
    assert len(woken) == 1


def test_a_busy_transport_does_not_keep_the_other_one_waiting(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = reading.core("a")
    core.attach(8, Offer(1, "publish", "any"), "ipc:///nowhere")
    core.attach(9, Offer(1, "publish", "any"), "tcp://127.0.0.1:9")
    flood = Flood("a", monkeypatch)
    flood.left = 100
    assert len(core.take_many(100) or []) == 100
    assert [next(seqs) for seqs in flood.seqs.values()] == [51, 51]


def test_latest_only_gives_the_newest_that_is_there(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = reading.core("a", latest_only=True)
    subscriber = attached(core)
    flood = Flood("a", monkeypatch)
    flood.left = 2500
    assert subscriber.recv(timeout=0).payload == 2500
    flood.left = 2500
    assert payloads(subscriber.recv_many(timeout=0)) == [5000]
    assert core.counters.dropped["superseded"] == 2 * 2499


def test_latest_values_are_bounded(reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TRACKED_CHANNELS_MAX", 2)
    raw, subscriber = reading.pair("*", latest_only=True)
    core = core_of(subscriber)
    for topic in "abc":
        raw.data(topic, 1, topic)
    tick_until(core, lambda: core.counters.received == 3)
    assert payloads(subscriber.recv_many(timeout=0)) == ["a", "b"]
    assert core.counters.dropped["too many channels"] == 1


# Several receivers


def test_recv_many_gives_no_more_than_it_was_asked_for(reading: Reading) -> None:
    raw, subscriber = reading.pair("a")
    for seq in range(1, 11):
        raw.data("a", seq, seq)
    until(lambda: core_of(subscriber).link.readable(), "them")
    got: list[Message] = []
    while len(got) < 10:
        some = subscriber.recv_many(timeout=5, count_max=3)
        assert 1 <= len(some) <= 3
        got += some
    assert payloads(got) == list(range(1, 11))
    core_of(subscriber).arrivals.give_back(got)
    assert payloads(subscriber.recv_many(timeout=0, count_max=3)) == [1, 2, 3]
    for bad in (0, -1, limits.RECV_MANY_MAX + 1, True, 1.5):
        with pytest.raises(InvalidOption, match="count_max must be an integer from 1 to"):
            subscriber.recv_many(timeout=0, count_max=bad)  # type: ignore[arg-type]


def test_recv_many_reads_on_where_many_bytes_held_nothing_new(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RECV_MANY_BYTES", 1)
    raw, subscriber = reading.pair("a")
    raw.data("a", 1, "heard")
    assert subscriber.recv(timeout=5).payload == "heard"
    raw.data("a", 1, "heard")
    raw.data("a", 2, "new")
    until(lambda: core_of(subscriber).link.readable(), "the first")
    time.sleep(0.05)  # and the second
    with long_before_its_deadline():
        assert payloads(subscriber.recv_many(timeout=10)) == ["new"]


def test_what_cancelled_receivers_had_taken_is_received_in_order(net: Net) -> None:
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    core = core_of(subscriber)

    async def run() -> None:
        receivers = [
            asyncio.ensure_future(subscriber.arecv()),
            asyncio.ensure_future(subscriber.arecv_many(count_max=2)),
            asyncio.ensure_future(subscriber.arecv()),
        ]
        await asyncio.sleep(0)
        publisher.send_many(range(6))
        until(lambda: all_in(core, receivers), "messages for all")
        for receiver in receivers:
            receiver.cancel()
        for outcome in await asyncio.gather(*receivers, return_exceptions=True):
            assert isinstance(outcome, asyncio.CancelledError)

    def all_in(core: Subscription, receivers: list[Any]) -> bool:
        """Each has its messages, and none of them has run since."""
        waiter = core.link.loops[asyncio.get_running_loop()]
        waiter._look()
        return not waiter._calls

    asyncio.run(run())
    assert payloads([subscriber.recv(timeout=5) for _ in range(6)]) == list(range(6))


def test_of_what_a_cancelled_receiver_had_taken_latest_only_keeps_the_newest(
    reading: Reading,
) -> None:
    core = reading.core("a", latest_only=True)
    old, new = (Message(n, 0, Origin("a", "s", n, 0)) for n in (1, 2))
    core.arrivals.give_back([old])
    assert core.take() == old
    core.arrivals._deliver(0, Run([2], 0, Origin("a", "s", 2, 0)), 1)
    core.arrivals.give_back([old])
    assert [core.take(), core.take()] == [new, None]


# Publishers that come, move and leave


def ticks(core: Subscription, count: int = 20) -> None:
    """As many as it takes for whoever left to be disconnected."""
    for _ in range(count):
        core.tick()


def test_what_a_publisher_sent_before_it_left_is_received(net: Net) -> None:
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    core = core_of(subscriber)
    publisher.send_many(range(50))
    tick_until(core, lambda: core.inbox)
    net.detach(core)
    ticks(core)
    assert payloads([subscriber.recv(timeout=5) for _ in range(50)]) == list(range(50))
    net.until(lambda: not core._retiring)
    net.until(lambda: not net.topics["drop"]._readers)


def test_whoever_left_is_not_disconnected_while_there_is_more_to_read(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be of his: also if all that was read so far was for others."""
    core = reading.core("a/*")
    attached(core)
    core.detach(8, 1, "died")
    flood = Flood("a/x/y", monkeypatch)
    ticks(core)
    assert core._retiring
    flood.left = 0
    ticks(core, 1)
    assert not core._retiring


def test_a_publisher_that_left_may_still_be_flushing(net: Net) -> None:
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    net.detach(core_of(subscriber))
    ticks(core_of(subscriber), 5)
    publisher.send("late")
    assert subscriber.recv(timeout=5).payload == "late"


@pytest.mark.parametrize("unread", [[], ["what comes is read ahead of this"]])
def test_who_is_back_before_it_was_disconnected_stays_and_is_asked_where_it_stands(
    net: Net, unread: list[str]
) -> None:
    """Its mark may have come when there was no control link to say so by."""
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    core = core_of(subscriber)
    [before] = (list(r.connections) for r in net.topics["drop"]._readers._readers.values())
    publisher.send_many(unread)
    tick_until(core, lambda: len(core.inbox) == len(unread))
    net.detach(core)
    ticks(core, 3)
    net.attach(core)
    ticks(core)
    [after] = (list(r.connections) for r in net.topics["drop"]._readers._readers.values())
    assert after == before
    assert not core._retiring
    publisher.send("still here")
    expected = [*unread, "still here"]
    assert payloads([subscriber.recv(timeout=5) for _ in expected]) == expected
    assert subscriber.lost == {}


def test_the_same_offer_again_changes_nothing(net: Net) -> None:
    core = core_of(net.subscriber("a"))
    core.attach(PUBLISHER, Offer(1, "publish", "any"), net.endpoint("drop"))
    assert not core.expects_mark
    [reader] = net.topics["drop"]._readers._readers.values()
    assert len(reader.connections) == 1


def test_a_publisher_of_two_topics_that_closes_one_is_not_left(reading: Reading) -> None:
    raw, subscriber = reading.pair("*")
    core = core_of(subscriber)
    core.attach(RAW, Offer(2, "publish", "second"), raw.endpoint)
    core.detach(RAW, 1, "withdrawn")
    assert not core._retiring
    core.detach(RAW, 2, "withdrawn")
    assert [*core._retiring] == [raw.endpoint]


def test_nothing_more_is_awaited_of_a_publisher_that_left(reading: Reading) -> None:
    core = reading.core("a")
    attached(core)
    core.detach(8, 1, "died")
    assert not core.expects_mark


def test_a_publisher_that_moved_is_followed_with_all_its_topics(reading: Reading) -> None:
    """Each of its offers is taken back and made again, one after the other."""
    old, subscriber = reading.pair("*")
    core = core_of(subscriber)
    core.attach(RAW, Offer(2, "publish", "second"), old.endpoint)
    new = reading.raw("moved")
    for key, topic in ((1, "any"), (2, "second")):
        core.detach(RAW, key, "moved")
        core.attach(RAW, Offer(key, "publish", topic), new.endpoint)
    assert new.heard(b"\1@")
    assert [*core._retiring] == [old.endpoint]
    core.detach(RAW, 1, "withdrawn")
    assert new.endpoint not in core._retiring
    old.data("a", 1, "on its way")
    assert subscriber.recv(timeout=5).payload == "on its way"
    new.data("a", 2, "from there")
    assert subscriber.recv(timeout=5).payload == "from there"
    ticks(core)
    assert not core._retiring


def test_those_that_left_are_bounded_also_if_nobody_reads(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PEERS_MAX", 3)
    raw, subscriber = reading.pair("a")
    core = core_of(subscriber)
    raw.data("a", 1, "never taken")
    tick_until(core, lambda: core.inbox)
    for peer in range(100, 110):
        core.attach(peer, Offer(1, "publish", "a"), f"ipc:///nowhere/{peer}")
        core.detach(peer, 1, "died")
        core.tick()
    assert [*core._retiring] == [f"ipc:///nowhere/{peer}" for peer in (107, 108, 109)]
    assert core.counters.dropped["left unread"] == 7


def test_whoever_closes_says_so_to_its_publishers(reading: Reading) -> None:
    """It does not leave it to the end of its connection, which a forked child may hold open."""
    raw, subscriber = reading.pair("a")
    subscriber.close()
    while (said := raw.socket.recv(copy=False)).bytes != b"\0" + raw.address:
        pass
    assert said.get(zmq.SRCFD), "what libzmq tells of an end came by no connection"


@pytest.mark.parametrize("buffer_messages", [1, 2])
def test_a_small_buffer_has_room_for_all_it_subscribes_to(
    homes: Homes, buffer_messages: int
) -> None:
    net = Net(homes, buffer_messages=buffer_messages)
    publisher, below = net.publisher("a"), net.publisher("a/b")
    subscriber = net.subscriber("a/**")
    for each in (publisher, below):
        each.send(each.channel)
        assert subscriber.recv(timeout=5).payload == each.channel
    net.close()


# Over its own limit


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_after_a_message_over_its_limit_a_subscriber_comes_back_and_counts_what_it_missed(
    homes: Homes, scheme: str
) -> None:
    """libzmq ends the connection for it, and does not dial again."""
    net = Net(homes, **NETWORKED)
    net.subscribing.transport.message_bytes_max = 10_000
    publisher, subscriber = net.publisher("a"), net.subscriber("a", scheme=scheme)
    core = core_of(subscriber)
    publisher.send("before")
    publisher.send(random.randbytes(200_000))  # or over tcp it would be small
    assert subscriber.recv(timeout=5).payload == "before"
    net.until(lambda: core.counters.dropped["connection lost"])
    net.until(lambda: not core.expects_mark)
    publisher.send("after")
    assert subscriber.recv(timeout=5).payload == "after"
    assert subscriber.lost == {node_text(PUBLISHER): 1}
    assert core.counters.dropped["connection lost"] == 1
    net.close()


def test_what_was_read_before_that_is_not_thrown_away(homes: Homes) -> None:
    net = Net(homes)
    net.subscribing.transport.message_bytes_max = 10_000
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    core = core_of(subscriber)
    publisher.send_many(range(50))
    publisher.send(bytes(200_000))
    net.until(lambda: core._watches["ipc"]._silent)
    ticks(core)
    assert payloads([subscriber.recv(timeout=5) for _ in range(50)]) == list(range(50))
    net.until(lambda: core.counters.dropped["connection lost"])
    net.close()


def test_who_comes_back_by_itself_is_counted_by_its_publisher_without_receiving(net: Net) -> None:
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    publisher.send("taken by nobody")
    net.until(lambda: core_of(subscriber).inbox)
    topics = net.topics["drop"]
    [reader] = topics._readers._readers.values()
    for connection in reader.connections:
        connection.cut()
    net.until(lambda: not topics._readers)
    net.until(lambda: topics._readers)


def test_nobody_is_told_there_is_nothing_when_another_took_what_was_read(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a thread that finds the inbox filled, and then empty: another popped without the lock."""
    raw, subscriber = reading.pair("a")
    for seq in range(1, 4):
        raw.data("a", seq, seq)
    assert subscriber.recv(timeout=5).payload == 1
    core = subscriber._core
    until(lambda: core._fill(1, 1))
    core.inbox.make()
    pop = core.arrivals.pop
    stolen: list[Message] = []

    def popped() -> Message | None:
        if core.inbox.made and not stolen:
            stolen.append(core.inbox.made.popleft())
        return pop()

    until(core.link.readable)
    monkeypatch.setattr(core.arrivals, "pop", popped)
    with core.link.lock:
        message = core.take()
    assert message is not None
    assert message.payload == 3
    assert [message.payload for message in stolen] == [2]
