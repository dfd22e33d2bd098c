"""What the topic column of the guarantees table promises, over real sockets and without a node."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import Any

import pytest

from mesh.errors import Closed, NotSerializable, OptionsDiffer, PayloadTooLarge, Timeout
from mesh.message import Loss, Message
from mesh.options import PublisherOptions
from mesh.sockets.frame import Kind, encode, wire_name
from mesh.sockets.home import node_text
from mesh.sockets.publisher import Publisher
from mesh.sockets.subscriber import Subscriber
from mesh.sockets.topics import Topics
from tests.support.homes import Homes
from tests.support.topics import PUBLISHER, Net, payloads


def test_every_subscriber_gets_every_message_in_order(net: Net) -> None:
    publisher = net.publisher("a/b", when_full="wait")
    subscribers = [net.subscriber("a/b"), net.subscriber("a/*"), net.subscriber("**")]
    publisher.send_many(range(500), timeout=5)
    for subscriber in subscribers:
        got = [subscriber.recv(timeout=5) for _ in range(500)]
        assert payloads(got) == list(range(500))
        assert [message.seq for message in got] == list(range(1, 501))
        assert subscriber.lost == {}


def test_a_message_says_whose_it_is(net: Net) -> None:
    subscriber = net.subscriber("a")
    before = time.time_ns()
    net.publisher("a").send({"k": [1, b"x", None]}, headers={"trace": "7"})
    message = subscriber.recv(timeout=5)
    assert (message.payload, message.channel) == ({"k": [1, b"x", None]}, "a")
    assert (message.sender, message.seq) == (node_text(PUBLISHER), 1)
    assert message.headers == {"trace": "7"}
    assert before <= message.time_ns <= time.time_ns()


def test_subscribing_to_a_never_delivers_ab(net: Net) -> None:
    a, ab, below = net.publisher("a"), net.publisher("ab"), net.publisher("a/b")
    only_a, tree = net.subscriber("a"), net.subscriber("a/**")
    for publisher in (ab, below, a):
        publisher.send(publisher.channel)
    assert only_a.recv(timeout=5).payload == "a"
    assert [tree.recv(timeout=5).payload for _ in range(2)] == ["a/b", "a"]
    for subscriber in (only_a, tree):
        with pytest.raises(Timeout):
            subscriber.recv(timeout=0)


def test_wait_for_counts_subscribers_that_miss_nothing_from_then_on(net: Net) -> None:
    publisher = net.publisher("a")
    with pytest.raises(Timeout, match="no 1 subscribers of 'a' within"):
        publisher.wait_for(1, timeout=0.01)
    assert publisher.subscribers == 0
    subscriber = net.subscriber("a")
    publisher.wait_for(1, timeout=5)
    publisher.send("first")
    assert subscriber.recv(timeout=5).payload == "first"
    subscriber.close()
    net.until(lambda: publisher.subscribers == 0)


def test_wait_for_does_not_need_anybody_to_receive(net: Net) -> None:
    """`net.subscriber` never calls recv: the mark is read ahead and acknowledged."""
    publisher = net.publisher("a")
    net.subscriber("a")
    net.subscriber("**")
    net.subscriber("b")
    publisher.wait_for(2, timeout=5)
    assert publisher.subscribers == 2


def overflow(net: Net, count: int) -> tuple[Publisher, Subscriber]:
    """Publish until the subscriber, which does not read, must have lost something."""
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    publisher.send_many(bytes(1000) for _ in range(count))
    return publisher, subscriber


def read_all(net: Net, subscriber: Subscriber, last: int) -> list[Message]:
    """Read until the messages received and counted as lost add up to `last`."""
    got: list[Message] = []

    def complete() -> bool:
        with contextlib.suppress(Timeout):
            got.extend(subscriber.recv_many(timeout=0))
        return len(got) + sum(subscriber.lost.values()) >= last

    net.until(complete)
    return got


def test_drop_loses_the_newest_for_the_full_subscriber_which_counts_it(
    homes: Homes,
) -> None:
    net = Net(homes, buffer_messages=10)
    losses: list[Loss] = []
    publisher, subscriber = overflow(net, 3000)
    subscriber.on_loss(losses.append)
    got = read_all(net, subscriber, 3000)
    lost = subscriber.lost[node_text(PUBLISHER)]
    assert lost > 0
    assert len(got) + lost == 3000
    assert sum(loss.count for loss in losses) == lost
    seen = {message.seq for message in got}
    missed = {seq for loss in losses for seq in range(loss.first, loss.last + 1)}
    assert seen.isdisjoint(missed)
    assert seen | missed == set(range(1, 3001))
    assert {(loss.sender, loss.channel) for loss in losses} == {(node_text(PUBLISHER), "a")}
    assert net.topics["drop"].counters.dropped["subscriber full"] > 0
    publisher.send("after")
    assert subscriber.recv(timeout=5).payload == "after"
    net.close()


def test_a_lost_tail_is_exposed_by_the_mark_of_a_quiet_topic(homes: Homes) -> None:
    """Nothing is sent after what was lost: only the mark can tell."""
    net = Net(homes, buffer_messages=10)
    _, subscriber = overflow(net, 3000)
    got = read_all(net, subscriber, 3000)
    assert got[-1].seq < 3000
    assert len(got) + subscriber.lost[node_text(PUBLISHER)] == 3000
    net.close()


def test_wait_holds_the_publisher_and_loses_nothing(homes: Homes) -> None:
    net = Net(homes, buffer_messages=10)
    publisher, subscriber = net.publisher("a", when_full="wait"), net.subscriber("a")
    sent = 0

    def fill() -> None:
        nonlocal sent
        while True:
            publisher.send(bytes(1000), timeout=0.05)
            sent += 1

    with pytest.raises(Timeout, match=r"no room at the subscribers of 'a' within 0\.05 s"):
        fill()
    thread = threading.Thread(target=publisher.send_many, args=([bytes(1000)] * 500,))
    thread.start()
    got = [subscriber.recv(timeout=5).seq for _ in range(sent + 500)]
    thread.join(5)
    assert got == list(range(1, sent + 501))
    assert subscriber.lost == {}
    net.close()


def test_topics_that_wait_lose_nothing_to_a_subscriber_that_others_dropped_messages_for(
    homes: Homes,
) -> None:
    """Once libzmq has dropped a message for a full subscriber, it takes what follows as sent to it,
    on whatever topic: so those that wait have sockets of their own."""
    net = Net(homes, buffer_messages=10)
    dropping, waiting = net.publisher("dropping"), net.publisher("waiting", when_full="wait")
    subscriber = net.subscriber("*")
    dropping.send_many(bytes(1000) for _ in range(3000))
    thread = threading.Thread(target=waiting.send_many, args=(range(3000),))
    thread.start()
    got = read_all(net, subscriber, 6000)
    thread.join(5)
    assert [m.payload for m in got if m.channel == "waiting"] == list(range(3000))
    assert subscriber.lost[node_text(PUBLISHER)] == 6000 - len(got)
    net.close()


def test_a_subscriber_that_leaves_releases_a_waiting_publisher(homes: Homes) -> None:
    net = Net(homes, buffer_messages=10)
    publisher, subscriber = net.publisher("a", when_full="wait"), net.subscriber("a")
    with pytest.raises(Timeout):
        publisher.send_many((bytes(1000) for _ in range(100_000)), timeout=0.02)
    thread = threading.Thread(target=publisher.send, args=(b"x",))
    thread.start()
    subscriber.close()
    thread.join(5)
    assert not thread.is_alive()
    net.close()


def test_what_is_missed_while_disconnected_is_counted(net: Net) -> None:
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    publisher.send(1)
    assert subscriber.recv(timeout=5).payload == 1
    core = net.cores[0]
    net.detach(core)
    while core._retiring:
        core.tick()
    net.until(lambda: publisher.subscribers == 0)
    publisher.send_many([2, 3, 4])
    fresh = net.publisher("fresh")
    fresh.send("never heard of before")
    net.attach(core)
    publisher.send(5)
    assert subscriber.recv(timeout=5).payload == 5
    assert subscriber.lost == {node_text(PUBLISHER): 3}


def test_a_newcomer_has_lost_nothing(net: Net) -> None:
    publisher = net.publisher("a")
    publisher.send_many(range(10))
    subscriber = net.subscriber("a")
    publisher.send(10)
    assert subscriber.recv(timeout=5).payload == 10
    assert subscriber.lost == {}


def test_keep_last_gives_newcomers_the_last_message_once(net: Net) -> None:
    kept, plain = net.publisher("kept", keep_last=True), net.publisher("plain")
    first = net.subscriber("**")
    kept.send({"state": 1}, headers={"h": 1})
    kept.send(bytes(100_000))
    plain.send("gone")
    second = net.subscriber("**")
    message = second.recv(timeout=5)
    assert (message.payload, message.channel, message.seq) == (bytes(100_000), "kept", 2)
    kept.send("new")
    assert second.recv(timeout=5).payload == "new"
    got = [first.recv(timeout=5) for _ in range(4)]
    assert [(m.channel, m.seq) for m in got] == [
        ("kept", 1),
        ("kept", 2),
        ("plain", 1),
        ("kept", 3),
    ]
    assert got[0].headers == {"h": 1}
    assert first.lost == second.lost == {}


def test_latest_only_keeps_the_newest_of_each_topic_and_calls_nothing_lost(net: Net) -> None:
    a, b = net.publisher("a", when_full="wait"), net.publisher("b", when_full="wait")
    subscriber = net.subscriber("*", latest_only=True)
    a.send_many(range(300))
    b.send("b")
    core = net.cores[0]
    net.until(lambda: core.tick() or core.counters.received == 301)  # type: ignore[func-returns-value]
    assert sorted((m.channel, m.payload) for m in subscriber.recv_many(timeout=5)) == [
        ("a", 299),
        ("b", "b"),
    ]
    assert subscriber.lost == {}
    assert core.counters.dropped["superseded"] == 299


def test_large_payloads_arrive_whole(net: Net) -> None:
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    large = bytes(range(256)) * 8192
    publisher.send(large, headers={"n": 1})
    publisher.send({"inside": large})
    assert subscriber.recv(timeout=5).payload == large
    assert subscriber.recv(timeout=5).payload == {"inside": large}


def test_bad_payloads_are_the_callers_errors_and_nothing_is_sent(homes: Homes) -> None:
    home = homes.make(9, message_bytes_max=10_000)
    topics = Topics(home, "drop")
    publisher = Publisher(topics, topics.topic("a", PublisherOptions()), None, lambda: None)
    with pytest.raises(PayloadTooLarge, match=r"payload of 10,00\d bytes over the limit of 10,000"):
        publisher.send(bytes(10_001))
    with pytest.raises(PayloadTooLarge, match="option message_bytes_max"):
        publisher.send(bytes(100_000))
    for bad in (object(), {(1, 2): 3}, 1 << 64, {"x": {1, 2}}):
        with pytest.raises(NotSerializable):
            publisher.send(bad)
    bad_headers: tuple[Any, ...] = (
        {1: 2},
        {"a": []},
        {"a": float("nan")},
        {str(i): 1 for i in range(65)},
        [1],
    )
    for headers in bad_headers:
        with pytest.raises(NotSerializable, match="headers"):
            publisher.send(1, headers=headers)
    assert topics.counters.sent == 0
    topics.close(0)
    topics.wait_drained(lambda: 0)


def test_options_of_one_topic_cannot_differ(net: Net) -> None:
    net.publisher("a", keep_last=True)
    net.publisher("a", keep_last=True)
    with pytest.raises(OptionsDiffer, match="topic 'a'"):
        net.publisher("a")


def test_eight_threads_on_one_publisher_are_counted_and_each_in_order(net: Net) -> None:
    publisher, subscriber = net.publisher("a", when_full="wait"), net.subscriber("a")

    def send(thread: int) -> None:
        for i in range(250):
            publisher.send([thread, i], timeout=10)

    threads = [threading.Thread(target=send, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    got = [subscriber.recv(timeout=5) for _ in range(2000)]
    for thread in threads:
        thread.join(5)
    assert [message.seq for message in got] == list(range(1, 2001))
    for n in range(8):
        assert [m.payload[1] for m in got if m.payload[0] == n] == list(range(250))


def test_asyncio_sends_waits_and_receives(net: Net) -> None:
    publisher = net.publisher("a", when_full="wait")
    subscriber = net.subscriber("a")

    async def run() -> None:
        await publisher.await_for(1, timeout=5)
        receiving = asyncio.ensure_future(subscriber.arecv(timeout=5))
        await asyncio.sleep(0)
        await publisher.asend(0)
        assert (await receiving).payload == 0
        assert await publisher.asend_many(range(1, 100), timeout=5) == 99
        got: list[Message] = []
        while len(got) < 99:
            got += await subscriber.arecv_many(timeout=5)
        assert payloads(got) == list(range(1, 100))
        with pytest.raises(Timeout):
            await subscriber.arecv(timeout=0.01)

    asyncio.run(run())


def test_iteration_ends_when_the_subscriber_is_closed(net: Net) -> None:
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    got: list[object] = []

    def consume() -> None:
        got.extend(message.payload for message in subscriber)

    thread = threading.Thread(target=consume)
    thread.start()
    publisher.send(1)
    net.until(lambda: got == [1])
    subscriber.close()
    thread.join(5)
    assert not thread.is_alive()
    with pytest.raises(Closed, match="subscriber 'a' is closed"):
        subscriber.recv(timeout=0)


def test_a_closed_publisher_refuses(net: Net) -> None:
    publisher = net.publisher("a")
    publisher.close()
    with pytest.raises(Closed, match="publisher 'a' is closed"):
        publisher.send(1)
    with pytest.raises(Closed):
        publisher.wait_for(1, timeout=0)


def test_garbage_from_a_publisher_is_dropped_and_counted_and_the_rest_goes_on(net: Net) -> None:
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    name = wire_name("a")
    topics = net.topics["drop"]
    socket = topics._bound[0].socket
    frames = [
        [name],
        [name + b"\x09" * 36],
        [encode(name, Kind.DATA, b"\xc1", sender=PUBLISHER, seq=1)],
        [encode(name, Kind.DATA, b"\x91\xc0junk", sender=PUBLISHER, seq=1)],
        [encode(name, Kind.DATA, b"\x92\xc0\xc0", sender=PUBLISHER, seq=1)],
        [encode(name, Kind.DATA, b"\xdd\x7f\xff\xff\xff", sender=PUBLISHER, seq=1)],
        [encode(name, Kind.REQUEST, b"\x91\xc0", sender=PUBLISHER, seq=1)],
        [name, b"a second part", b"a third"],
    ]
    with topics.link:
        for frame in frames:
            socket.send_multipart(frame)
    publisher.send("good")
    assert subscriber.recv(timeout=5).payload == "good"
    counters = net.cores[0].counters
    dropped = counters.dropped["malformed"] + counters.dropped["version"]
    assert dropped == sum(map(len, frames)), "parts that are not announced are frames of their own"
