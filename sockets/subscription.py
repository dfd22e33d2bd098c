"""The core of a subscriber: its sockets, what is read but not taken, and what was missed.

A gap in a publisher's sequence is counted, whether it was dropped for want of room here, or missed
while the connection was down, or was the last before a silence. ZeroMQ filters by the pattern's
literal prefix, this module by the rest. What came in one frame waits in the inbox; nothing more is
read before that is taken, so libzmq's buffer is the bound, but for what the control thread reads
ahead until awaited marks have come.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence, Sized
from functools import partial
from typing import Any

import zmq

from mesh import limits
from mesh.message import Loss, Message, Messages, Origin, Run
from mesh.names import check_pattern, is_name, literal_prefix, matches
from mesh.options import SubscriberOptions
from mesh.sockets import codec
from mesh.sockets.connections import Watch
from mesh.sockets.control import Offer, OfferKind
from mesh.sockets.flow import Flow, Flows
from mesh.sockets.frame import (
    QUESTION,
    Flag,
    Frame,
    Kind,
    Malformed,
    Part,
    channel_name,
    decode,
    is_pad,
    subscriber_address,
    subscriptions,
    wire_name,
)
from mesh.sockets.home import Counters, Home, node_text
from mesh.sockets.inbox import Inbox
from mesh.sockets.link import Link
from mesh.sockets.moment import CALM_S, MOMENT_MS, MOMENT_S, may_hold
from mesh.sockets.parts import parts_of, read_first, recv
from mesh.sockets.sequences import Sequences
from mesh.sockets.transport import Socket, scheme_of

_FRAMES_PER_ATTEMPT = 256
"""Read at most so many before the deadline is looked at again: all may be for others."""
_FRAMES_AHEAD = 4096
"""Read at most so many at a time to come to what is newest: several times what libzmq holds."""
_AHEAD = 32
_FOUND_MANY = 3
"""Who found a message so many times without sleeping reads up to so many small ones at a time: each
time the lock is taken costs as much as a message."""
_SMALL_BYTES = 4096
_SURE_HITS = 2
"""After so many frames in a row there is most likely another."""
_NAMES_CACHED = 10_000
_ASKING_TICKS = 20
"""Without ever being quiet, a subscriber asks where its publishers stand every five seconds."""
_RETIRING_TICKS = 8
"""A publisher that left may still be flushing: it is disconnected two seconds later."""


def _order(message: Message) -> tuple[object, int]:
    """Whose sequence a message is part of, and its place in it."""
    return (message.sender, message.channel), message.seq


def _any(*stores: Sized) -> bool:
    return any(map(len, stores))


def _origin(frame: Frame) -> int:
    """Whose sequence a frame is part of: a node's topics that wait are apart from its others."""
    return frame.sender << 1 | bool(frame.flags & Flag.WAITS)


