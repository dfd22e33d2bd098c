"""The core of a subscriber: its sockets, when they are read, and whom they are connected to.

A gap in a publisher's sequence is counted, whether it was dropped for want of room here, or missed
while the connection was down, or was the last before a silence (`mesh.sockets.arrivals`). ZeroMQ
filters by the pattern's literal prefix. What came in one frame waits in the inbox; nothing more is
read before that is taken, so libzmq's buffer is the bound, but for up to 32 small frames that are
read ahead for a caller who never sleeps, and for what the control thread reads until awaited marks
have come.
"""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Sized
from functools import partial

import zmq

from mesh import limits
from mesh.message import Message, Messages
from mesh.names import check_pattern, literal_prefix
from mesh.options import SubscriberOptions
from mesh.sockets.arrivals import Arrivals
from mesh.sockets.connections import Watch
from mesh.sockets.control import Offer, OfferKind
from mesh.sockets.frame import (
    QUESTION,
    subscriber_address,
    subscriptions,
)
from mesh.sockets.home import Home
from mesh.sockets.link import Link
from mesh.sockets.moment import MOMENT_MS, Pace
from mesh.sockets.parts import recv
from mesh.sockets.transport import Socket, scheme_of
from mesh.sockets.turns import Turns

_FRAMES_PER_ATTEMPT = 256
"""Read at most so many before the deadline is looked at again: all may be for others."""
_FRAMES_AHEAD = 4096
"""Read at most so many at a time to come to what is newest: several times what libzmq holds."""
_AHEAD = 32
_FINDS = 3
"""Who found a message so many times without sleeping reads up to so many small ones at a time: each
time the lock is taken costs as much as a message."""
_FRAMES_AWAITED = 8
"""At a time, with the lock held: some pads, and the message behind them."""
_ASKING_TICKS = 20
"""Without ever being quiet, a subscriber asks where its publishers stand every five seconds."""
_RETIRING_TICKS = 8
"""A publisher that left may still be flushing: it is disconnected two seconds later."""


def _any(*stores: Sized) -> bool:
    return any(map(len, stores))


