"""The subscribers of a node's topics, as they make themselves known in band, and what each is told.

A subscriber subscribes to an address of its own besides its pattern, and is answered there: with
the last values that topics keep for newcomers, and with its mark. Used under the publishers' lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import msgspec
import zmq

from mesh import limits
from mesh.names import is_pattern, matches
from mesh.sockets import codec
from mesh.sockets.connections import Accepted
from mesh.sockets.frame import QUESTION, Kind, encode, pattern_of
from mesh.sockets.parts import send_parts
from mesh.sockets.topic import Topic
from mesh.sockets.transport import Socket

_MARK_TOPICS_MAX = 1000
"""Topics in one mark, so that it stays within a frame's bounds."""


class Reader(msgspec.Struct):
    """A subscriber, as it made itself known in band."""

    pattern: str
    socket: Socket
    connections: dict[Accepted, None] = msgspec.field(default_factory=dict)
    """The oldest first: a new one may subscribe before the end of the old one is noticed."""
    peer: int = 0
    """Its node, once that said that the mark has arrived; 0 before."""
    answer: Iterator[bytes] = msgspec.field(default_factory=lambda: iter(()))
    """What it is still to be sent in answer to its subscription."""
    unsent: bytes | None = None
    """The next of that, for which there was no room."""
    asks_again: bool = False
    """Whether it asked for its mark while it was being answered."""


class Readers:
    """All of them, by address."""

    def __init__(
        self, topics: Mapping[str, Topic], dropped: Counter[str], *, node_id: int, flags: int
    ) -> None:
        self._topics = topics
        self._dropped = dropped
        self._node_id = node_id
        self._flags = flags
        self._readers: dict[bytes, Reader] = {}
        self._unanswered: dict[bytes, Reader] = {}
        self._at: Counter[Socket] = Counter()

    def __len__(self) -> int:
        return len(self._readers)

    def accept(self, socket: Socket, frame: zmq.Frame) -> None:
        """A subscription, or the end of one, came by `socket`."""
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
            self._dropped["malformed"] += 1
            return
        pattern = pattern_of(address)
        if pattern is None:
            return  # a plain subscription: ZeroMQ itself filters by it
        if not is_pattern(pattern):
            self._dropped["malformed"] += 1
            return
        if len(self._readers) >= limits.READERS_MAX and address not in self._readers:
            self._dropped["too many subscribers"] += 1
            return
        reader = self._readers.get(address)
        if reader is None:
            reader = self._readers[address] = Reader(pattern, socket)
        else:
            self._at[reader.socket] -= 1
        reader.socket = socket
        self._at[socket] += 1
        connection = Accepted.of(frame)
        reader.connections[connection] = None
        connection.widen()
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
        self._at[self._readers.pop(address).socket] -= 1
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
                body = t.last.last_of(t.name)
                yield self._to_reader(address, Kind.LAST, body, t.seq, t.last_time_ns)
        yield from self._marks(address, reader)

    def _marks(self, address: bytes, reader: Reader) -> Iterator[bytes]:
        """Where every sequence that matches stands; each frame says how many follow it."""
        standing = {
            t.name: t.standing(reader.socket)
            for t in self._topics.values()
            if matches(reader.pattern, t.name)
        }
        names = list(standing)
        chunks = [names[i : i + _MARK_TOPICS_MAX] for i in range(0, len(names), _MARK_TOPICS_MAX)]
        for left, chunk in reversed(list(enumerate(reversed(chunks or [[]])))):
            body = codec.pack_body([codec.pack({name: standing[name] for name in chunk})])
            yield self._to_reader(address, Kind.MARK, body, left)

    def _to_reader(
        self, address: bytes, kind: int, body: bytes, seq: int, time_ns: int = 0
    ) -> bytes:
        sender = self._node_id
        return encode(
            address, kind, body, flags=self._flags, sender=sender, seq=seq, time_ns=time_ns
        )

    def go_on_answering(self) -> None:
        """There may be room now for those that had none."""
        for address, reader in list(self._unanswered.items()):
            self._go_on_answering(address, reader)

    def marked(self, peer: int, address: bytes) -> bool:
        """The subscriber of `peer` has its mark; False if it is not here any more."""
        reader = self._readers.get(address)
        if reader is not None:
            reader.peer = peer
        return reader is not None

    def lost(self, peer: int) -> None:
        """That node is gone, though its connections may look alive."""
        for address, reader in list(self._readers.items()):
            if reader.peer == peer:
                for connection in reader.connections:
                    connection.cut()
                self._forget(address)

    def connections(self) -> list[Accepted]:
        """Of all of them."""
        return [each for reader in self._readers.values() for each in reader.connections]

    def at(self, socket: Socket) -> int:
        """How many came by that socket."""
        return self._at[socket]

    def of(self, channel: str) -> int:
        """How many subscribers of `channel` have their mark."""
        return sum(
            reader.peer != 0 and matches(reader.pattern, channel)
            for reader in self._readers.values()
        )
