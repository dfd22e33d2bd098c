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
from collections.abc import Iterator
from dataclasses import dataclass, field

import zmq

from mesh import limits
from mesh.errors import OptionsDiffer
from mesh.names import check_name, is_pattern, matches
from mesh.options import PublisherOptions, WhenFull, check_count
from mesh.sockets import codec
from mesh.sockets.connections import Accepted
from mesh.sockets.control import Offer
from mesh.sockets.frame import QUESTION, Flag, Kind, encode, pattern_of, wire_name
from mesh.sockets.home import Counters, Home
from mesh.sockets.link import Link, has_input, send_parts
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
    handles: list[None] = field(default_factory=list)
    """One for each, so that a handle that is collected can be taken off without a lock."""
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
    connections: dict[Accepted, None] = field(default_factory=dict)
    """The oldest first: a new one may subscribe before the end of the old one is noticed."""
    peer: int = 0
    """Its node, once that said that the mark has arrived; 0 before."""
    answer: Iterator[bytes] = field(default_factory=lambda: iter(()))
    """What it is still to be sent in answer to its subscription."""
    unsent: bytes | None = None
    """The next of that, for which there was no room."""
    asks_again: bool = False
    """Whether it asked for its mark while it was being answered."""


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
        self._unanswered: dict[bytes, Reader] = {}
        self._dirty: dict[Topic, int] = {}
        self._bound: list[Bound] = home.transport.bind(
            zmq.XPUB, when_full, bytes_max=limits.SMALL_FRAME_BYTES_MAX
        )
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
            topic.handles.append(None)
            return topic

    def is_open(self, name: str) -> bool:
        """Whether handles to a topic of that name are open here."""
        with self.link.lock:
            topic = self._topics.get(name)
            return topic is not None and bool(topic.handles)

    def release(self, topic: Topic) -> None:
        """A handle is gone. The sequence stays, for a later one. Takes no lock."""
        topic.handles.pop()

    # -- Sending: attempts, under the lock ---------------------------------------------------

    def send(self, topic: Topic, message: Outgoing, last: bytes | None = None) -> bool | None:
        """Send one message to every transport; None if the publisher has to wait for room. `last`:
        the payload of a LAST frame that repeats it."""
        self.read_subscriptions()
        if not self._pay(topic):
            return None
        seq, now, taken = topic.seq + 1, time.time_ns(), False
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
            # Before it is sent: a KeyboardInterrupt between the two then shows as a gap; a number
            # given twice would make a repeat of the next message.
            topic.seq = seq
            if send_parts(bound.socket, parts):
                taken = True
            elif not self.waits:
                self._send_dropping(bound.socket, parts)
                self.counters.dropped["subscriber full"] += 1
            elif taken:
                topic.owed.append((bound.socket, parts))
            else:
                topic.seq = seq - 1
                return None
        if last is not None:
            topic.last, topic.last_time_ns = last, now
        if not topic.dirty:
            topic.dirty = True
            self._dirty[topic] = -1
        self.counters.sent += 1
        self.counters.bytes_sent += message.size
        return True

    def _send_dropping(self, socket: Socket, parts: list[bytes]) -> None:
        """To all who have room; the others will see the gap."""
        try:
            socket.setsockopt(zmq.XPUB_NODROP, 0)
            send_parts(socket, parts)
        finally:
            socket.setsockopt(zmq.XPUB_NODROP, 1)

    def _pay(self, topic: Topic) -> bool:
        while topic.owed:
            socket, parts = topic.owed[0]
            if not send_parts(socket, parts):
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
        for bound in self._bound:
            if not has_input(bound.socket):
                continue
            while (message := _receive(bound.socket)) is not None:
                self._subscription(bound.socket, message)

    def _subscription(self, socket: Socket, frame: zmq.Frame) -> None:
        message = frame.bytes
        what, address = message[:1], message[1:]
        if address[:1] == QUESTION:
            if what == b"\1" and (known := self._readers.get(address[1:])) is not None:
                self._asked(address[1:], known)
            return
        if what == b"\0":
            self._unsubscribed(address)
            return
        if what != b"\1":
            self.counters.dropped["malformed"] += 1
            return
        pattern = pattern_of(address)
        if pattern is None:
            return  # a plain subscription: ZeroMQ itself filters by it
        if not is_pattern(pattern):
            self.counters.dropped["malformed"] += 1
            return
        if len(self._readers) >= limits.READERS_MAX and address not in self._readers:
            self.counters.dropped["too many subscribers"] += 1
            return
        reader = self._readers.setdefault(address, Reader(pattern, socket))
        reader.socket = socket
        reader.connections[Accepted.of(frame)] = None
        self._answer(address, reader, self._lasts_and_marks(address, reader))

    def _unsubscribed(self, address: bytes) -> None:
        """One of its connections ended: which one, libzmq does not say."""
        reader = self._readers.get(address)
        if reader is None:
            return
        ended = [connection for connection in reader.connections if connection.ended]
        del reader.connections[(ended or list(reader.connections))[0]]
        if not reader.connections:
            self._forget(address)

    def _forget(self, address: bytes) -> None:
        del self._readers[address]
        self._unanswered.pop(address, None)

    def _asked(self, address: bytes, reader: Reader) -> None:
        if address in self._unanswered:
            reader.asks_again = True  # what it is still to be sent may be out of date by then
        else:
            self._answer(address, reader, self._marks(address, reader))

    def _answer(self, address: bytes, reader: Reader, answer: Iterator[bytes]) -> None:
        reader.answer, reader.unsent = answer, next(answer, None)
        self._go_on_answering(address, reader)

    def _go_on_answering(self, address: bytes, reader: Reader) -> None:
        """Send what there is room for; the rest has to wait."""
        while reader.unsent is not None:
            if not send_parts(reader.socket, [reader.unsent]):
                self._unanswered[address] = reader
                return
            reader.unsent = next(reader.answer, None)
            if reader.unsent is None and reader.asks_again:
                reader.asks_again = False
                reader.answer = self._marks(address, reader)
                reader.unsent = next(reader.answer)
        self._unanswered.pop(address, None)

    def _lasts_and_marks(self, address: bytes, reader: Reader) -> Iterator[bytes]:
        """For a newcomer: the last values it may want, and then where every sequence stands."""
        for t in list(self._topics.values()):
            if t.last is not None and matches(reader.pattern, t.name):
                yield self._to_reader(address, Kind.LAST, t.last, t.seq, t.last_time_ns)
        yield from self._marks(address, reader)

    def _marks(self, address: bytes, reader: Reader) -> Iterator[bytes]:
        """Where every sequence that matches stands; each frame says how many follow it."""
        standing = {
            t.name: t.seq - sum(socket is reader.socket for socket, _ in t.owed)
            for t in self._topics.values()
            if matches(reader.pattern, t.name)
        }
        names = list(standing)
        chunks = [names[i : i + _MARK_TOPICS_MAX] for i in range(0, len(names), _MARK_TOPICS_MAX)]
        for left, chunk in reversed(list(enumerate(reversed(chunks or [[]])))):
            body = codec.pack_body([codec.pack({name: standing[name] for name in chunk})])
            yield self._to_reader(address, Kind.MARK, body, left)

    def _to_reader(
        self, address: bytes, kind: Kind, body: bytes, seq: int, time_ns: int = 0
    ) -> bytes:
        sender = self._home.node_id
        return encode(
            address, kind, body, flags=self._flags, sender=sender, seq=seq, time_ns=time_ns
        )

    def marked(self, peer: int, address: str) -> None:
        """The subscriber of `peer` said over the control link that its mark has arrived."""
        with self.link:
            reader = self._readers.get(address.encode())
            if reader is not None:
                reader.peer = peer
                self.link.wake_all()

    def lost(self, peer: int) -> None:
        """That node is gone, though its connections may look alive: its host fell silent, or a
        child holds what its dead parent had. It is waited for no more."""
        with self.link:
            self.read_subscriptions()
            for address, reader in list(self._readers.items()):
                if reader.peer == peer:
                    for connection in reader.connections:
                        connection.cut()
                    self._forget(address)
            self.link.wake_all()

    def subscribers(self, topic: Topic) -> int:
        """How many subscribers have their mark. Under the lock."""
        self.read_subscriptions()
        return sum(
            reader.peer != 0 and matches(reader.pattern, topic.name)
            for reader in self._readers.values()
        )

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
            for address, reader in list(self._unanswered.items()):
                self._go_on_answering(address, reader)
            for topic, seq in list(self._dirty.items()):
                if seq != topic.seq:
                    self._dirty[topic] = topic.seq
                elif self._pay(topic) and self._mark(topic):
                    del self._dirty[topic]
                    topic.dirty = False

    def _mark(self, topic: Topic, *, last_chance: bool = False) -> bool:
        """Tell all subscribers of a quiet topic where it stands; False if some had no room, and
        none was told (but for a `last_chance`, of those that may lose something)."""
        mark = [self._to_reader(topic.wire, Kind.MARK, b"", topic.seq)]
        complete = True
        for bound in self._bound:
            if not send_parts(bound.socket, mark):
                complete = False
                if last_chance and not self.waits:
                    self._send_dropping(bound.socket, mark)
        return complete

    def close(self, linger_ms: int) -> None:
        """What was sent goes on its way for `linger_ms`, and where the sequences stand."""
        self.link.close(linger_ms, first=self._conclude)
        self._home.transport.release(self._bound)

    def _conclude(self) -> None:
        for topic in self._topics.values():
            self._pay(topic)
        for topic in self._dirty:
            self._mark(topic, last_chance=True)


def _receive(socket: Socket) -> zmq.Frame | None:
    """One subscription, which knows the connection it came by; None if there is none."""
    try:
        return socket.recv(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None
