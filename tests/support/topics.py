"""Publishers and subscribers joined as a node would join them, and raw sockets in the place of one
side or the other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from mesh.errors import Timeout
from mesh.message import Message
from mesh.options import PublisherOptions, SubscriberOptions, WhenFull
from mesh.sockets import codec
from mesh.sockets.control import Offer
from mesh.sockets.frame import Frame, Kind, decode, encode, wire_name
from mesh.sockets.home import Home
from mesh.sockets.publisher import Publisher
from mesh.sockets.subscriber import Subscriber
from mesh.sockets.subscription import Subscription
from mesh.sockets.topics import Topics
from tests.support.homes import Homes

PUBLISHER, SUBSCRIBER, RAW = 1, 2, 3
NETWORKED: dict[str, Any] = {"networked": True, "addresses": ("127.0.0.1",)}
ADDRESS = b"@0123456789abcdef:a\0"


class Net:
    """One publishing home and subscribers to it, joined as a node would join them."""

    def __init__(self, homes: Homes, buffer_messages: int = 1000, **options: Any) -> None:
        self.homes = homes
        self.publishing: Home = homes.make(PUBLISHER, buffer_messages=buffer_messages, **options)
        self.subscribing: Home = homes.make(SUBSCRIBER, buffer_messages=buffer_messages, **options)
        self.topics: dict[WhenFull, Topics] = {
            "drop": Topics(self.publishing, "drop"),
            "wait": Topics(self.publishing, "wait"),
        }
        self.cores: list[Subscription] = []

    def publisher(
        self, name: str, *, when_full: WhenFull = "drop", keep_last: bool = False
    ) -> Publisher:
        topics = self.topics[when_full]
        topic = topics.topic(name, PublisherOptions(when_full=when_full, keep_last=keep_last))
        return Publisher(topics, topic, None, lambda: None)

    def subscriber(
        self, pattern: str, *, scheme: str = "ipc", latest_only: bool = False, views: bool = False
    ) -> Subscriber:
        options = SubscriberOptions(latest_only=latest_only, views=views)
        core = Subscription(self.subscribing, pattern, options)
        self.cores.append(core)
        self.attach(core, scheme)
        return Subscriber(core, None, lambda: None)

    def attach(self, core: Subscription, scheme: str = "ipc") -> None:
        """Connect it and carry the acknowledgements of its marks, as the control link would."""
        marks = self.homes.made[SUBSCRIBER].marks
        marks.clear()
        waiting = self.topics["wait"].endpoints()
        core.attach(PUBLISHER, Offer(1, "publish", "any"), self.endpoint("drop", scheme))
        core.attach(PUBLISHER, Offer(2, "publish", "other", waiting), self.endpoint("wait", scheme))
        own = core._address.decode()  # marks of others come meanwhile, who asked for them
        self.until(lambda: {waits for _, to, waits in marks if to == own} == {False, True})
        self.carry_marks()

    def carry_marks(self) -> None:
        for _, address, waits in self.homes.made[SUBSCRIBER].marks:
            self.topics["wait" if waits else "drop"].marked(SUBSCRIBER, address)

    def endpoint(self, when_full: WhenFull, scheme: str = "ipc") -> str:
        ipc, *tcp = self.topics[when_full].endpoints()
        return ipc if scheme == "ipc" else tcp[0].replace("*", "127.0.0.1")

    def detach(self, core: Subscription) -> None:
        for key in (1, 2):
            core.detach(PUBLISHER, key, "silent")

    def tick(self) -> None:
        """What the control threads do four times a second."""
        for topics in self.topics.values():
            if not topics.link.closed:
                topics.tick()
        for core in self.cores:
            if not core.link.closed:
                core.tick()

    def until(self, condition: Callable[[], object]) -> None:
        """Do what the control threads do until `condition` holds."""
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "what was waited for never came"
            self.tick()

    def close(self) -> None:
        for topics in self.topics.values():
            topics.close(0)
            topics.wait_drained(lambda: 0)
        for core in self.cores:
            core.close(0)


def payloads(messages: Sequence[Message]) -> list[Any]:
    return [message.payload for message in messages]


def fill(publisher: Publisher, size: int = 1000) -> int:
    """Publish, waiting, until there is no room any more; returns how many were sent. On a busy
    machine whoever makes room may not have its turn for long: so one wait in vain says little."""
    count = in_vain = 0
    while in_vain < 3:
        try:
            publisher.send([count, bytes(size)], timeout=0.05)
        except Timeout:
            in_vain += 1
        else:
            count += 1
            in_vain = 0
    return count


def all_there(subscriber: Subscriber) -> list[Message]:
    """What can be received without waiting."""
    got: list[Message] = []
    with contextlib.suppress(Timeout):
        while True:
            got += subscriber.recv_many(timeout=0)
    return got


class RawPublisher:
    """A publisher that a test speaks for: an XPUB that reads and writes frames itself."""

    def __init__(self, homes: Homes, label: str = "raw", node_id: int = RAW) -> None:
        self.node_id = node_id
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.XPUB)
        self.socket.setsockopt(zmq.XPUB_VERBOSER, 1)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, 5000)
        self.endpoint = f"ipc://{homes.directory}/{label}"
        self.socket.bind(self.endpoint)
        self.address = b""

    def attach(self, core: Subscription) -> None:
        """Join it, and wait for its subscriptions."""
        core.attach(self.node_id, Offer(1, "publish", "any"), self.endpoint)
        self.address = self.heard(b"\1@")[1:]

    def heard(self, start: bytes) -> bytes:
        """The next subscription that begins like that; others are skipped."""
        while not (message := self.socket.recv()).startswith(start):
            pass
        return message

    def data(self, topic: str, seq: int, payload: object) -> None:
        body = codec.pack_body([codec.pack(payload)])
        self.socket.send(encode(wire_name(topic), Kind.DATA, body, sender=self.node_id, seq=seq))

    def idle_mark(self, topic: str, seq: int) -> None:
        self.socket.send(encode(wire_name(topic), Kind.MARK, b"", sender=self.node_id, seq=seq))

    def mark(self, standing: dict[str, int], *, following: int = 0) -> None:
        body = codec.pack_body([codec.pack(standing)])
        self.own(Kind.MARK, body, following)

    def last(self, topic: str, seq: int, payload: object, time_ns: int = 7) -> None:
        item = codec.pack_body([codec.pack(topic), codec.pack(payload), b"\xc0"])
        self.own(Kind.LAST, codec.pack_body([item]), seq, time_ns)

    def own(self, kind: int, body: bytes, seq: int, time_ns: int = 0) -> None:
        self.socket.send(
            encode(self.address, kind, body, sender=self.node_id, seq=seq, time_ns=time_ns)
        )

    def close(self) -> None:
        self.context.destroy(linger=0)


class RawSubscriber:
    """A subscriber that a test speaks for: an XSUB that says itself what it subscribes to."""

    def __init__(self, endpoint: str, hwm: int = 1000) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.XSUB)
        self.socket.setsockopt(zmq.RCVHWM, hwm)
        self.socket.connect(endpoint)

    def subscribe(self, *names: bytes) -> None:
        for name in names:
            self.socket.send(b"\1" + name)

    def unsubscribe(self, name: bytes) -> None:
        self.socket.send(b"\0" + name)

    def next(self, topics: Topics) -> Frame:
        """The next frame for it, with the publisher's node at work."""
        deadline = time.monotonic() + 5
        while not self.socket.poll(1):
            assert time.monotonic() < deadline, "nothing came"
            topics.look()
        return decode(self.socket.recv_multipart())

    def close(self) -> None:
        self.context.destroy(linger=0)
