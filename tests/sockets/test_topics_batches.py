"""Topics whose messages share frames: what the guarantees promise holds all the same. Where time is
not the point, the test says itself when a window is over (`ByHand`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import msgspec
import pytest
import zmq

from mesh import limits
from mesh.errors import Closed, NotSerializable, PayloadTooLarge, Timeout
from mesh.message import Loss, Message
from mesh.options import WhenFull
from mesh.sockets import codec
from mesh.sockets import topics as topics_module
from mesh.sockets.batch import ALONE_BYTES_MIN, Batch, Item
from mesh.sockets.frame import Frame, Kind, wire_name
from mesh.sockets.parts import send_parts
from mesh.sockets.publisher import Publisher
from mesh.sockets.subscriber import Subscriber
from mesh.sockets.topics import Topics
from tests.support.homes import ByHand
from tests.support.topics import ADDRESS, Net, RawSubscriber, all_there, fill, payloads
from tests.support.waiting import until

WINDOW_S = 0.0005
MODES: tuple[WhenFull, ...] = ("drop", "wait")
both_modes = pytest.mark.parametrize("when_full", MODES)


@pytest.fixture
def net(nets: Callable[..., Net]) -> Net:
    """With batches closed `ByHand`."""
    return nets(window_s=None)


@pytest.fixture(autouse=True)
def never_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is, one message follows another closely."""
    monkeypatch.setattr(topics_module, "BUSY_S", 3600.0)


def hand(net: Net) -> ByHand:
    flusher = net.publishing.flusher
    assert isinstance(flusher, ByHand)
    return flusher


def all_leave(net: Net) -> None:
    """Two windows pass: in one of which something was sent, the rest may stay until the next."""
    hand(net).turn()
    hand(net).turn()


def pause(publisher: Publisher) -> None:
    """As if nothing had been sent for long."""
    publisher._topic.sent_at = publisher._topics._looked_at = -1e9


@contextlib.contextmanager
def listening(net: Net, when_full: WhenFull = "drop") -> Iterator[RawSubscriber]:
    """Who counts the frames of ``a``."""
    raw = RawSubscriber(net.endpoint(when_full), hwm=100_000)
    with contextlib.closing(raw):
        raw.subscribe(wire_name("a"), ADDRESS)
        assert raw.next(net.topics[when_full]).kind == Kind.MARK
        yield raw


def frames(raw: RawSubscriber, topics: Topics, messages: int) -> list[Frame]:
    """The frames in which so many messages come."""
    got: list[Frame] = []
    while sum(frame.count for frame in got) < messages:
        got.append(raw.next(topics))
    return got


def received(subscriber: Subscriber, count: int) -> list[Message]:
    return [subscriber.recv(timeout=10) for _ in range(count)]


# -- When messages share a frame


def test_the_first_after_a_pause_leaves_at_once_and_wakes_no_thread(
    nets: Callable[..., Net],
) -> None:
    net = nets(window_s=WINDOW_S)
    publisher = net.publisher("a")
    with listening(net) as raw:
        for i in range(5):
            pause(publisher)
            publisher.send(i)
            frame = raw.next(net.topics["drop"])
            assert (frame.seq, frame.count) == (i + 1, 1)
    assert net.publishing.flusher._thread is None


@pytest.mark.parametrize("ends", [False, True])
def test_what_follows_closely_shares_frames(net: Net, ends: bool) -> None:
    """They leave when they are full, or old; that of the rest is the last of them here."""
    publisher, topics = net.publisher("a"), net.topics["drop"]
    with listening(net) as raw:
        publisher.send_many(range(1100))
        assert [frame.count for frame in frames(raw, topics, 1025)] == [1, 512, 512]
        assert not raw.socket.poll(0)
        if ends:
            all_leave(net)
        else:
            publisher.send("large" * 10_000)
        (rest,) = frames(raw, topics, 75)
        assert (rest.seq, rest.count) == (1026, 75)


