"""The publishing side of a node: all its topics, on few sockets.

The topics of a node share its XPUB sockets: one ipc, and on a network one tcp. A message goes out
in the caller's own thread. Sequences count per topic, from 1. A subscriber subscribes to an address
of its own besides its pattern (`frame.subscriber_address`), and is answered there, in band, with
what it needs to tell a gap: the mark. A lost tail is exposed twice over: a topic that fell quiet
marks itself, and a subscriber that has read all there is asks where its publishers stand, since the
first may have been dropped with the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from mesh import limits
from mesh.errors import Closed, OptionsDiffer
from mesh.names import check_name, is_pattern, matches
from mesh.options import PublisherOptions, WhenFull, check_count
from mesh.sockets import codec
from mesh.sockets.control import Offer
from mesh.sockets.frame import QUESTION, Flag, Kind, encode, pattern_of, wire_name
from mesh.sockets.home import Counters, Home
from mesh.sockets.link import Link, has_input, read_parts, send_parts
from mesh.sockets.outgoing import Outgoing
from mesh.sockets.transport import Bound, Socket, endpoints_of

_MARK_TOPICS_MAX = 1000
"""Topics in one mark, so that it stays within a frame's bounds."""


@dataclass(slots=True, eq=False)
class Topic:
    """One topic as this node publishes it, whatever the number of handles."""

    name: str
    options: PublisherOptions
    seq: int = 0
    handles: int = 0
    last: bytes | None = None
    """The last message's own LAST payload, where `keep_last` asks for it."""
    last_time_ns: int = 0
    owed: list[tuple[Socket, list[bytes]]] = field(default_factory=list)
    """What one transport took and another had no room for yet; paid before anything else."""
    dirty: bool = False
    wire: bytes = b""

    def __post_init__(self) -> None:
        self.wire = wire_name(self.name)


@dataclass(slots=True)
class Reader:
    """A subscriber, as it made itself known in band."""

    pattern: str
    socket: Socket
    connections: int = 0
    """A new connection may subscribe before the end of its old one is noticed."""
    marked: bool = False
    """Whether it said that it received its mark."""


_Answer = Callable[[bytes, Reader], list[bytes]]


