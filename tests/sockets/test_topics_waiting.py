"""Topics that wait: nothing is lost to a slow reader, and a reader that is gone holds up nobody."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
import zmq

from mesh.errors import Closed, MeshError, Timeout
from mesh.sockets import topics as topics_module
from mesh.sockets.home import node_text
from mesh.sockets.parts import send_parts
from mesh.sockets.subscriber import Subscriber
from mesh.sockets.topics import Topics
from mesh.sockets.transport import Socket
from tests.support.homes import Homes
from tests.support.topics import (
    ADDRESS,
    NETWORKED,
    PUBLISHER,
    SUBSCRIBER,
    Net,
    RawSubscriber,
    all_there,
    fill,
)

RECONNECT_STOP = 109


@pytest.fixture
def net(nets: Callable[..., Net]) -> Net:
    """With little room, and over ipc as well as tcp."""
    return nets(buffer_messages=10, **NETWORKED)


def read_up_to(net: Net, subscriber: Subscriber, last: int) -> list[int]:
    """The sequences received, once `last` is among them or was counted as lost."""
    got: list[int] = []

    def complete() -> bool:
        got.extend(message.seq for message in all_there(subscriber))
        return len(got) + sum(subscriber.lost.values()) >= last

    net.until(complete)
    return got


@contextlib.contextmanager
def ends(call: Callable[[], object]) -> Iterator[list[BaseException | None]]:
    """`call` runs in a thread of its own, which ends soon after the block; with which error."""
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            outcome.append(None)
        except MeshError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield outcome
    thread.join(5)
    assert not thread.is_alive(), "it still waits"


@pytest.mark.parametrize("kind", [zmq.XPUB, zmq.SUB, zmq.PUSH, zmq.PULL, zmq.DEALER, zmq.ROUTER])
def test_no_data_socket_gives_up_a_peer_by_itself(homes: Homes, kind: int) -> None:
    """A socket whose buffer is full answers no heartbeats: they would end the connection of whoever
    is alive and slow. Nor is a peer given up that was stopped for longer than a handshake takes."""
    transport = homes.make(9, **NETWORKED).transport
    sockets = [bound.socket for bound in transport.bind(kind, "data")]
    sockets += [transport.connecting(kind, scheme) for scheme in ("ipc", "tcp")]
    for socket in sockets:
        assert socket.getsockopt(zmq.HEARTBEAT_IVL) == 0
        assert socket.getsockopt(RECONNECT_STOP) == 0
        socket.close()


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_a_reader_that_pauses_loses_nothing_and_keeps_its_connection(net: Net, scheme: str) -> None:
    publisher = net.publisher("a", when_full="wait")
    subscriber = net.subscriber("a", scheme=scheme)
    [reader] = net.topics["wait"]._readers._readers.values()
    before = list(reader.connections)
    sent = fill(publisher)
    for _ in range(100):
        net.tick()
    with ends(lambda: publisher.send_many(range(100), timeout=10)):
        assert read_up_to(net, subscriber, sent + 100) == list(range(1, sent + 101))
    assert subscriber.lost == {}
    assert list(reader.connections) == before


# Who is gone, though its connection looks alive


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_a_reader_whose_node_is_gone_releases_a_waiting_publisher(net: Net, scheme: str) -> None:
    publisher = net.publisher("a", when_full="wait")
    net.subscriber("a", scheme=scheme)
    fill(publisher)
    with ends(lambda: publisher.send("released", timeout=30)) as outcome:
        net.topics["wait"].lost(99)
        assert publisher.subscribers == 1, "that was another node"
        net.topics["wait"].lost(SUBSCRIBER)
        assert publisher.subscribers == 0
    assert outcome == [None]


def test_a_reader_that_was_silent_only_comes_back_and_counts_what_it_missed(net: Net) -> None:
    publisher, subscriber = net.publisher("a", when_full="wait"), net.subscriber("a")
    publisher.send(1)
    assert subscriber.recv(timeout=5).payload == 1
    net.topics["wait"].lost(SUBSCRIBER)
    net.until(lambda: not net.topics["wait"]._readers)
    publisher.send_many(["missed", "missed"])
    net.until(lambda: net.topics["wait"]._readers)
    publisher.send(4)
    assert subscriber.recv(timeout=5).payload == 4
    assert subscriber.lost == {node_text(PUBLISHER): 2}
    net.carry_marks()
    assert publisher.subscribers == 1


class Two:
    """One address, subscribed to by two connections: the new one came before the old one ended."""

    def __init__(self, topics: Topics) -> None:
        self.topics = topics
        self.both = [RawSubscriber(topics.endpoints()[0], hwm=10) for _ in range(2)]
        for n, raw in enumerate(self.both, 1):
            raw.subscribe(ADDRESS, b"/a\0")
            while n > len(self.connections()):
                topics.look()
        topics.marked(SUBSCRIBER, ADDRESS.decode())

    def connections(self) -> list[object]:
        return [c for reader in self.topics._readers._readers.values() for c in reader.connections]

    def close(self) -> None:
        for raw in self.both:
            raw.close()


@pytest.fixture
def two(net: Net) -> Iterator[Two]:
    two = Two(net.topics["wait"])
    yield two
    two.close()


def test_all_the_connections_of_a_node_that_is_gone_are_cut(net: Net, two: Two) -> None:
    publisher = net.publisher("a", when_full="wait")
    fill(publisher)
    with ends(lambda: publisher.send("released", timeout=30)) as outcome:
        two.topics.lost(SUBSCRIBER)
    assert outcome == [None]


@pytest.mark.parametrize("first", [0, 1])
def test_a_reader_stays_until_its_last_connection_ends(net: Net, two: Two, first: int) -> None:
    publisher = net.publisher("a", when_full="wait")
    two.both[first].close()
    net.until(lambda: len(two.connections()) == 1)
    assert publisher.subscribers == 1
    two.both[1 - first].close()
    net.until(lambda: publisher.subscribers == 0)


def test_who_subscribes_twice_by_one_connection_is_gone_with_it(net: Net) -> None:
    topics, publisher = net.topics["wait"], net.publisher("a", when_full="wait")
    raw = RawSubscriber(topics.endpoints()[0])
    raw.subscribe(ADDRESS, ADDRESS, ADDRESS)
    for _ in range(3):
        raw.next(topics)
    topics.marked(SUBSCRIBER, ADDRESS.decode())
    assert publisher.subscribers == 1
    raw.close()
    net.until(lambda: publisher.subscribers == 0)


# Two transports: what one took and the other had no room for is owed


class Gate:
    """While it is shut, the tcp socket has no room for topics (but for what one subscriber alone
    gets: he has room)."""

    def __init__(self, net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shut = False
        self._tcp = net.topics["wait"]._bound[1].socket
        monkeypatch.setattr(topics_module, "send_parts", self.send_parts)

    def send_parts(self, socket: Socket, parts: list[bytes]) -> bool:
        if self.shut and socket is self._tcp and parts[0].startswith(b"/"):
            return False
        return send_parts(socket, parts)


class Owing:
    """Of three messages the third is owed to a tcp subscriber; one over ipc has got them all."""

    def __init__(self, net: Net, gate: Gate) -> None:
        self.publisher = net.publisher("a", when_full="wait")
        self.slow, self.fast = net.subscriber("a", scheme="tcp"), net.subscriber("a")
        self.publisher.send_many([1, 2])
        gate.shut = True
        self.publisher.send(3)
        assert [self.fast.recv(timeout=5).payload for _ in range(3)] == [1, 2, 3]
        assert len(self.owed) == 1

    @property
    def owed(self) -> list[object]:
        return [*self.publisher._topic.owed]


@pytest.fixture
def gate(net: Net, monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(net, monkeypatch)


@pytest.fixture
def owing(net: Net, gate: Gate) -> Owing:
    return Owing(net, gate)


def test_nothing_is_sent_before_what_is_owed_is_paid(net: Net, gate: Gate, owing: Owing) -> None:
    for _ in range(3):
        with pytest.raises(Timeout):
            owing.publisher.send("too early", timeout=0.01)
    assert len(owing.owed) == 1
    assert all_there(owing.fast) == []
    gate.shut = False
    owing.publisher.send(4, timeout=0)
    assert read_up_to(net, owing.slow, 4) == [1, 2, 3, 4]
    assert owing.fast.recv(timeout=5).payload == 4
    assert owing.slow.lost == owing.fast.lost == {}


def test_a_mark_does_not_overtake_what_is_owed(net: Net, gate: Gate, owing: Owing) -> None:
    """Neither that which answers a newcomer, or a question, nor that of a topic fallen quiet."""
    newcomer = net.subscriber("a", scheme="tcp")
    assert [owing.slow.recv(timeout=5).payload for _ in range(2)] == [1, 2]
    asked = net.cores[0]._asked_at
    net.until(lambda: net.cores[0]._asked_at > asked)
    net.tick()
    gate.shut = False
    assert read_up_to(net, owing.slow, 1) == [3]
    assert read_up_to(net, newcomer, 1) == [3]
    net.until(lambda: not net.topics["wait"]._dirty)
    assert owing.slow.lost == newcomer.lost == {}


def test_closing_pays_what_is_owed(net: Net, gate: Gate, owing: Owing) -> None:
    gate.shut = False
    net.topics["wait"].close(1000)
    assert [owing.slow.recv(timeout=5).payload for _ in range(3)] == [1, 2, 3]


# Who waits


def test_closing_a_publisher_ends_whoever_waits_with_it(net: Net) -> None:
    publisher, other = (net.publisher("a", when_full="wait") for _ in range(2))
    net.subscriber("a")
    fill(other)
    topics = net.topics["wait"]
    with (
        ends(lambda: publisher.wait_for(5, timeout=30)) as counting,
        ends(lambda: publisher.send("no room", timeout=30)) as sending,
    ):
        while len(topics.link._threads) < 2:
            net.tick()
        publisher.close()
    assert [type(error) for error in counting + sending] == [Closed, Closed]
    assert not other.closed


def test_waiting_for_room_is_no_busy_loop(net: Net) -> None:
    publisher, topics = net.publisher("a", when_full="wait"), net.topics["wait"]
    net.subscriber("a")
    fill(publisher)
    before = topics.link.attempts
    with pytest.raises(Timeout):
        publisher.send("no room", timeout=0.1)
    assert topics.link.attempts - before <= 55, "every 2 ms"