def test_a_channel_that_was_busy_falls_back_to_single_messages(net: Net) -> None:
    publisher, topics = net.publisher("a"), net.topics["drop"]
    with listening(net) as raw:
        publisher.send_many(range(3))
        assert hand(net).turn() == [True], "sent"
        assert hand(net).turn() == [True], "nothing came meanwhile"
        assert hand(net).turn() == [], "nothing to look after"
        pause(publisher)
        publisher.send(3)
        assert [frame.count for frame in frames(raw, topics, 4)] == [1, 2, 1]


def test_a_channel_that_is_busy_stays_so(net: Net) -> None:
    """While something is sent in each window."""
    publisher = net.publisher("a")
    publisher.send_many(range(2))
    for i in range(5):
        hand(net).turn()
        publisher.send(i)
        assert len(publisher._batch.items) == 1, "it waits for others"
        publisher.send_many(range(600))  # a full frame leaves without the flusher
        hand(net).turn()
        assert net.topics["drop"]._open


def test_a_batch_left_alone_leaves_after_its_window(nets: Callable[..., Net]) -> None:
    net = nets(window_s=WINDOW_S)
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    for _ in range(20):
        publisher.send_many(range(3))
        assert payloads(received(subscriber, 3)) == [0, 1, 2]
    until(lambda: not net.topics["drop"]._open and not net.publishing.flusher._cores)


def test_each_topic_has_a_batch_of_its_own(net: Net) -> None:
    topics = [net.publisher(name) for name in "abc"]
    subscriber = net.subscriber("*")
    for i in range(30):
        topics[i % 3].send(i)
    assert payloads(received(subscriber, 3)) == [0, 1, 2], "the first of each"
    hand(net).turn()
    got = received(subscriber, 27)
    for i, name in enumerate("abc"):
        of_topic = [(message.seq, message.payload) for message in got if message.channel == name]
        assert of_topic == [(n + 1, 3 * n + i) for n in range(1, 10)]


def test_a_window_of_nothing_means_no_batches(nets: Callable[..., Net]) -> None:
    net = nets(window_s=0)
    publisher = net.publisher("a")
    with listening(net) as raw:
        publisher.send_many(range(10))
        assert [frame.count for frame in frames(raw, net.topics["drop"], 10)] == [1] * 10


# -- What is sent arrives as it was sent, in order

KINDS: tuple[Callable[[int], Any], ...] = (
    lambda i: i.to_bytes(4, "big"),
    lambda i: f"text {i}",
    lambda i: {"i": i, "list": [1, None, 2.5]},
    lambda i: i,
    lambda i: i / 7,
    lambda i: None,
    lambda i: bytes([i % 256]) * 4096,  # the largest that shares
    lambda i: bytes([i % 256]) * 4097,
    lambda i: "x" * 5000,
    lambda i: bytes([i % 256]) * 100_000,  # a part of its own
    lambda i: bytearray(b"buffer"),
)


@both_modes
@pytest.mark.parametrize("seed", range(5))
def test_messages_of_all_kinds_keep_their_order(net: Net, when_full: WhenFull, seed: int) -> None:
    luck = random.Random(seed)
    publishers = {name: net.publisher(name, when_full=when_full) for name in ("a", "b")}
    subscriber = net.subscriber("*")
    sent: dict[str, list[Any]] = {"a": [], "b": []}
    for i in range(300):
        name = luck.choice("aab")
        kind = luck.choice(KINDS if luck.random() < 0.2 else KINDS[:6])
        headers = {"n": i} if luck.random() < 0.05 else {}
        publishers[name].send(kind(i), headers=headers or None, timeout=5)
        sent[name].append((kind(i), headers))
        if luck.random() < 0.05:
            hand(net).turn()
    all_leave(net)
    got = received(subscriber, 300)
    for name, expected in sent.items():
        of_topic = [message for message in got if message.channel == name]
        assert [(message.payload, message.headers) for message in of_topic] == expected
        assert [message.seq for message in of_topic] == list(range(1, len(expected) + 1))
    assert subscriber.lost == {}


