"""Serving requests.

Guarantee: the handler runs at most once for each attempt of a caller, never for one whose time is
over or who gave up before it started, and every request is answered once: by the result, or by an
error that says why there is none. A server whose backlog is full says so at once. A handler that
raises takes nothing down.

A handler runs in the thread that read its request (`mesh.sockets.server_threads`). An ``async def``
handler runs in the event loop that was running where the service was registered, or in one of the
service's own, which watches the sockets itself (`mesh.sockets.server_asyncio`). A log beside the
node answers later, in threads of its own (`mesh.sockets.server_relay`).

ZeroMQ's high-water mark is as high as the number of requests one client may have outstanding, so a
caller that keeps to it never loses an answer; who does not, loses what it does not read.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from mesh import limits
from mesh.errors import NotSerializable, PayloadTooLarge
from mesh.names import check_name
from mesh.options import ServiceOptions
from mesh.sockets import backlog, failure
from mesh.sockets.backlog import Backlog, Verdict
from mesh.sockets.control import Offer, OfferKind
from mesh.sockets.failure import describe, encode_failure
from mesh.sockets.frame import NUMBER, REST, SEQ_END, Malformed, Part, wire_name
from mesh.sockets.home import Counters, Home, Unhurried
from mesh.sockets.link import Link
from mesh.sockets.moment import MOMENT_MS
from mesh.sockets.parts import (
    EVENTS,
    NOBLOCK,
    POLLIN,
    RCVMORE,
    getsockopt,
    look,
    read_rest,
    recv,
    send_parts,
)
from mesh.sockets.runner import Runner, runner_of
from mesh.sockets.single import (
    CANCEL,
    ERROR,
    REPLY,
    REQUEST,
    Message,
    Reader,
    Writer,
    beginning,
    encode,
    quick_body,
    receive,
)
from mesh.sockets.transport import Bound, Socket, endpoints_of

logger = logging.getLogger(__name__)

_unpack_rest = REST.unpack_from

_NEITHER_TIME_NOR_REMAINING = bytes(12)
_pack_number = NUMBER.pack
_FRAMES_PER_ATTEMPT = 1024
"""Read at most so many before others get the lock."""
_LINGER_MS = 200
"""Answers given just before the service ended get this long to leave."""

Request = backlog.Request[tuple[Socket, bytes]]
Answer = tuple[int, Message]
"""The kind of its frame, and the message."""


class Server(Unhurried):
    """The core of a service: its ROUTER sockets, its backlog, and whoever runs its handler."""

    seeks: OfferKind | None = None

    def __init__(
        self,
        home: Home,
        channel: str,
        handler: Callable[..., Any],
        options: ServiceOptions,
        *,
        kind: str = "service",
        runner: Callable[[Server, int], Runner] = runner_of,
    ) -> None:
        self.kind = kind
        self.channel = check_name(channel)
        self.counters = Counters()
        self.handler = handler
        self._home = home
        self._wire = wire = wire_name(channel)
        self._requests = Reader(wire, REQUEST)
        self._replies = Writer(wire, REPLY, home.node_id)
        self._errors = Writer(wire, ERROR, home.node_id)
        self._reply = beginning(wire, REPLY) + _pack_number(home.node_id)
        self._request = beginning(wire, REQUEST)
        self._body_at = len(self._request) + REST.size
        self.bytes_max = home.transport.message_bytes_max
        self._backlog: Backlog[tuple[Socket, bytes]] = Backlog(
            options.concurrency, options.backlog, home.transport.buffer_bytes
        )
        self.link = Link(f"service {channel!r}", self._backlog.can_start)
        self.on_end: Callable[[], object] = lambda: None
        """To be called once when the service ends, under the lock: it may end by itself, with the
        event loop of its handler."""
        self._compression = home.compression()
        self._closing = False
        self._timer: threading.Timer | None = None
        self._bound: list[Bound] = home.transport.bind(
            zmq.ROUTER, "serve", hwm=limits.OUTSTANDING_MAX
        )
        self._only = self._bound[0].socket if len(self._bound) == 1 else None
        """The socket, if it is the only one, and with it a few shorter ways."""
        self.came_alone = False
        """Whether nothing else was there besides the request just taken, so that `exchange` is
        worth trying: where one caller waits for its answer, its next request may follow."""
        self.started = 0
        """Handlers, since the beginning."""
        with self.link:
            for bound in self._bound:
                bound.socket.setsockopt(zmq.RCVTIMEO, MOMENT_MS)
                self.link.add(bound.socket)
        self._runner: Runner = runner(self, options.concurrency)
        self._runner.start()

    def endpoints(self) -> tuple[str, ...]:
        """For clients."""
        return endpoints_of(self._bound)

    @property
    def closing(self) -> bool:
        """Whether no more requests are taken."""
        return self._closing

    @property
    def running(self) -> int:
        """How many handlers run."""
        return self._backlog.running

    @property
    def waiting(self) -> int:
        """How many requests wait for a handler."""
        return len(self._backlog)

    # -- Requests: under the lock ------------------------------------------------------------

    def take(self) -> Request | None:
        """The next request to run, now counted as running; None after reading all there is."""
        self.came_alone = False
        socket = self._only
        if self.link.rang and socket is None:
            inputs = look(self.link.looks, 0)
            socket = inputs[0][0] if len(inputs) == 1 else None
        if self.link.rang and socket is not None:
            self.link.rang = False
            request = self._read_one(socket)
            if request is not None:
                self.came_alone = True
                self.started += 1
                return request
        self.read()
        request, expired = self._backlog.start(time.monotonic())
        self.started += request is not None
        for each in expired:
            self._turn_away(each, failure.EXPIRED)
        if request is None and expired:
            self.link.wake_all()  # something may have come, and sending swallows the edge
        return request

    def refuse(self, request: Request) -> None:
        """It was taken, and now there is nobody to run it."""
        self._backlog.done()
        self._turn_away(request, failure.BUSY)

    def read(self) -> None:
        """Take in all that has come before any of it is started: a request may be followed by the
        word that nobody waits for it."""
        for _ in range(_FRAMES_PER_ATTEMPT):
            inputs = look(self.link.looks, 0)
            if not inputs:
                return
            for socket, _ in inputs:
                self._read_next(socket)
        self.link.wake_all()  # there may be more

    def _read_one(self, socket: Socket) -> Request | None:
        """Read one message, and start it at once if it is a request, nothing came after it, and
        nothing is before it: as it mostly is."""
        try:
            routing_id, first = recv(socket, NOBLOCK), recv(socket, NOBLOCK)
        except zmq.Again:
            return None
        plain = None
        if not look(self.link.looks, 0):  # neither another message, nor another part of this one
            plain = self._requests.read(first)
        if plain is None:
            parts: list[Part] = [routing_id, first]
            read_rest(socket, parts, 3)
            self._accept(socket, parts)
            return None
        _, seq, remaining, message = plain
        counters, backlog = self.counters, self._backlog
        counters.received += 1
        counters.bytes_received += len(message)
        request = Request((socket, routing_id), seq, remaining, message, time.monotonic())
        if remaining and not self._closing and backlog.start_at_once():
            return request
        self._admit(request)
        return None

    def _read_next(self, socket: Socket) -> None:
        try:
            routing_id, first = recv(socket, NOBLOCK), recv(socket, NOBLOCK)
        except zmq.Again:
            return
        parts: list[Part] = [routing_id, first]
        read_rest(socket, parts, 3)
        plain = self._requests.read(first) if len(parts) == 2 else None
        if plain is None:
            self._accept(socket, parts)
            return
        _, seq, remaining, message = plain
        self.counters.received += 1
        self.counters.bytes_received += len(message)
        caller = (socket, routing_id)
        self._admit(Request(caller, seq, remaining, message, time.monotonic()))

    def _accept(self, socket: Socket, parts: list[Part]) -> None:
        """One message from a caller, whatever it is."""
        try:
            if len(parts) < 2:
                raise Malformed("malformed")
            frame = receive(parts[1:], self._wire)
            if frame.kind not in (REQUEST, CANCEL):
                raise Malformed("malformed")
        except Malformed as fault:
            self.counters.dropped[fault.reason] += 1
            return
        caller = (socket, bytes(parts[0]))
        if frame.kind == CANCEL:
            cancelled = self._backlog.cancel(caller, frame.seq)
            if cancelled is not None:
                self._turn_away(cancelled, failure.CANCELLED)
            return
        self.counters.received += 1
        self.counters.bytes_received += frame.size
        self._admit(Request(caller, frame.seq, frame.remaining, frame, time.monotonic()))

    def _admit(self, request: Request) -> None:
        """One that has just come, and cannot be started at once."""
        if self._closing:
            self._turn_away(request, failure.BUSY)
            return
        verdict = self._backlog.arrive(request)
        if verdict is Verdict.BUSY:
            self._turn_away(request, failure.BUSY)
        elif verdict is Verdict.EXPIRED:
            self._turn_away(request, failure.EXPIRED)
        elif verdict is Verdict.REPEATED:
            self.counters.dropped["repeated request"] += 1

    def _turn_away(self, request: Request, code: str) -> None:
        self.counters.dropped[code] += 1
        message = encode_failure(code)
        self._send(request, self._parts(request, (ERROR, message)), len(message))

    def _parts(self, request: Request, answer: Answer) -> list[Part]:
        """The ZeroMQ message that answers it."""
        kind, message = answer
        writer = self._replies if kind == REPLY else self._errors
        socket, routing_id = request.caller
        local = self._only is not None or socket is self._bound[0].socket
        compression = None if local else self._compression
        return [routing_id, *writer.parts(message, request.seq, 0, compression)]

    def _send(self, request: Request, parts: Sequence[Part], size: int) -> None:
        counters = self.counters
        try:
            if send_parts(request.caller[0], parts):
                counters.sent += 1
                counters.bytes_sent += size
            else:
                counters.dropped["caller full"] += 1
        except zmq.ZMQError as error:
            self._unsent(error)

    def _unsent(self, error: zmq.ZMQError) -> None:
        if isinstance(error, zmq.Again):
            self.counters.dropped["caller full"] += 1
        elif error.errno == errno.EHOSTUNREACH:
            self.counters.dropped["caller gone"] += 1
        else:
            raise error

    # -- Running a handler: the lock is free -------------------------------------------------

    def result(self, value: Any) -> Answer:
        """The answer that carries what the handler returned."""
        try:
            return REPLY, encode(value, None, self.bytes_max)
        except (NotSerializable, PayloadTooLarge) as error:
            return ERROR, describe(failure.PAYLOAD, error)

    def failed(self, error: BaseException) -> Answer:
        """The answer that carries what was raised instead."""
        if isinstance(error, Malformed):
            with self.link.lock:
                self.counters.dropped[error.reason] += 1
            text = "the payload or the headers cannot be decoded"
            return ERROR, encode_failure(failure.PAYLOAD, "Malformed", text)
        level = logging.DEBUG if isinstance(error, Exception) else logging.WARNING
        logger.log(level, "the handler of service %r raised", self.channel, exc_info=error)
        return ERROR, describe(failure.REMOTE, error)

    def finish(
        self, request: Request, answer: Answer, then: Callable[[], object] | None = None
    ) -> None:
        """A handler has ended: answer its caller, and `then`, under the lock still, take all that
        came."""
        parts = self._parts(request, answer)
        link, backlog = self.link, self._backlog
        with link.lock:
            if link.closed:
                self.counters.dropped["answer after close"] += 1
                return
            backlog.done()
            self._send(request, parts, len(answer[1]))
            if then is not None:
                then()
            elif not link.alone:
                link.pass_on(False)
            last = self._closing and not backlog.running
        if last:
            self._end()

    def exchange(self, request: Request, value: Any) -> Request | None:
        """Answer with `value`, of a quick type, and have the next request, if it comes within a
        moment and nobody else is about: see `mesh.sockets.exchange`. Only while it `came_alone`."""
        link, backlog, counters = self.link, self._backlog, self.counters
        socket, routing_id = request.caller
        try:
            body = quick_body(value)
        except (ValueError, OverflowError):
            body = None
        if body is None or len(body) >= limits.COMPRESS_BYTES_MIN:
            self.finish(request, self.result(value))
            return None
        frame = self._reply + _pack_number(request.seq) + _NEITHER_TIME_NOR_REMAINING + body
        with link.lock:
            # Looked at without a call each: `Link.alone`, `Link.closed`, `Backlog.__len__`.
            if self._closing or link._closed or backlog._waiting or link._threads:
                self.came_alone = False
            else:
                backlog.running -= 1
                self._send(request, [routing_id, frame], len(body))
                # While the caller is busy with the answer: what comes after this is by itself.
                early = look(link.looks, 0)
                if early and (len(early) > 1 or early[0][0] is not socket):
                    self.came_alone = False
                    return None
                try:
                    routing_id, first = recv(socket, 0), recv(socket, NOBLOCK)
                except zmq.Again:
                    self.came_alone = False
                    return None
                # Another part of this one, or another message.
                more = getsockopt(socket, EVENTS) & POLLIN if early else getsockopt(socket, RCVMORE)
                at = self._body_at
                if not more and first.startswith(self._request) and len(first) >= at:
                    _, seq, _, remaining = _unpack_rest(first, at - REST.size)
                    if remaining and seq < SEQ_END:
                        message = first[at:]
                        counters.received += 1
                        counters.bytes_received += len(message)
                        backlog.running += 1
                        self.started += 1
                        # It is begun with at once: when it came does not matter any more.
                        return Request((socket, routing_id), seq, remaining, message, 0.0)
                parts: list[Part] = [routing_id, first]
                read_rest(socket, parts, 3)
                self._accept(socket, parts)
                return None
        self.finish(request, (REPLY, body))
        return None

    # -- The rest of a core ------------------------------------------------------------------

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        raise AssertionError("clients connect here; this side connects to nobody")

    def detach(self, peer: int, key: int, reason: str) -> None:
        raise AssertionError("clients connect here; this side connects to nobody")

    def tick(self) -> None:
        """Those whose time is over give their places in the backlog to others."""
        if self._runner.over():
            self.close(0)
            return
        with self.link:
            self._home.transport.follow(self._bound)
            for request in self._backlog.expire(time.monotonic()):
                self._turn_away(request, failure.EXPIRED)

    def close(self, linger_ms: int) -> None:
        """Start no more requests. Handlers that run may answer for `linger_ms`; what waits for one,
        or comes until then, was not started, and its callers are told so. Called again with 0 it
        ends at once. Does not block."""
        with self.link.lock:
            if self.link.closed or (self._closing and linger_ms):
                return
            self._closing = True
            self.read()
            for request in self._backlog.clear():
                self._turn_away(request, failure.BUSY)
            self.link.wake_all()
            running = self._backlog.running
        if not running or not linger_ms:
            self._end()
            return
        timer = self._timer = threading.Timer(linger_ms / 1000, self._end)
        timer.name, timer.daemon = f"mesh close {self.channel}", True
        timer.start()

    def _end(self) -> None:
        self.link.close(_LINGER_MS, first=self.on_end)
        if self._timer is not None:
            self._timer.cancel()
        self._home.transport.release(self._bound)
        self._runner.end()
