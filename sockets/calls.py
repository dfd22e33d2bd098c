"""Requests under way: the core of a client.

Every server has a DEALER socket of its own, so that it is known who has what
(`mesh.sockets.requests`). The calling thread sends its request and reads the answer itself; of
several that wait, one reads for all and wakes whom an answer is for. An answer that nobody waits
for is dropped and counted. One that cannot be decoded fails its call with a `RemoteError` of type
``Malformed``: waiting on would only end in a `Timeout` that says less.
"""

from __future__ import annotations

import contextlib
import logging
import time
from itertools import islice
from typing import Any

import zmq

from mesh import limits
from mesh.errors import Busy, Closed, MeshError, PeerLost, RemoteError, Timeout
from mesh.names import check_name
from mesh.sockets import failure
from mesh.sockets.connections import Watch
from mesh.sockets.control import Offer, OfferKind
from mesh.sockets.exchange import Exchange
from mesh.sockets.failure import read_failure
from mesh.sockets.frame import FOR_EVER, Frame, Malformed, Part, wire_name
from mesh.sockets.home import Counters, Home, node_text
from mesh.sockets.link import Link, Recipient
from mesh.sockets.moment import CALM_S, MOMENT_MS, MOMENT_S, may_hold
from mesh.sockets.parts import NOBLOCK, look, parts_of, recv, send_parts
from mesh.sockets.requests import Outstanding, RequestTable, ServerAccount
from mesh.sockets.single import (
    CANCEL,
    ERROR,
    REPLY,
    REQUEST,
    Message,
    Reader,
    Writer,
    payload_of,
    receive,
)
from mesh.sockets.transport import Socket, scheme_of
from mesh.timeouts import within

logger = logging.getLogger(__name__)

_FRAMES_PER_ATTEMPT = 1024
"""Read at most so many before the deadline is looked at again."""
_ANSWERS_LEFT_MAX = limits.OUTSTANDING_MAX
"""Of a server that is gone: no more than that can have been asked for."""
_PLACED_AT_ONCE = 256
"""Of many that wait for room only so many are looked at: mostly none of them gets any."""


class _Connection:
    """The DEALER to one server."""

    __slots__ = ("compression", "endpoint", "scheme", "socket", "watch")

    def __init__(self, home: Home, endpoint: str) -> None:
        """Raises `zmq.ZMQError`; nothing is left then."""
        self.scheme = scheme = scheme_of(endpoint)
        self.endpoint = endpoint
        self.compression = home.compression() if scheme == "tcp" else None
        self.socket = home.transport.connecting(zmq.DEALER, scheme)
        with contextlib.ExitStack() as undo:
            undo.callback(self.socket.close, linger=0)
            self.socket.setsockopt(zmq.RCVTIMEO, MOMENT_MS)
            self.watch = Watch(self.socket)
            undo.callback(self.watch.close)
            self.socket.connect(endpoint)
            undo.pop_all()


