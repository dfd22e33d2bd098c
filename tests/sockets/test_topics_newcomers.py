"""What a publisher tells its subscribers besides messages: where it stands, and last values."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from mesh import limits
from mesh.errors import OptionsDiffer, Timeout
from mesh.options import PublisherOptions
from mesh.sockets import codec
from mesh.sockets import readers as readers_module
from mesh.sockets import topics as topics_module
from mesh.sockets.frame import QUESTION, Frame, Kind, encode
from mesh.sockets.outgoing import Outgoing
from mesh.sockets.parts import send_parts
from mesh.sockets.topics import Topics
from tests.support.topics import (
    ADDRESS,
    PUBLISHER,
    SUBSCRIBER,
    Net,
    RawSubscriber,
    all_there,
)
from tests.support.waiting import until

pause = threading.Event()
EVERYTHING = b"@fedcba9876543210:**\0"


@pytest.fixture
def net(nets: Callable[..., Net]) -> Net:
    return nets(buffer_messages=10)


@pytest.fixture
def topics(net: Net) -> Topics:
    return net.topics["drop"]


@pytest.fixture
def raw(topics: Topics) -> Iterator[RawSubscriber]:
    raw = RawSubscriber(topics.endpoints()[0], hwm=10)
    yield raw
    raw.close()


def item(frame: Frame) -> Any:
    [value], _ = codec.unpack_frame(frame, 1 << 26)
    return value


def look_until(topics: Topics, condition: Callable[[], object]) -> None:
    def looked() -> object:
        topics.look()
        return condition()

    until(looked)


def summary(frame: Frame) -> tuple[int, int]:
    return frame.kind, frame.seq


# Marks


def test_a_mark_names_the_topics_that_match_and_where_they_stand(
    net: Net, topics: Topics, raw: RawSubscriber
) -> None:
    net.publisher("a").send_many([1, 2])
    net.publisher("b").send(1)
    raw.subscribe(ADDRESS)
    mark = raw.next(topics)
    assert (mark.name, *summary(mark), item(mark)) == (ADDRESS, Kind.MARK, 0, {"a": 2})


def test_a_large_mark_comes_in_parts_that_say_how_many_follow(
    net: Net, topics: Topics, raw: RawSubscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers_module, "_MARK_TOPICS_MAX", 10)
    for i in range(25):
        net.publisher(f"a/{i}")
    raw.subscribe(EVERYTHING)
    marks = [raw.next(topics) for _ in range(3)]
    assert [summary(mark) for mark in marks] == [(Kind.MARK, left) for left in (2, 1, 0)]
    parts = [item(mark) for mark in marks]
    assert [len(part) for part in parts] == [10, 10, 5]
    assert {name for part in parts for name in part} == {f"a/{i}" for i in range(25)}


def test_a_publisher_that_does_nothing_but_send_answers_newcomers(
    net: Net, raw: RawSubscriber
) -> None:
    publisher = net.publisher("a")
    raw.subscribe(ADDRESS)

    def answered() -> int:
        publisher.send(1)
        return raw.socket.poll(0)

    until(answered, "the mark")


def test_a_quiet_topic_marks_itself_and_a_busy_one_does_not(
    net: Net, topics: Topics, raw: RawSubscriber
) -> None:
    publisher = net.publisher("a")
    raw.subscribe(ADDRESS, b"/a\0")
    assert summary(raw.next(topics)) == (Kind.MARK, 0)
    for i in range(3):
        publisher.send(i)
        topics.tick()
    for _ in range(3):
        topics.tick()
    got = [summary(raw.next(topics)) for _ in range(4)]
    assert got == [(Kind.DATA, 1), (Kind.DATA, 2), (Kind.DATA, 3), (Kind.MARK, 3)]
    publisher.send("after")
    assert summary(raw.next(topics)) == (Kind.DATA, 4), "it marked itself once"


def take_its_room(topics: Topics, raw: RawSubscriber) -> None:
    """On a topic of its own, until there is none left; nothing is dropped for it (it would be taken
    to have got all that follows)."""
    [bound] = topics._bound
    raw.subscribe(b"/filler\0")
    frame = encode(b"/filler\0", Kind.DATA, bytes(10_000), sender=PUBLISHER, seq=1)
    refused = 0

    def full() -> bool:
        nonlocal refused
        with topics.link:
            topics.read_subscriptions()
            refused = 0 if send_parts(bound.socket, [frame]) else refused + 1
        return refused > 20

    raw.next(topics)  # what it said has arrived
    while not full():
        pause.wait(0.001 * bool(refused))


def test_the_mark_of_a_quiet_topic_comes_also_if_there_was_no_room_for_it(
    net: Net, topics: Topics, raw: RawSubscriber
) -> None:
    publisher = net.publisher("a")
    raw.subscribe(ADDRESS, b"/a\0")
    publisher.send(1)
    take_its_room(topics, raw)
    for _ in range(5):
        topics.tick()
    got: list[Frame] = []
    while not got or got[-1].name != b"/a\0" or got[-1].kind != Kind.MARK:
        topics.tick()
        got.append(raw.next(topics))
    assert got[-1].seq == 1


def test_what_was_dropped_does_not_make_a_socket_that_drops(net: Net, topics: Topics) -> None:
    """It would not be counted here any more."""
    publisher, subscriber = net.publisher("a"), net.subscriber("a")

    def dropped() -> int:
        """Of some more, after reading what there is."""
        all_there(subscriber)
        publisher.send_many(bytes(1000) for _ in range(500))
        return topics.counters.dropped["subscriber full"]

    for count in range(3):
        net.until(lambda: dropped() > count)  # noqa: B023


def test_closing_tells_where_the_sequences_stand(
    net: Net, topics: Topics, raw: RawSubscriber
) -> None:
    publisher = net.publisher("a")
    raw.subscribe(ADDRESS, b"/a\0")
    assert summary(raw.next(topics)) == (Kind.MARK, 0)
    publisher.send(1)
    topics.close(1000)
    raw.socket.setsockopt(zmq.RCVTIMEO, 5000)
    assert [raw.socket.recv()[:5] for _ in range(2)] == [
        b"/a\0\1" + bytes([kind]) for kind in (Kind.DATA, Kind.MARK)
    ]


def test_closing_tells_those_who_have_room_also_if_another_has_none(
    net: Net, topics: Topics, raw: RawSubscriber
) -> None:
    publisher = net.publisher("a")
    with contextlib.closing(RawSubscriber(topics.endpoints()[0], hwm=1)) as stuck:
        raw.subscribe(ADDRESS, b"/a\0")
        stuck.subscribe(EVERYTHING, b"/a\0")
        assert raw.next(topics).kind == Kind.MARK
        look_until(topics, lambda: len(topics._readers) == 2)
        publisher.send(1)
        assert raw.next(topics).kind == Kind.DATA
        take_its_room(topics, stuck)
        topics.close(100)
        assert raw.socket.poll(5000)
        assert raw.socket.recv()[:5] == b"/a\0\1" + bytes([Kind.MARK])


# Questions


def test_a_question_is_answered_with_a_mark(net: Net, topics: Topics, raw: RawSubscriber) -> None:
    publisher = net.publisher("a")
    raw.subscribe(ADDRESS)
    assert item(raw.next(topics)) == {"a": 0}
    publisher.send(1)
    raw.subscribe(QUESTION + ADDRESS)
    assert item(raw.next(topics)) == {"a": 1}


def test_nobody_is_answered_who_is_not_known(topics: Topics, raw: RawSubscriber) -> None:
    raw.subscribe(QUESTION + ADDRESS, EVERYTHING)
    assert raw.next(topics).name == EVERYTHING
    assert not topics._readers._unanswered


def without_room(net: Net, topics: Topics, raw: RawSubscriber, count: int) -> None:
    """`raw` asks for `count` last values, more than it has room for."""
    for i in range(count):
        net.publisher(f"a/{i}", keep_last=True).send(bytes(20_000))
    raw.subscribe(EVERYTHING)
    look_until(topics, lambda: topics._readers)
    assert topics._readers._unanswered, "there was room for all"


def until_marks(topics: Topics, raw: RawSubscriber, marks: int) -> list[Frame]:
    """All that `raw` gets up to that many marks, with the control thread at work."""
    got: list[Frame] = []
    while sum(frame.kind == Kind.MARK for frame in got) < marks:
        topics.tick()
        got.append(raw.next(topics))
    return got


def test_who_has_no_room_gets_every_last_value_all_the_same_and_then_its_mark(
    net: Net, topics: Topics, raw: RawSubscriber
) -> None:
    without_room(net, topics, raw, 300)
    got = until_marks(topics, raw, 1)
    assert [frame.kind for frame in got] == [Kind.LAST] * 300 + [Kind.MARK]
    assert {item(frame)[0] for frame in got[:-1]} == {f"a/{i}" for i in range(300)}
    assert item(got[-1]) == {f"a/{i}": 1 for i in range(300)}
    assert not topics._readers._unanswered


def test_a_question_meanwhile_cuts_nothing_short_and_is_answered_in_the_end(
    net: Net, topics: Topics, raw: RawSubscriber
) -> None:
    """With what is so by then: it may be asked for what was lost since."""
    without_room(net, topics, raw, 300)
    raw.subscribe(QUESTION + EVERYTHING)
    [reader] = topics._readers._readers.values()
    look_until(topics, lambda: reader.asks_again)
    first = until_marks(topics, raw, 1)
    assert [frame.kind for frame in first] == [Kind.LAST] * 300 + [Kind.MARK]
    assert [frame.kind for frame in until_marks(topics, raw, 1)] == [Kind.MARK]
    assert not reader.asks_again


def test_whoever_leaves_while_it_is_answered_is_forgotten(
    net: Net, topics: Topics, raw: RawSubscriber
) -> None:
    without_room(net, topics, raw, 300)
    raw.close()
    look_until(topics, lambda: not topics._readers)
    assert not topics._readers._unanswered


# Last values


def test_a_last_value_has_the_time_and_the_sequence_it_was_sent_with(net: Net) -> None:
    publisher = net.publisher("a", keep_last=True)
    first = net.subscriber("a")
    publisher.send("old")
    publisher.send("last")
    original = [first.recv(timeout=5) for _ in range(2)][-1]
    assert net.subscriber("a").recv(timeout=5) == original


def test_topic_options_can_change_after_the_last_handle_is_closed(topics: Topics) -> None:
    plain, keeping = PublisherOptions(), PublisherOptions(keep_last=True)
    topic = topics.topic("a", keeping)
    assert topics.topic("a", keeping) is topic
    topic.seq, topic.last = 7, Outgoing(b"\x91\x01")
    topics.release(topic)
    with pytest.raises(OptionsDiffer):
        topics.topic("a", plain)
    topics.release(topic)
    changed = topics.topic("a", plain)
    assert (changed.options, changed.seq, changed.last) == (plain, 7, None)


# Who reads


def test_a_reader_is_not_counted_before_it_said_that_its_mark_has_come(
    net: Net, topics: Topics, raw: RawSubscriber
) -> None:
    publisher = net.publisher("a")
    raw.subscribe(ADDRESS)
    raw.next(topics)
    assert publisher.subscribers == 0
    topics.marked(SUBSCRIBER, EVERYTHING.decode())
    assert publisher.subscribers == 0
    topics.marked(SUBSCRIBER, ADDRESS.decode())
    assert publisher.subscribers == 1
    assert net.publisher("b").subscribers == 0


def test_readers_are_bounded(
    topics: Topics, raw: RawSubscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "READERS_MAX", 2)
    names = [b"@%016d:a\0" % i for i in range(4)]
    raw.subscribe(*names, names[0])
    assert [raw.next(topics).name for _ in range(3)] == [names[0], names[1], names[0]]
    assert list(topics._readers._readers) == names[:2]
    assert topics.counters.dropped == {"too many subscribers": 2}


@pytest.mark.parametrize(
    "message",
    [
        b"\1@0123456789abcdef:a//b\0",
        b"\1@0123456789abcdef:\0",
        b"\1@0123456789abcdef:a/***\0",
        b"\1@0123456789abcdef:" + b"a" * 256 + b"\0",
        b"\1@0123456789abcdef:" + b"/".join([b"a"] * 200) + b"\0",
        b"\2@0123456789abcdef:a\0",
        b"hello",
    ],
)
def test_what_is_no_subscription_is_dropped_and_counted(
    topics: Topics, raw: RawSubscriber, message: bytes
) -> None:
    raw.socket.send(message)
    raw.subscribe(EVERYTHING)
    raw.next(topics)
    assert list(topics._readers._readers) == [EVERYTHING]
    assert topics.counters.dropped == {"malformed": 1}


def test_a_subscription_of_more_than_a_kilobyte_ends_its_connection_and_no_other(
    net: Net, topics: Topics, raw: RawSubscriber
) -> None:
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    raw.subscribe(EVERYTHING)
    raw.next(topics)
    with raw.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
        raw.subscribe(bytes(limits.SMALL_FRAME_BYTES_MAX + 1))
        assert monitor.poll(5000), "it is still connected"
        assert recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED
        raw.socket.disable_monitor()
    publisher.send("still here")
    assert subscriber.recv(timeout=5).payload == "still here"


# Interrupted


def test_an_interrupted_send_gives_no_number_twice(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was sent or not: with the number of another it would be taken for a repeat."""
    publisher, subscriber = net.publisher("a"), net.subscriber("a")

    def interrupted(socket: zmq.Socket[bytes], parts: list[bytes]) -> bool:
        send_parts(socket, parts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(topics_module, "send_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            publisher.send("interrupted")
    publisher.send("next")
    assert [subscriber.recv(timeout=5).payload for _ in range(2)] == ["interrupted", "next"]
    with pytest.raises(Timeout):
        subscriber.recv(timeout=0)


def test_a_newcomer_gets_the_last_of_a_list(net: Net) -> None:
    publisher = net.publisher("a", keep_last=True)
    publisher.send_many([b"%d" % n for n in range(20)])
    newcomer = net.subscriber("a")
    assert newcomer.recv(timeout=5).payload == b"19"
    assert newcomer._core.counters.dropped == {}