class Subscription:
    """What one `mesh.sockets.subscriber.Subscriber` works on; it is read under the lock."""

    kind = "topic"
    seeks: OfferKind = "publish"

    def __init__(self, home: Home, pattern: str, options: SubscriberOptions) -> None:
        self.channel = check_pattern(pattern)
        self._home = home
        self._latest_only = options.latest_only
        self._address = subscriber_address(secrets.token_hex(8), pattern)
        self._subscriptions = subscriptions(*literal_prefix(pattern))
        self.arrivals = self._arrivals(options)
        self.counters = self.arrivals.counters
        self.inbox = self.arrivals.inbox
        self.link = Link(f"subscriber {pattern!r}", partial(_any, self.inbox, self.arrivals.latest))
        self.link.on_abandon = self.inbox.clear
        self._sockets: dict[str, Socket] = {}
        self._watches: dict[str, Watch] = {}
        self._turns = Turns(self.link)
        self._finds = 0
        """How often in a row somebody who took a message found one."""
        self._drained = False
        """Whether there was nothing left to read when last there was a look."""
        self._pace = Pace()
        self._offers: dict[tuple[int, bool], tuple[str, set[int]]] = {}
        """By peer, and whether its topics wait (those name endpoints in their offers): where they
        are, and the offers' keys."""
        self._retiring: dict[str, int] = {}
        self._quiet_at = 0
        self._asked_at = 0
        self._ticks_since_asked = 0

    def _arrivals(self, options: SubscriberOptions) -> Arrivals:
        return Arrivals(self._home, self.channel, self._address, options)

    # -- Reading: under the lock -------------------------------------------------------------

    def take(self) -> Message | None:
        """The next message, or None after reading all there is."""
        frames_max = _FRAMES_AHEAD if self._latest_only else _FRAMES_PER_ATTEMPT
        message, there = None, True
        while message is None and there:
            there = self._fill(1, frames_max)
            message = self.arrivals.pop()  # another may just have taken it, without the lock
        return self._found(message)

    def take_paced(self) -> Message | None:
        """`take`, which notes for `take_soon` how closely messages follow each other."""
        message = self.take()
        if message is not None:
            self._pace.came(self.link.met_at)
        return message

    def _found(self, message: Message | None) -> Message | None:
        """Who found one so many times without sleeping reads some ahead."""
        if message is None:
            self._finds = 0
        elif self._finds < _FINDS:
            self._finds += 1
        else:
            try:
                while self.arrivals.small and len(self.inbox) < _AHEAD and self._read():
                    pass
                self.inbox.make()
            except BaseException:  # Ctrl-C: nobody has seen it yet
                self.inbox.made.appendleft(message)
                raise
        return message

    def take_many(self, count_max: int) -> Messages | None:
        """All messages there are, up to `count_max` and about `limits.RECV_MANY_BYTES`, or None."""
        if self._latest_only:
            self._fill(1, _FRAMES_AHEAD)
            return self.arrivals.pop_latest(count_max) or None
        frames_max, messages, there = min(count_max, _FRAMES_AHEAD), None, True
        while not messages and there:
            there = self._fill(count_max, frames_max, limits.RECV_MANY_BYTES)
            messages = self.inbox.pop_many(count_max)
        return messages or None

    def _fill(self, messages: int, frames_max: int, bytes_max: float = math.inf) -> bool:
        """Read until so many messages are there, or so many bytes were read, or nothing is left;
        says whether it was the first."""
        enough = self.counters.bytes_received + bytes_max
        for _ in range(frames_max):
            if len(self.inbox) >= messages or self.counters.bytes_received >= enough:
                return True
            if not self._read():
                return False
        self.link.wake_all()  # there may be more
        return False

    def _read(self) -> bool:
        """Take in one frame; False if there is none."""
        read = self._turns.read_first()
        self._drained = read is None
        if read is None:
            return False
        self.arrivals.take_in(*read)
        return True

    # -- Waiting a moment: not under the lock -------------------------------------------------

    def take_soon(self) -> Message | None:
        """Without the lock, in a thread that would sleep otherwise: the next message, if it comes
        within a moment (`mesh.sockets.moment`). None at once where waiting so does not pay."""
        link, pace = self.link, self._pace
        if not pace.allows() or link.lock.locked():
            return None
        with link.lock:
            socket = self._turns.only
            if socket is None or self._latest_only or not link.may_be_held:
                return None
            message = self.arrivals.pop()
            if message is None and not self.inbox:  # or another has just taken that one
                message = self._await(socket)
            if message is not None:
                pace.came(link.met_at)
            return message

    def _await(self, socket: Socket) -> Message | None:
        """The next message, if it comes within a moment: it may have pads before it."""
        arrivals = self.arrivals
        for _ in range(_FRAMES_AWAITED):
            try:
                first = recv(socket, 0)
            except zmq.Again:
                self._pace.slow()
                return None
            if first == arrivals.pad:  # told at a glance: three follow each MiB
                continue
            message = arrivals.take_one(socket, first) or arrivals.pop()
            if message is not None:
                return self._found(message)
        return None

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
            self.arrivals.awaiting.add(side)
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
                    self.arrivals.awaiting.discard(side)
                    self._retiring[endpoint] = _RETIRING_TICKS

    @property
    def expects_mark(self) -> bool:
        """Whether the control thread should read on until a publisher's mark has come."""
        return bool(self.arrivals.awaiting) and len(self.inbox) < limits.BUFFER_MESSAGES

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
            all_read = self._drained and not self.inbox and not self.arrivals.latest
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
                    self.arrivals.awaiting.update(sides)
                    self._sockets[scheme].disconnect(endpoint)
                    self._sockets[scheme].connect(endpoint)

    def _ask_when_quiet(self, all_read: bool) -> None:
        """Having read all there is, ask where the publishers stand: what they dropped last, and
        their own marks with it, shows in nothing that came."""
        heard = self.arrivals.heard
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
            self._turns.add(socket)
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