def sending_threads(publisher: Publisher, threads: int, each: int) -> list[threading.Thread]:
    def send(thread: int) -> None:
        for i in range(each):
            publisher.send([thread, i], timeout=20)

    started = [threading.Thread(target=send, args=(thread,)) for thread in range(threads)]
    for thread in started:
        thread.start()
    return started


@pytest.mark.slow
@pytest.mark.parametrize(("when_full", "room"), [("drop", 100_000), ("wait", 100_000), ("wait", 1)])
def test_eight_threads_send_and_each_ones_order_is_kept(
    nets: Callable[..., Net], when_full: WhenFull, room: int
) -> None:
    """With much room, and with little and a reader that is slow."""
    room_bytes = room * limits.SLOT_BYTES_MIN
    net = nets(window_s=WINDOW_S, buffer_messages=room, buffer_bytes=room_bytes)
    publisher, subscriber = net.publisher("a", when_full=when_full), net.subscriber("a")
    threads = sending_threads(publisher, 8, 1500)
    got: list[Message] = []
    while len(got) < 8 * 1500:
        got.append(subscriber.recv(timeout=10))
        if room == 1 and len(got) % 1000 == 0:
            threading.Event().wait(0.01)
    for thread in threads:
        thread.join()
    assert [message.seq for message in got] == list(range(1, 12_001))
    for number in range(8):
        assert [i for t, i in payloads(got) if t == number] == list(range(1500))
    with pytest.raises(Timeout):
        subscriber.recv(timeout=0.01)
    assert subscriber.lost == {}
    counters = net.topics[when_full].counters
    assert (counters.sent, dict(counters.dropped)) == (12_000, {})
    assert publisher._topic.frames < 6000, "they shared frames"