class Subscription:
    """What one `mesh.sockets.subscriber.Subscriber` works on; its reading is under the lock."""

    kind = "topic"
    seeks: OfferKind = "publish"

    def __init__(self, home: Home, pattern: str, options: SubscriberOptions) -> None:
        self.channel = check_pattern(pattern)
        self.counters = Counters()
        self.lost: dict[str, int] = {}
        self.on_loss: Callable[[Loss], object] | None = None
        self._home = home
        self._latest_only = options.latest_only
        self._address = subscriber_address(secrets.token_hex(8), pattern)
        self._subscriptions = subscriptions(*literal_prefix(pattern))
        self._sockets: dict[str, Socket] = {}
        self._watches: dict[str, Watch] = {}
        self._turns: deque[Socket] = deque()
        """The sockets, the one whose turn it is to be read first."""
        self._found = 0
        """How often in a row somebody who took a message found one."""
        self._hits = 0
        """How often in a row there was something to read."""
        self._brisk = False
        """Whether the last messages followed each other within a moment."""
        self._took_at = 0.0
        self._small = False
        """Whether the last frame was small."""
        self._drained = False
        """Whether there was nothing left to read when last there was a look."""
        self.inbox = Inbox()
        """What is read and was not taken."""
        self._latest: dict[tuple[str, str], Message] = {}
        self.link = Link(f"subscriber {pattern!r}", partial(_any, self.inbox, self._latest))
        self.link.on_abandon = self.inbox.clear
        self._sequences = Sequences()
        self._channels: dict[bytes, str | None] = {}
        self._views = options.views
        self._flows = Flows(home.transport.message_bytes_max, views=options.views)
        self._offers: dict[tuple[int, bool], tuple[str, set[int]]] = {}
        """By peer, and whether its topics wait (those name endpoints in their offers): where they
        are, and the offers' keys."""
        self._retiring: dict[str, int] = {}
        self._awaiting: set[tuple[int, bool]] = set()
        self._heard = 0
        """Frames of topics that came, those that the pattern does not want included."""
        self._quiet_at = 0
        self._asked_at = 0
        self._ticks_since_asked = 0

    # -- Reading: under the lock -------------------------------------------------------------

    def take(self) -> Message | None:
        """The next message, or None after reading all there is."""
        self._fill(1, _FRAMES_AHEAD if self._latest_only else _FRAMES_PER_ATTEMPT)
        message = self._pop()
        if message is None:
            self._found = 0
        elif self._found < _FOUND_MANY:
            self._found += 1
        else:  # nobody slept for a while: the next are there, too
            while self._small and len(self.inbox) < _AHEAD and self._read():
                pass
            self.inbox.make()
        return message

    def take_soon(self) -> Message | None:
        """`take`, which waits a moment for the message if the last ones followed each other closely
        and nobody else is about (`mesh.sockets.moment`). For threads that would sleep otherwise."""
        link = self.link
        message = self._pop()
        if self._brisk and not (link._threads or link.loops or len(self._turns) != 1):
            socket = self._turns[0]
            while message is None:
                try:
                    first: bytes = recv(socket, 0)
                except zmq.Again:
                    self._brisk = False
                    return None
                self._take_in(socket, first)
                message = self._pop()
        elif message is None:
            message = self.take()
        if message is not None:
            now = time.monotonic()
            if now - self._took_at > MOMENT_S:
                self._brisk = False
            elif not self._brisk and now - link.met_at > CALM_S:
                self._brisk = may_hold()
            self._took_at = now
        return message

    def take_many(self, count_max: int) -> Messages | None:
        """All messages there are, up to `count_max` and about `limits.RECV_MANY_BYTES`, or None."""
        if not self._latest_only:
            self._fill(count_max, count_max, limits.RECV_MANY_BYTES)
            return self.inbox.pop_many(count_max) or None
        self._fill(1, _FRAMES_AHEAD)
        latest: list[Message] = []
        while len(latest) < count_max and (message := self._pop()) is not None:
            latest.append(message)
        messages = Messages()
        messages.add(latest)
        return messages or None

    def _pop(self) -> Message | None:
        if not self._latest:
            return self.inbox.pop()
        return self._latest.pop(next(iter(self._latest)))

    def give_back(self, messages: Sequence[Message]) -> None:
        """Their receiver was cancelled before it saw them: they are for somebody else, in order."""
        if not self._latest_only:
            self.inbox.put_back(messages, _order)
            return
        for message in reversed(messages):
            if self._latest.setdefault((message.sender, message.channel), message) is not message:
                self.counters.dropped["superseded"] += 1

    def _fill(self, messages: int, frames_max: int, bytes_max: float = math.inf) -> None:
        """Read until so many messages are there, or so many bytes were read, or nothing is left."""
        enough = self.counters.bytes_received + bytes_max
        for _ in range(frames_max):
            if len(self.inbox) >= messages or self.counters.bytes_received >= enough:
                return
            if not self._read():
                return
        self.link.wake_all()  # there may be more

    def _read(self) -> bool:
        """Take in one frame, from the sockets in turn; False if there is none."""
        sure = (self._hits >= _SURE_HITS or self.link.rang) and len(self._turns) == 1
        self.link.rang = False
        for socket in self._turns:
            if (first := read_first(socket, sure=sure)) is not None:
                self._hits += 1
                self._drained = False
                self._turns.rotate(-1)
                self._take_in(socket, first)
                return True
        self._hits = 0
        self._drained = True
        return False

    def _take_in(self, socket: Socket, first: bytes) -> None:
        """The frame that begins with that part."""
        try:
            plain = self._flows.read(socket, first)
            if plain is not None:
                self._accept_plain(*plain)
            elif not is_pad(first):
                self._accept(parts_of(socket, first, views=self._views))
        except Malformed as fault:
            self.counters.dropped[fault.reason] += 1

    def _accept_plain(self, flow: Flow, seq: int, time_ns: int, payload: Any, size: int) -> None:
        """One message, like the last one of its topic."""
        missed, skip = self._sequences.take(flow.sequences, flow.name, seq, 1)
        if missed:
            self._missed(flow.sequences >> 1, flow.channel, missed, seq - 1)
        self._heard += 1
        self._small = size < _SMALL_BYTES
        counters = self.counters
        counters.bytes_received += size
        if not skip:
            counters.received += 1
            origin = Origin(flow.channel, flow.sender, seq, time_ns)
            self.inbox.append(Message(payload, 0, origin))

    def _accept(self, parts: list[Part]) -> None:
        frame = decode(parts)
        self._small = len(parts) == 1 and len(parts[0]) < _SMALL_BYTES
        if frame.name == self._address:
            self._accept_own(frame)
            return
        self._heard += frame.kind == Kind.DATA
        channel = self._channel(frame.name)
        if channel is None:
            return
        if frame.kind == Kind.MARK:
            missed = self._sequences.falls_quiet_at(_origin(frame), frame.name, frame.seq)
            self._missed(frame.sender, channel, missed, frame.seq)
        elif frame.kind == Kind.DATA:
            self._accept_data(frame, channel)
            if not self._latest_only:
                self._flows.learn(parts[0], frame, channel, _origin(frame))
        else:
            raise Malformed("malformed")

    def _accept_data(self, frame: Frame, channel: str) -> None:
        payloads, headers = codec.unpack_frame(frame, self._home.transport.message_bytes_max)
        missed, skip = self._sequences.take(_origin(frame), frame.name, frame.seq, frame.count)
        if missed:
            self._missed(frame.sender, channel, missed, frame.seq - 1)
        self.counters.bytes_received += len(frame.body) + len(frame.detached or b"")
        sender = node_text(frame.sender)
        origin = Origin(channel, sender, frame.seq, frame.time_ns, headers)
        del payloads[:skip]
        self._deliver(Run(payloads, skip, origin))

    def _accept_own(self, frame: Frame) -> None:
        """What a publisher sent to this subscriber alone: a last value, or where it stands."""
        payloads, _ = codec.unpack_frame(frame, self._home.transport.message_bytes_max)
        if len(payloads) != 1:
            raise Malformed("malformed")
        if frame.kind == Kind.LAST:
            self._accept_last(frame, payloads[0])
        elif frame.kind == Kind.MARK:
            self._accept_mark(frame, payloads[0])
        else:
            raise Malformed("malformed")

    def _accept_last(self, frame: Frame, item: Any) -> None:
        if type(item) is not list or len(item) != 3 or not is_name(item[0]):
            raise Malformed("malformed")
        channel, payload, flat = item
        headers = codec.read_headers(flat)
        if not matches(self.channel, channel):
            return
        first, skip = self._sequences.take(_origin(frame), wire_name(channel), frame.seq, 1)
        self._missed(frame.sender, channel, first, frame.seq - 1)
        if not skip:
            sender = node_text(frame.sender)
            origin = Origin(channel, sender, frame.seq, frame.time_ns, [headers])
            self._deliver(Run([payload], 0, origin))

    def _accept_mark(self, frame: Frame, standing: Any) -> None:
        if type(standing) is not dict:
            raise Malformed("malformed")
        for channel, seq in standing.items():
            if not is_name(channel) or type(seq) is not int or not 0 <= seq < 1 << 63:
                raise Malformed("malformed")
            first = self._sequences.stands_at(_origin(frame), wire_name(channel), seq)
            self._missed(frame.sender, channel, first, seq)
        if frame.seq == 0:  # no further part of this mark follows
            self._sequences.marked(_origin(frame))
            waits = bool(frame.flags & Flag.WAITS)
            self._awaiting.discard((frame.sender, waits))
            self._home.acknowledge(frame.sender, self._address.decode(), waits)

    def _deliver(self, run: Run) -> None:
        self.counters.received += len(run)
        if not self._latest_only:
            self.inbox.add(run)
            return
        for message in run:
            key = (message.sender, message.channel)
            if key in self._latest:
                self.counters.dropped["superseded"] += 1
            elif len(self._latest) >= limits.TRACKED_CHANNELS_MAX:
                self.counters.dropped["too many channels"] += 1
                continue
            self._latest[key] = message

    def _missed(self, sender: int, channel: str, first: int, last: int) -> None:
        if not first:
            return
        text = node_text(sender)
        loss = Loss(text, channel, first, last)
        self.counters.lost += loss.count
        if text in self.lost or len(self.lost) < limits.SIGHTINGS_MAX:
            self.lost[text] = self.lost.get(text, 0) + loss.count
        if self.on_loss is not None:
            self._home.run_hook(self.on_loss, loss)

    def _channel(self, name: bytes) -> str | None:
        """The channel in a frame's name if the pattern wants it."""
        try:
            return self._channels[name]
        except KeyError:
            channel = channel_name(name)
            if channel is not None and not (is_name(channel) and matches(self.channel, channel)):
                channel = None
            if len(self._channels) >= _NAMES_CACHED:
                self._channels.clear()
            self._channels[name] = channel
            return channel

    # -- Peers -------------------------------------------------------------------------------

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        with self.link:
            side = (peer, bool(offer.endpoints))
            known, keys = self._offers.get(side, ("", set()))
            if known == endpoint:
                keys.add(offer.key)
                return
            socket = self._socket(endpoint)
            connected = endpoint in self._retiring
            if not connected:
                socket.connect(endpoint)
            # Nothing is noted before that has worked: what failed is tried again.
            if known:
                self._retiring[known] = _RETIRING_TICKS  # it moved
            self._offers[side] = endpoint, keys | {offer.key}
            self._awaiting.add(side)
            if connected:
                del self._retiring[endpoint]
                self._ask()  # its mark may have come when there was no telling that it did

    def detach(self, peer: int, key: int, reason: str) -> None:
        """Not disconnected at once: that would throw away what is on its way or was not read."""
        with self.link:
            for side in ((peer, False), (peer, True)):
                endpoint, keys = self._offers.get(side, ("", set()))
                if key not in keys:
                    continue
                keys.discard(key)
                if not keys:
                    del self._offers[side]
                    self._awaiting.discard(side)
                    self._retiring[endpoint] = _RETIRING_TICKS

    @property
    def expects_mark(self) -> bool:
        """Whether the control thread should read on until a publisher's mark has come."""
        return bool(self._awaiting) and len(self.inbox) < limits.BUFFER_MESSAGES

    def read_ahead(self) -> None:
        """Read until the marks that are awaited have come, so that a publisher's `wait_for` does
        not depend on somebody receiving here already."""
        with self.link:
            for _ in range(_FRAMES_AHEAD):
                if not self.expects_mark or not self._read():
                    return

    def tick(self) -> None:
        self.read_ahead()
        with self.link:
            self.link.readable()  # or one whose connection came back would not subscribe again
            self._fill(1, _FRAMES_PER_ATTEMPT)
            all_read = self._drained and not self.inbox and not self._latest
            self._ask_when_quiet(all_read)
            self._look_at_connections(all_read)
            self._retire(all_read)

    def _retire(self, all_read: bool) -> None:
        """Disconnect those that left a while ago. Where nobody reads, they would be ever more."""
        for endpoint, ticks in list(self._retiring.items()):
            self._retiring[endpoint] = ticks - 1
            if (ticks <= 0 and all_read) or len(self._retiring) > limits.PEERS_MAX:
                self.counters.dropped["left unread"] += not all_read
                del self._retiring[endpoint]
                self._watches[scheme_of(endpoint)].forget(endpoint)
                self._sockets[scheme_of(endpoint)].disconnect(endpoint)

    def _look_at_connections(self, all_read: bool) -> None:
        """Connect again where libzmq gave up, after a frame over this side's limit for one: what
        was missed shows in the new mark. Disconnecting throws away what was not read, so that is
        read before.
        """
        for scheme, watch in self._watches.items():
            _, given_up = watch.look()
            for endpoint in given_up:
                sides = [side for side, (known, _) in self._offers.items() if known == endpoint]
                if all_read and sides:
                    self.counters.dropped["connection lost"] += 1
                    watch.forget(endpoint)
                    self._awaiting.update(sides)
                    self._sockets[scheme].disconnect(endpoint)
                    self._sockets[scheme].connect(endpoint)

    def _ask_when_quiet(self, all_read: bool) -> None:
        """Having read all there is, ask where the publishers stand: what they dropped last, and
        their own marks with it, shows in nothing that came."""
        heard = self._heard
        self._ticks_since_asked += 1
        quiet = heard == self._quiet_at and all_read
        self._quiet_at = heard
        if heard == self._asked_at or not (quiet or self._ticks_since_asked > _ASKING_TICKS):
            return
        self._asked_at, self._ticks_since_asked = heard, 0
        self._ask()

    def _ask(self) -> None:
        for socket in self._sockets.values():
            socket.subscribe(QUESTION + self._address)
            socket.unsubscribe(QUESTION + self._address)

    def _socket(self, endpoint: str) -> Socket:
        scheme = scheme_of(endpoint)
        socket = self._sockets.get(scheme)
        if socket is None:
            socket = self._home.transport.connecting(zmq.SUB, scheme)
            with contextlib.ExitStack() as undo:
                undo.callback(socket.close, linger=0)
                socket.setsockopt(zmq.RCVTIMEO, MOMENT_MS)
                socket.setsockopt(zmq.SNDHWM, 0)  # or what it subscribes to counts as messages
                for prefix in (*self._subscriptions, self._address):
                    socket.subscribe(prefix)
                watch = Watch(socket)
                undo.callback(watch.close)
                self.link.add(socket)
                undo.pop_all()
            self._sockets[scheme] = socket
            self._watches[scheme] = watch
            self._turns.append(socket)
        return socket

    def close(self, linger_ms: int) -> None:
        self.link.close(first=self._unsubscribe)

    def _unsubscribe(self) -> None:
        """In so many words: a forked child may hold the connection open, and publishers up. That is
        sent without linger too, wherever it need not wait."""
        self.inbox.clear()
        for watch in self._watches.values():
            watch.close()
        for socket in self._sockets.values():
            for prefix in (*self._subscriptions, self._address):
                socket.unsubscribe(prefix)