class Requests:
    """The core of a client: its servers, and the requests it waits for."""

    def __init__(
        self,
        home: Home,
        channel: str,
        *,
        kind: str = "service",
        seeks: OfferKind = "serve",
        patient: bool = False,
    ) -> None:
        """`patient`: what no server has room for waits until there is one that has."""
        self.kind = kind
        self._patient = patient
        self.seeks: OfferKind | None = seeks
        self.channel = check_name(channel)
        self.counters = Counters()
        self.link = Link(f"client {channel!r}")
        self.table: RequestTable[Call] = RequestTable(channel)
        self._home = home
        self._wire = wire = wire_name(channel)
        self._replies = Reader(wire, REPLY)
        self._requests = Writer(wire, REQUEST, home.node_id)
        self._cancels = Writer(wire, CANCEL, home.node_id)
        self.bytes_max = home.transport.message_bytes_max
        self._connections: dict[ServerAccount[Call], _Connection] = {}
        self._by_socket: dict[Socket, ServerAccount[Call]] = {}
        self._only: tuple[Socket, ServerAccount[Call]] | None = None
        """The only server there is, and with it a few shorter ways."""
        self.exchange: Exchange | None = None
        """A shorter way, while it is open. Under the lock."""
        self._exchange: Exchange | None = None

    # -- Attempts: under the lock ------------------------------------------------------------

    def begin(self, call: Call) -> bool | None:
        """A new call: hand it to a server if there is one. Raises `Busy`."""
        server = self.table.assign(call)
        if server is not None and not self._send(call, server):
            self.table.put_back(call, server)
            self._place(call, server)
        if self.table.waiting or look(self.link.looks, 0):
            return self.read(call)
        return None

    def adopt(
        self, message: Message, timeout: float, retry: bool, seq: int, server: ServerAccount[Call]
    ) -> Call:
        """A call that `Exchange` has sent, and whose answer did not come within a moment."""
        call = Call(self, message, timeout, retry)
        call.began -= MOMENT_S
        self.table.adopt(call, server, seq)
        return call

    def look(self, call: Call) -> bool | None:
        """Whether it has its outcome; None after reading all there is."""
        if call.outcome is not None:
            return True
        link = self.link
        if link.rang and self._only is not None:
            link.rang = False
            self._read_one(*self._only, call)
            if call.outcome is not None:
                self._hurry(call)
                return True
        return self.read(call)

    def _hurry(self, call: Call) -> None:
        """It had its answer quickly: perhaps the next can have its in one go."""
        if self._exchange is None or self.link.has_loops():
            return  # a loop is never to wait for the lock
        now = time.monotonic()
        if now - call.began < MOMENT_S and now - self.link.met_at > CALM_S and may_hold():
            self.exchange = self._exchange
            self.exchange.renew()

    def read(self, reader: Call | None = None) -> bool | None:
        """Read until `reader` has its outcome, or nothing is left to read; place what waits."""
        link, by_socket = self.link, self._by_socket
        for _ in range(_FRAMES_PER_ATTEMPT):
            inputs = look(link.looks, 0)
            for socket, _ in inputs:
                self._read_one(socket, by_socket[socket], reader)
                if reader is not None and reader.outcome is not None:
                    return True  # what else there is, the next reads: see `Link.pass_on`
            if not inputs:
                if not self.table.waiting:
                    return None
                self._place_waiting()
                if not look(link.looks, 0):  # a send swallows the edge, even one without room
                    return None
        link.wake_all()  # there may be more
        return None

    def _read_one(self, socket: Socket, server: ServerAccount[Call], reader: Call | None) -> bool:
        """Read one answer; False if there is none."""
        try:
            first: bytes = recv(socket, NOBLOCK)
        except zmq.Again:
            return False
        reply = self._replies.read(first)
        if reply is None:
            self.accept(server, parts_of(socket, first), reader)
            return True
        sender, seq, _, message = reply
        if sender != server.peer:
            self.counters.dropped["malformed"] += 1
        elif (call := self.table.answered(server, seq)) is not None:
            counters = self.counters
            counters.received += 1
            counters.bytes_received += len(message)
            call.outcome = message
            if call is not reader:
                self.link.hand(call, True)
        else:
            self._unexpected(server, REPLY)
        return True

    def accept(self, server: ServerAccount[Call], parts: list[Part], reader: Call | None) -> None:
        """An answer that is no plain reply."""
        try:
            frame = receive(parts, self._wire)
            if frame.sender != server.peer or frame.kind not in (REPLY, ERROR):
                raise Malformed("malformed")
        except Malformed as fault:
            self.counters.dropped[fault.reason] += 1
            return
        call = self.table.answered(server, frame.seq)
        if call is None:
            self._unexpected(server, frame.kind)
            return
        self.counters.received += 1
        self.counters.bytes_received += frame.size
        outcome = frame if frame.kind == REPLY else self._failure(server, call, frame)
        self._settle(call, outcome, reader)

    def _unexpected(self, server: ServerAccount[Call], kind: int) -> None:
        """Nobody waits for that answer."""
        if not self.table.owed(server):
            self.counters.dropped["unexpected reply"] += 1
        elif kind == REPLY:
            self.counters.dropped["late reply"] += 1

    def _failure(self, server: ServerAccount[Call], call: Call, frame: Frame) -> Outcome | None:
        """The outcome that an ERROR stands for; None if the call goes on to another server."""
        try:
            code, error = read_failure(payload_of(frame, self.bytes_max))
        except Malformed as fault:
            return self._undecodable(fault, server.peer)
        if code == failure.EXPIRED:
            return Timeout(f"no answer of service {self.channel!r}: the request was not started")
        if code != failure.BUSY:
            return error
        if self.table.refused(server, call, patient=self._patient):
            self._place(call)
            return None
        return Busy(
            f"every server of {self.channel!r} is full ({len(call.tried)} of them turned it away)"
        )

    def _settle(self, call: Call, outcome: Outcome | None, reader: Call | None = None) -> None:
        if outcome is not None:
            call.outcome = outcome
            if call is not reader:
                self.link.hand(call, True)

    def _place(self, call: Call, *full: ServerAccount[Call]) -> bool:
        """Send to the server that owes least and has room, if there is one."""
        while (server := self.table.choose(call, full)) is not None:
            if self._send(call, server):
                self.table.placed(call, server)
                return True
            full = (*full, server)
        return False

    def _place_waiting(self) -> None:
        """Place those that wait, the first first."""
        for call in list(islice(self.table.waiting.values(), _PLACED_AT_ONCE)):
            if not self._place(call) and not call.tried:
                return  # those behind it fare no better

    def _send(self, call: Call, server: ServerAccount[Call]) -> bool:
        """False if there is no room."""
        remaining = FOR_EVER
        if call.timeout is not None:
            left_s = call.began + call.timeout - time.monotonic()
            remaining = min(int(left_s * 1000) + 1, FOR_EVER - 1) if left_s > 0 else 0
        connection, message = self._connections[server], call.message
        parts = self._requests.parts(message, call.seq, remaining, connection.compression)
        if not send_parts(connection.socket, parts):
            return False
        counters = self.counters
        counters.sent += 1
        counters.bytes_sent += len(message)
        return True

    # -- The ends of a call ------------------------------------------------------------------

    def abandon(self, call: Call) -> None:
        """The caller waits no longer: forget the call, and tell the server that has it."""
        with contextlib.suppress(Closed):  # `close` has told the servers
            self.link.run(lambda: self.forget(call))

    def forget(self, call: Call) -> None:
        if call.outcome is not None:
            self.counters.dropped["late reply"] += 1
        elif (server := self.table.abandon(call)) is not None:
            self._cancel(call, server)

    def _cancel(self, call: Call, server: ServerAccount[Call]) -> None:
        # No room: then the server finds out by itself.
        send_parts(self._connections[server].socket, self._cancels.parts(b"", call.seq))

    def result(self, call: Call) -> Any:
        """What the server returned. Raises what it answered instead."""
        outcome = call.outcome
        assert outcome is not None
        if type(outcome) is not bytes and isinstance(outcome, MeshError):
            raise outcome
        try:
            return payload_of(outcome, self.bytes_max)
        except Malformed as fault:
            assert isinstance(call.server, ServerAccount)
            raise self.undecodable(fault, call.server.peer) from None

    def undecodable(self, fault: Malformed, peer: int) -> RemoteError:
        """What to tell a caller whose answer is `fault`."""
        with self.link.lock:
            return self._undecodable(fault, peer)

    def _undecodable(self, fault: Malformed, peer: int) -> RemoteError:
        self.counters.dropped[fault.reason] += 1
        text = f"the answer of server {node_text(peer)} of {self.channel!r} cannot be decoded"
        return RemoteError("Malformed", text, "")

    def late(self, call: Call) -> Timeout:
        """What to tell a caller whose deadline has passed."""
        if isinstance(call.server, ServerAccount):
            missing = f"answer of service {self.channel!r} (server {node_text(call.server.peer)})"
        elif self.table.servers:
            missing = f"server of {self.channel!r} with room"
        else:
            missing = f"server of {self.channel!r}"
        return Timeout(f"no {missing} {within(call.timeout)}")

    # -- Servers -----------------------------------------------------------------------------

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        with self.link:
            if self.table.find(peer, offer.key) is None:
                self._connect(peer, offer.key, endpoint)

    def _connect(self, peer: int, key: int, endpoint: str) -> None:
        try:
            connection = _Connection(self._home, endpoint)
        except zmq.ZMQError as error:
            self.counters.dropped["offer out of reach"] += 1
            text = "%s: no way to server %s at %s: %s"
            logger.warning(text, self.link.what, node_text(peer), endpoint, error)
            return
        self.link.add(connection.socket)
        server = self.table.join(peer, key)
        self._connections[server] = connection
        self._by_socket[connection.socket] = server
        self._count_servers()
        self.link.wake_all()  # the first to look has all that wait placed

    def _count_servers(self) -> None:
        each = list(self._by_socket.items())
        self._only = each[0] if len(each) == 1 else None
        self.exchange = self._exchange = None
        if self._only is not None and not self._patient:  # those wait with `look`
            self._exchange = Exchange(self, self._wire, self._home.node_id, *self._only)

    def detach(self, peer: int, key: int, reason: str) -> None:
        """Answers that came in before count; what is outstanding then has lost its server."""
        with self.link:
            server = self.table.find(peer, key)
            if server is None:
                return
            self._disconnect(server, f"is gone ({reason})")
            self.read()  # and place those that go to another

    def _disconnect(self, server: ServerAccount[Call], what: str) -> None:
        connection = self._connections.pop(server)
        for _ in range(_ANSWERS_LEFT_MAX):
            if not self._read_one(connection.socket, server, None):
                break
        del self._by_socket[connection.socket]
        self._count_servers()
        connection.watch.close()
        self.link.discard(connection.socket)
        text = (
            f"server {node_text(server.peer)} of {self.channel!r} {what}; "
            "whether the request ran is not known"
        )
        for call in self.table.leave(server):
            self._settle(call, PeerLost(text))

    def tick(self) -> None:
        """Take notice of answers that nobody waits for any more, of room, and of connections that
        were lost though the peer is there: what was under way on them will not be answered."""
        with self.link:
            for server, connection in list(self._connections.items()):
                lost, _ = connection.watch.look()
                if lost:
                    self.counters.dropped["connection lost"] += 1
                    self._disconnect(server, "lost its connection")
                    self._connect(server.peer, server.key, connection.endpoint)
            self.read()

    def close(self, linger_ms: int) -> None:
        """Whoever waits gets `Closed`; servers are told to forget what they have not started."""
        self.link.close(linger_ms, first=self._cancel_all)

    def _cancel_all(self) -> None:
        self.exchange = None
        for server, connection in self._connections.items():
            connection.watch.close()
            for call in list(server.requests.values()):
                self.table.abandon(call)  # or its caller might be told that it was cancelled
                self._cancel(call, server)


Outcome = bytes | Frame | MeshError


class Call(Outstanding):
    """One request as its caller sees it, and the slot in which its wait is found."""

    __slots__ = ("_core", "began", "message", "outcome", "timeout", "waiter")

    def __init__(
        self, core: Requests, message: Message, timeout: float | None, retry: bool
    ) -> None:
        self.retry = retry
        self.seq = 0
        self.server = None
        self.tried = ()
        self._core = core
        self.message = message
        self.timeout = timeout
        self.began = time.monotonic()
        self.outcome: Outcome | None = None
        self.waiter: Recipient | None = None

    def attempt(self) -> bool | None:
        """For the link to wait with."""
        core = self._core
        return core.look(self) if self.seq else core.begin(self)