@pytest.mark.slow
def test_of_eight_receiving_threads_none_sleeps_while_there_are_messages(
    nets: Callable[..., Net],
) -> None:
    """No control thread is at work here, which would wake them in the end."""
    net = nets(window_s=WINDOW_S)
    publisher, subscriber = net.publisher("a", when_full="wait"), net.subscriber("a")
    got: list[list[Any]] = [[] for _ in range(8)]
    left = threading.Semaphore(0)

    def receive(thread: int) -> None:
        with contextlib.suppress(Closed):
            while True:
                got[thread].append(subscriber.recv().payload)
                left.release()

    threads = [threading.Thread(target=receive, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    luck = random.Random(1)
    total = 0
    for _ in range(300):
        burst = luck.choice([1, 2, 8, 100])
        publisher.send_many(range(total, total + burst), timeout=5)
        total += burst
        for i in range(burst):
            assert left.acquire(timeout=10), f"{i} of {burst} came"
    subscriber.close()
    for thread in threads:
        thread.join()
    assert sorted(chain.from_iterable(got)) == list(range(total))
    assert all(each == sorted(each) for each in got)


def test_latest_only_keeps_the_newest_of_a_batch(net: Net) -> None:
    publisher, subscriber = net.publisher("a"), net.subscriber("a", latest_only=True)
    publisher.send_many(range(100))
    hand(net).turn()
    net.until(lambda: subscriber._core.counters.received == 100)
    assert subscriber.recv(timeout=5).payload == 99
    assert subscriber._core.counters.dropped == {"superseded": 99}


# -- Loss


@both_modes
def test_a_lost_frame_is_a_gap_of_all_its_messages(
    net: Net, monkeypatch: pytest.MonkeyPatch, when_full: WhenFull
) -> None:
    """For who was there, and for who came when the batch was open already."""
    publisher, early = net.publisher("a", when_full=when_full), net.subscriber("a")
    losses: list[Loss] = []
    early.on_loss(losses.append)
    publisher.send_many(range(10))
    late = net.subscriber("a")
    with monkeypatch.context() as patch:
        on_its_way = when_full == "wait"  # there without room it would not be lost
        patch.setattr(topics_module, "send_parts", lambda socket, parts: on_its_way)
        hand(net).turn()
    publisher.send_many(range(10, 13))
    hand(net).turn()
    assert payloads(received(early, 4)) == [0, 10, 11, 12]
    assert payloads(received(late, 3)) == [10, 11, 12]
    assert [(loss.first, loss.last) for loss in losses] == [(2, 10)]
    assert list(early.lost.values()) == list(late.lost.values()) == [9]
    dropped = {} if on_its_way else {"subscriber full": 9}
    assert net.topics[when_full].counters.dropped == dropped


@pytest.mark.slow
def test_what_a_stopped_reader_has_no_room_for_is_counted_exactly(
    nets: Callable[..., Net],
) -> None:
    net = nets(window_s=WINDOW_S, buffer_messages=2)
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    losses: list[Loss] = []
    subscriber.on_loss(losses.append)
    total, got = 0, []
    for _ in range(3):
        publisher.send_many([total + i, bytes(1000)] for i in range(10_000))
        total += 10_000
        got += all_there(subscriber)
    publisher.send("end")  # alone or not: what was dropped last shows in a mark
    total += 1
    net.until(lambda: not net.topics["drop"]._open)

    def all_known() -> bool:
        got.extend(all_there(subscriber))
        return len(got) + sum(subscriber.lost.values()) == total

    net.until(all_known)
    assert subscriber.lost, "there was too little room"
    numbers = [message.seq for message in got]
    for loss in losses:
        numbers += range(loss.first, loss.last + 1)
    assert sorted(numbers) == list(range(1, total + 1))
    assert [message.payload[0] for message in got if message.payload != "end"] == [
        message.seq - 1 for message in got if message.payload != "end"
    ]


@both_modes
def test_a_quiet_topic_with_an_open_batch_marks_what_was_sent(
    net: Net, when_full: WhenFull
) -> None:
    publisher, subscriber = net.publisher("a", when_full=when_full), net.subscriber("a")
    publisher.send_many(range(10))
    for _ in range(5):
        net.tick()
    assert payloads(received(subscriber, 1)) == [0]
    assert subscriber.lost == {}
    hand(net).turn()
    assert payloads(received(subscriber, 9)) == list(range(1, 10))
    for _ in range(5):
        net.tick()
    assert subscriber.lost == {}


# -- Newcomers


@both_modes
@pytest.mark.parametrize("keep_last", [False, True])
def test_who_comes_while_a_batch_is_open_gets_it_and_counts_nothing_as_lost(
    net: Net, when_full: WhenFull, keep_last: bool
) -> None:
    publisher = net.publisher("a", when_full=when_full, keep_last=keep_last)
    publisher.send_many(range(5))
    subscriber = net.subscriber("a")
    hand(net).turn()
    expected = [0, 1, 2, 3, 4] if keep_last else [1, 2, 3, 4]
    got = received(subscriber, len(expected))
    assert payloads(got) == expected
    assert [message.seq for message in got] == [each + 1 for each in expected]
    for _ in range(5):
        net.tick()
    assert (all_there(subscriber), subscriber.lost) == ([], {})


@both_modes
@pytest.mark.parametrize("last", [b"bytes", {"of": "a batch"}, "x" * 5000, bytes(100_000)])
def test_a_newcomer_gets_the_very_last_message(net: Net, when_full: WhenFull, last: Any) -> None:
    publisher = net.publisher("a", when_full=when_full, keep_last=True)
    publisher.send_many([1, 2, 3, last])
    hand(net).turn()
    subscriber = net.subscriber("a")
    message = subscriber.recv(timeout=5)
    assert (message.payload, message.seq, message.headers) == (last, 4, {})
    publisher.send(5, headers={"h": 1})
    message = net.subscriber("a").recv(timeout=5)
    assert (message.payload, message.seq, message.headers) == (5, 5, {"h": 1})
    assert payloads(received(subscriber, 1)) == [5]
    assert subscriber.lost == {}


# -- Publishers that wait


@pytest.mark.slow
def test_a_timeout_means_that_this_message_was_not_sent_and_all_others_were(
    nets: Callable[..., Net],
) -> None:
    net = nets(window_s=WINDOW_S, buffer_messages=2)
    publisher, subscriber = net.publisher("a", when_full="wait"), net.subscriber("a")
    sent, got, refused = [], [], 0
    luck = random.Random(2)
    for i in range(20_000):
        try:
            publisher.send([i, bytes(1000)], timeout=luck.choice([0, 0, 0.001]))
        except Timeout:
            refused += 1
            if refused % 50 == 0:
                got += all_there(subscriber)
        else:
            sent.append(i)
    while len(got) < len(sent):
        got += subscriber.recv_many(timeout=10)
    assert refused > 100
    assert [message.payload[0] for message in got] == sent
    net.until(lambda: not net.topics["wait"]._dirty)
    assert (all_there(subscriber), subscriber.lost) == ([], {})


def test_a_batch_without_room_stays_open_until_there_is_some(nets: Callable[..., Net]) -> None:
    """It does not fall back to single messages and open again, over and over."""
    net = nets(window_s=None, buffer_messages=1)
    publisher, subscriber = net.publisher("a", when_full="wait"), net.subscriber("a")
    sent = fill(publisher)
    topic, flusher = publisher._topic, hand(net)
    waiting = len(topic.batch.items)
    assert waiting > 100
    flusher.turn()  # something was sent since the last one
    for _ in range(5):
        assert flusher.turn() == [False], "nothing could be sent"
        assert topic in net.topics["wait"]._open
        assert len(topic.batch.items) == waiting
    got: list[Message] = []
    while len(got) < sent:
        got += all_there(subscriber)
        flusher.turn()
    assert [message.payload[0] for message in got] == list(range(sent))
    flusher.turn()
    assert flusher.turn() == []
    assert not net.topics["wait"]._open


def test_one_topic_without_room_is_no_reason_to_look_at_the_others_more_rarely(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, other = (net.publisher(name, when_full="wait") for name in ("full", "other"))
    for publisher in (full, other):
        publisher.send_many(range(3))

    def gate(socket: Any, parts: list[bytes]) -> bool:
        return not parts[0].startswith(wire_name("full")) and send_parts(socket, parts)

    monkeypatch.setattr(topics_module, "send_parts", gate)
    assert hand(net).turn() == [True]
    other.send_many(range(3))
    assert hand(net).turn() == [True]
    assert hand(net).turn() == [False], "that of the other is shut"


# -- Closing


@both_modes
def test_closing_sends_what_open_batches_hold(net: Net, when_full: WhenFull) -> None:
    publisher, subscriber = net.publisher("a", when_full=when_full), net.subscriber("a")
    publisher.send_many(range(700))
    net.topics[when_full].close(1000)
    assert payloads(received(subscriber, 700)) == list(range(700))
    assert not net.topics[when_full].counters.dropped
    assert hand(net)._cores == {}, "nothing to look after any more"
    with pytest.raises(Closed):
        publisher.send("too late")


def test_closing_counts_what_there_was_no_room_for(
    nets: Callable[..., Net], caplog: pytest.LogCaptureFixture
) -> None:
    net = nets(window_s=None, buffer_messages=1)
    publisher, subscriber = net.publisher("a", when_full="wait"), net.subscriber("a")
    sent = fill(publisher)
    with caplog.at_level(logging.WARNING, "mesh.sockets.topics"):
        net.topics["wait"].close(1000)
    left = net.topics["wait"].counters.dropped["not sent when closed"]
    assert left > 100
    assert f"{left} messages had no room to leave" in caplog.text
    got: list[Message] = []
    with contextlib.suppress(Timeout):
        while True:
            got += subscriber.recv_many(timeout=0.3)
    assert len(got) + left == sent
    assert subscriber.lost == {}


class Hooked(list[Item]):
    """The items of a batch, with something that happens just when a sender has appended one."""

    def __init__(self, then: Callable[[], object]) -> None:
        self.then = then

    def append(self, item: Item) -> None:
        super().append(item)
        self.then()


def packing(monkeypatch: pytest.MonkeyPatch, first: Callable[[], object]) -> None:
    """Something happens when a sender has seen that there is room, and before it appends."""
    pack = codec.pack

    def packing(value: Any) -> bytes:
        monkeypatch.setattr(codec, "pack", pack)
        first()
        return pack(value)

    monkeypatch.setattr(codec, "pack", packing)


def test_a_message_appended_just_after_the_close_is_refused(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    publisher.send_many(range(3))
    packing(monkeypatch, lambda: net.topics["drop"].close(1000))
    with pytest.raises(Closed):
        publisher.send("too late")
    assert payloads(received(subscriber, 3)) == [0, 1, 2]
    assert publisher._topic.batch.items == []


@pytest.mark.parametrize("has_room", [True, False])
def test_a_message_appended_just_before_the_close_is_sent_or_counted_and_not_refused(
    net: Net, monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    publisher, subscriber = net.publisher("a", when_full="wait"), net.subscriber("a")
    topics = net.topics["wait"]
    publisher.send_many(range(2))
    hand(net).turn()
    if not has_room:
        monkeypatch.setattr(topics_module, "send_parts", lambda socket, parts: False)
    publisher._topic.batch.items = Hooked(lambda: topics.close(1000))
    publisher.send("just in time")
    assert topics.counters.dropped["not sent when closed"] == (not has_room)
    assert payloads(received(subscriber, 2 + has_room)) == [0, 1, "just in time"][: 2 + has_room]


@pytest.mark.parametrize("has_room", [True, False])
def test_a_message_appended_just_after_the_batch_was_shut_leaves_all_the_same(
    net: Net, monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    """At once, or where there is no room when there is."""
    publisher, subscriber = net.publisher("a", when_full="wait"), net.subscriber("a")
    publisher.send_many(range(2))
    hand(net).turn()
    packing(monkeypatch, lambda: hand(net).turn())  # quiet for a window: it is shut
    with monkeypatch.context() as patch:
        if not has_room:
            patch.setattr(topics_module, "send_parts", lambda socket, parts: False)
        publisher.send("late")
    assert bool(publisher._topic.batch.items) is not has_room
    assert len(hand(net).turn()) == (not has_room)
    assert payloads(received(subscriber, 3)) == [0, 1, "late"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when_full", "has_room"), [("drop", True), ("wait", True), ("wait", False)]
)
def test_a_send_that_races_with_the_close_is_refused_delivered_or_counted(
    nets: Callable[..., Net],
    monkeypatch: pytest.MonkeyPatch,
    when_full: WhenFull,
    has_room: bool,
) -> None:
    luck = random.Random(3)
    full = threading.Event()

    def gate(socket: zmq.Socket[bytes], parts: list[bytes]) -> bool:
        return not full.is_set() and send_parts(socket, parts)

    monkeypatch.setattr(topics_module, "send_parts", gate)
    for _ in range(25):
        full.clear()
        net = nets(
            window_s=luck.choice([WINDOW_S, 60]),
            buffer_messages=100_000,
            buffer_bytes=100_000 * limits.SLOT_BYTES_MIN,
        )
        publisher, subscriber = net.publisher("a", when_full=when_full), net.subscriber("a")
        sent: list[list[Any]] = [[] for _ in range(4)]

        def send(thread: int, publisher: Publisher = publisher, sent: Any = sent) -> None:
            with contextlib.suppress(Closed):
                for i in range(1_000_000):
                    publisher.send([thread, i])
                    sent[thread].append(i)

        threads = [threading.Thread(target=send, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        until(lambda s=sent: sum(map(len, s)) > 100)  # type: ignore[misc]
        threading.Event().wait(luck.random() * 0.003)
        if not has_room:
            full.set()
            threading.Event().wait(luck.choice([0, 0.0002, 0.002]))
        topics = net.topics[when_full]
        topics.close(2000)
        for thread in threads:
            thread.join()
        total = sum(map(len, sent))
        left = topics.counters.dropped["not sent when closed"]
        got: list[Message] = []
        while len(got) < total - left:
            got += subscriber.recv_many(timeout=5)
        with pytest.raises(Timeout):
            subscriber.recv(timeout=0.002)
        assert len(got) + left == total
        for number, numbers in enumerate(sent):
            there = [i for t, i in payloads(got) if t == number]
            assert there == numbers[: len(there)]
        assert subscriber.lost == {}
        assert publisher._topic.batch.items == []
        assert net.publishing.flusher._cores == {}
        net.publishing.flusher.close()
        subscriber.close()


def test_a_closed_handle_sends_nothing_and_what_it_has_sent_leaves(net: Net) -> None:
    publisher, other = net.publisher("a"), net.publisher("a")
    subscriber = net.subscriber("a")
    publisher.send_many(range(3))
    publisher.close()
    with pytest.raises(Closed):
        publisher.send("too late")
    other.send(3)
    hand(net).turn()
    assert payloads(received(subscriber, 4)) == [0, 1, 2, 3]


# -- Interrupted


@pytest.mark.parametrize("when", ["before it is sent", "after it was sent"])
def test_a_batch_whose_sending_is_interrupted_is_never_repeated_nor_silently_lost(
    net: Net, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    publisher.send_many(range(4))

    def interrupted(socket: zmq.Socket[bytes], parts: list[bytes]) -> bool:
        if when == "after it was sent":
            send_parts(socket, parts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(topics_module, "send_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            publisher.send("by itself", headers={"so": "the batch leaves first"})
    publisher.send_many(["next", "but one"])
    hand(net).turn()
    arrived = [0, 1, 2, 3] if when == "after it was sent" else [0]
    assert payloads(received(subscriber, len(arrived) + 2)) == [*arrived, "next", "but one"]
    assert sum(subscriber.lost.values()) == 4 - len(arrived)


@pytest.mark.parametrize("put_back_first", [False, True])
def test_an_interrupt_when_there_was_no_room_loses_nothing_silently(
    net: Net, monkeypatch: pytest.MonkeyPatch, put_back_first: bool
) -> None:
    publisher, subscriber = net.publisher("a", when_full="wait"), net.subscriber("a")
    publisher.send_many(range(4))
    put_back = Batch.put_back

    def interrupted(batch: Batch, items: list[Item]) -> None:
        if put_back_first:
            put_back(batch, items)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(topics_module, "send_parts", lambda socket, parts: False)
        patch.setattr(Batch, "put_back", interrupted)
        with pytest.raises(KeyboardInterrupt):
            publisher.send("by itself", headers={"so": "the batch leaves first"})
    publisher.send("next")
    hand(net).turn()
    arrived = [0, 1, 2, 3] if put_back_first else [0]
    assert payloads(received(subscriber, len(arrived) + 1)) == [*arrived, "next"]
    assert sum(subscriber.lost.values()) == 3, "what has left its number shows as a gap"


# -- Bounds


def test_no_batch_takes_what_is_over_the_largest_message(nets: Callable[..., Net]) -> None:
    net = nets(window_s=None, message_bytes_max=1024)
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    publisher.send_many([b"1", b"2"])
    for payload in (bytes(1025), "x" * 1024):
        with pytest.raises(PayloadTooLarge):
            publisher.send(payload)
        with pytest.raises(PayloadTooLarge):
            asyncio.run(publisher.asend(payload))
    publisher.send(bytes(1021))  # 1024 as encoded
    hand(net).turn()
    assert [len(payload) for payload in payloads(received(subscriber, 3))] == [1, 1, 1021]


def test_a_full_frame_costs_no_subscriber_its_connection(nets: Callable[..., Net]) -> None:
    """128 bytes is the size at which both bounds of a frame are reached."""
    net = nets(window_s=None, message_bytes_max=1024)
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    publisher.send_many([b"alone", b"opens a batch"])
    hand(net).turn()
    publisher.send_many([bytes(128)] * 512)
    all_leave(net)
    assert payloads(received(subscriber, 514))[2:] == [bytes(128)] * 512


# -- asyncio


@both_modes
def test_coroutines_send_in_batches(nets: Callable[..., Net], when_full: WhenFull) -> None:
    # Room for all, since those that drop would drop what the others had not read yet.
    net = nets(window_s=WINDOW_S, buffer_bytes=1000 * limits.SLOT_BYTES_MIN)
    publisher, subscriber = net.publisher("a", when_full=when_full), net.subscriber("a")
    sizes = [0, 10, 4096, 10, 5000, 10]

    async def send(sender: int) -> None:
        for i in range(300):
            await publisher.asend([sender, i, bytes(sizes[i % 6])], timeout=10)
            if i % 50 == 0:
                await asyncio.sleep(0)

    async def receive() -> list[Message]:
        return [await subscriber.arecv(timeout=10) for _ in range(1200)]

    async def main() -> list[Message]:
        *_, got = await asyncio.gather(*(send(sender) for sender in range(4)), receive())
        return got  # type: ignore[return-value]

    got = asyncio.run(main())
    assert [message.seq for message in got] == list(range(1, 1201))
    for sender in range(4):
        mine = [payload for payload in payloads(got) if payload[0] == sender]
        assert mine == [[sender, i, bytes(sizes[i % 6])] for i in range(300)]
    assert publisher._topic.frames < 1200


def test_what_a_cancelled_send_had_no_room_for_was_not_sent(nets: Callable[..., Net]) -> None:
    net = nets(window_s=WINDOW_S, buffer_messages=1)
    publisher, subscriber = net.publisher("a", when_full="wait"), net.subscriber("a")
    sent = fill(publisher)

    async def main() -> None:
        waiting = [asyncio.create_task(publisher.asend("cancelled")) for _ in range(5)]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert all(task.cancelled() for task in waiting)

    asyncio.run(main())
    publisher_goes_on = threading.Thread(target=publisher.send, args=("end",))
    publisher_goes_on.start()
    got = received(subscriber, sent + 1)
    publisher_goes_on.join()
    assert payloads(got)[-1] == "end"
    assert [message.payload[0] for message in got[:-1]] == list(range(sent))
    assert subscriber.lost == {}


def test_a_cancelled_recv_puts_a_batch_back_in_order(net: Net) -> None:
    publisher, subscriber = net.publisher("a"), net.subscriber("a")

    async def main() -> list[Message]:
        receiving = asyncio.create_task(subscriber.arecv_many(count_max=100))
        await asyncio.sleep(0)
        publisher.send_many(range(300))
        hand(net).turn()
        await asyncio.sleep(0.01)
        receiving.cancel()
        await asyncio.wait([receiving])
        return [] if receiving.cancelled() else list(receiving.result())

    got = asyncio.run(main())
    got += received(subscriber, 300 - len(got))
    assert payloads(got) == list(range(300))


def test_a_list_arrives_as_if_each_had_been_sent_by_itself(net: Net) -> None:
    publisher, subscriber = net.publisher("a", when_full="wait"), net.subscriber("a", views=True)
    large = bytes(ALONE_BYTES_MIN)
    lists: list[list[Any]] = [
        [large],
        [b"small"] * 8 + [large],
        [bytearray(b"1"), memoryview(b"2"), b"3"] * 5,
        [b"x"] * 60 + ["text"] + [b"y"] * 60,
    ]
    for some in lists:
        publisher.send_many(some, timeout=5)
        hand(net).turn()
        together = received(subscriber, len(some))
        for payload in some:
            publisher.send(payload, timeout=5)
        hand(net).turn()
        alone = received(subscriber, len(some))
        assert payloads(together) == payloads(alone)
        assert [type(m.payload) for m in together] == [type(m.payload) for m in alone]


def test_a_list_sends_nothing_that_a_send_refuses(net: Net) -> None:
    publisher = net.publisher("a")
    with pytest.raises(NotSerializable):
        publisher.send_many([msgspec.Raw(b"\x01\x02")] * 8)
    assert publisher._topics.counters.sent == 0