class Topics:
    """The core of a node's publishers: one for those that drop, and one for those that wait.

    They cannot share sockets. Once libzmq has dropped a message for a full subscriber, it takes
    all that follows as sent to it, until that subscriber has read on: also what must not be lost.
    """

    kind = "topic"
    seeks = None
    channel = ""

    def __init__(self, home: Home, when_full: WhenFull) -> None:
        self.waits = when_full == "wait"
        self.message_bytes_max = home.transport.message_bytes_max
        self.counters = Counters()
        self.link = Link("publisher")
        self._home = home
        self._flags = int(Flag.WAITS) if self.waits else 0
        self._topics: dict[str, Topic] = {}
        self._readers: dict[bytes, Reader] = {}
        self._unanswered: dict[bytes, tuple[Reader, _Answer]] = {}
        self._dirty: dict[Topic, int] = {}
        self._bound: list[Bound] = home.transport.bind(zmq.XPUB, when_full)
        with self.link:
            for bound in self._bound:
                bound.socket.setsockopt(zmq.XPUB_VERBOSER, 1)
                bound.socket.setsockopt(zmq.XPUB_NODROP, 1)
                self.link.add(bound.socket)

    def endpoints(self) -> tuple[str, ...]:
        return endpoints_of(self._bound)

    def topic(self, name: str, options: PublisherOptions) -> Topic:
        """The topic of that name, made if need be. Raises `OptionsDiffer`, `Closed`."""
        with self.link.lock:
            self.link.check_open()
            topic = self._topics.get(check_name(name))
            if topic is None:
                check_count(len(self._topics), "topics", 0, limits.CHANNELS_PER_NODE_MAX - 1)
                topic = self._topics[name] = Topic(name, options)
            elif topic.options != options and not topic.handles:
                topic.options, topic.last = options, None
            elif topic.options != options:
                raise OptionsDiffer(f"topic {name!r} is open with {topic.options}, not {options}")
            topic.handles += 1
            return topic

    def is_open(self, name: str) -> bool:
        """Whether handles to a topic of that name are open here."""
        with self.link.lock:
            topic = self._topics.get(name)
            return topic is not None and topic.handles > 0

    def release(self, topic: Topic) -> bool:
        """A handle is gone; True if it was the last. The sequence stays, for a later one."""
        with self.link.lock:
            topic.handles -= 1
            return topic.handles == 0

    # -- Sending: attempts, under the lock ---------------------------------------------------

    def send(self, topic: Topic, message: Outgoing) -> bool | None:
        """Send one message to every transport; None if the publisher has to wait for room."""
        self.read_subscriptions()
        if not self._pay(topic):
            return None
        seq, now = topic.seq + 1, time.time_ns()
        taken = False
        for bound in self._bound:
            parts = message.parts(
                topic.wire,
                Kind.DATA,
                sender=self._home.node_id,
                seq=seq,
                time_ns=now,
                flags=self._flags,
                compressed=bound.scheme == "tcp",
            )
            if send_parts(bound.socket, parts):
                taken = True
            elif not self.waits:
                self._send_dropping(bound.socket, parts)
            elif taken:
                topic.owed.append((bound.socket, parts))
            else:
                has_input(bound.socket)  # or the descriptor stays readable: a busy loop
                return None
        topic.seq = seq
        if not topic.dirty:
            topic.dirty = True
            self._dirty[topic] = -1
        self.counters.sent += 1
        self.counters.bytes_sent += message.size
        return True

    def _send_dropping(self, socket: Socket, parts: list[bytes]) -> None:
        """To all who have room; the others will see the gap."""
        socket.setsockopt(zmq.XPUB_NODROP, 0)
        try:
            send_parts(socket, parts)
        finally:
            socket.setsockopt(zmq.XPUB_NODROP, 1)
        self.counters.dropped["subscriber full"] += 1

    def _pay(self, topic: Topic) -> bool:
        while topic.owed:
            socket, parts = topic.owed[0]
            if not send_parts(socket, parts):
                has_input(socket)
                return False
            del topic.owed[0]
        return True

    # -- Subscribers -------------------------------------------------------------------------

    def look(self) -> None:
        """The sockets want to be looked at."""
        with self.link:
            self.read_subscriptions()

    def read_subscriptions(self) -> None:
        """Take notice of who subscribed and who left, and answer the newcomers. Under the lock."""
        changed = False
        for bound in self._bound:
            if not has_input(bound.socket):
                continue
            while (parts := read_parts(bound.socket, 1)) is not None:
                changed = self._subscription(bound.socket, parts[0]) or changed
        if changed:
            self.link.wake_all()

    def _subscription(self, socket: Socket, message: bytes) -> bool:
        what, address = message[:1], message[1:]
        if address[:1] == QUESTION:
            if what == b"\1" and (known := self._readers.get(address[1:])) is not None:
                self._answer_soon(address[1:], known, self._marks)
            return False
        if what == b"\0":
            return self._unsubscribed(address)
        if what != b"\1" or len(message) > limits.SUBSCRIPTION_BYTES_MAX:
            self.counters.dropped["malformed"] += 1
            return False
        pattern = pattern_of(address)
        if pattern is None:
            return False  # a plain subscription: ZeroMQ itself filters by it
        if not is_pattern(pattern):
            self.counters.dropped["malformed"] += 1
            return False
        if len(self._readers) >= limits.READERS_MAX and address not in self._readers:
            self.counters.dropped["too many subscribers"] += 1
            return False
        reader = self._readers.setdefault(address, Reader(pattern, socket))
        reader.connections += 1
        reader.socket = socket
        self._answer_soon(address, reader, self._lasts_and_marks)
        return True

    def _unsubscribed(self, address: bytes) -> bool:
        reader = self._readers.get(address)
        if reader is None:
            return False
        reader.connections -= 1
        if not reader.connections:
            del self._readers[address]
            self._unanswered.pop(address, None)
        return True

    def _answer_soon(self, address: bytes, reader: Reader, answer: _Answer) -> None:
        """Send it what it needs, or note that there was no room."""
        if all(send_parts(reader.socket, [frame]) for frame in answer(address, reader)):
            self._unanswered.pop(address, None)
        else:
            self._unanswered[address] = (reader, answer)

    def _lasts_and_marks(self, address: bytes, reader: Reader) -> list[bytes]:
        """For a newcomer: the last values it may want, and then where every sequence stands."""
        lasts = [
            self._to_reader(address, Kind.LAST, t.last, t.seq, t.last_time_ns)
            for t in self._topics.values()
            if t.last is not None and matches(reader.pattern, t.name)
        ]
        return lasts + self._marks(address, reader)

    def _marks(self, address: bytes, reader: Reader) -> list[bytes]:
        """Where every sequence that matches stands; each frame says how many follow it."""
        standing = {t.name: t.seq for t in self._topics.values() if matches(reader.pattern, t.name)}
        names = list(standing)
        chunks = [names[i : i + _MARK_TOPICS_MAX] for i in range(0, len(names), _MARK_TOPICS_MAX)]
        bodies = [
            codec.pack_body([codec.pack({n: standing[n] for n in c})]) for c in chunks or [[]]
        ]
        left = range(len(bodies) - 1, -1, -1)
        return [
            self._to_reader(address, Kind.MARK, body, seq)
            for body, seq in zip(bodies, left, strict=True)
        ]

    def _to_reader(
        self, address: bytes, kind: Kind, body: bytes, seq: int, time_ns: int = 0
    ) -> bytes:
        sender = self._home.node_id
        return encode(
            address, kind, body, flags=self._flags, sender=sender, seq=seq, time_ns=time_ns
        )

    def marked(self, address: str) -> None:
        """A subscriber said over the control link that its mark has arrived."""
        with self.link:
            reader = self._readers.get(address.encode())
            if reader is not None:
                reader.marked = True
                self.link.wake_all()

    def subscribers(self, topic: Topic) -> int:
        """How many subscribers have their mark. Under the lock."""
        self.read_subscriptions()
        return sum(r.marked and matches(r.pattern, topic.name) for r in self._readers.values())

    # -- The rest of a core ------------------------------------------------------------------

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        raise AssertionError("subscribers connect here; this side connects to nobody")

    def detach(self, peer: int, key: int, reason: str) -> None:
        raise AssertionError("subscribers connect here; this side connects to nobody")

    def tick(self) -> None:
        """Answer whom there was no room to answer; mark the topics that were quiet for a tick."""
        with self.link:
            self._home.transport.follow(self._bound)
            self.read_subscriptions()
            for address, (reader, answer) in list(self._unanswered.items()):
                self._answer_soon(address, reader, answer)
            for topic, seq in list(self._dirty.items()):
                if seq != topic.seq:
                    self._dirty[topic] = topic.seq
                elif self._pay(topic) and self._mark(topic):
                    del self._dirty[topic]
                    topic.dirty = False

    def _mark(self, topic: Topic) -> bool:
        """Tell all subscribers of a quiet topic where it stands; False if some had no room."""
        mark = [self._to_reader(topic.wire, Kind.MARK, b"", topic.seq)]
        complete = True
        for bound in self._bound:
            if not send_parts(bound.socket, mark):
                complete = False  # those without room get it later
        return complete

    def close(self, linger_ms: int) -> None:
        try:
            with self.link:
                for topic in self._topics.values():
                    self._pay(topic)
                for topic in self._dirty:
                    self._mark(topic)
        except Closed:
            return
        self.link.close(linger_ms)
