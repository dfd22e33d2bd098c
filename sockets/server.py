"""Serving requests.

Guarantee: the handler runs at most once for each attempt of a caller, never for one whose time is
over or who gave up before it started, and every request is answered once: by the result, or by an
error that says why there is none. A server whose backlog is full says so at once. A handler that
raises takes nothing down.

A handler runs in the thread that read its request (`mesh.sockets.server_threads`). An ``async def``
handler runs in the event loop that was running where the service was registered, or in a loop of
the service's own; each request has a task, and the loop watches the sockets itself
(`mesh.sockets.server_asyncio`).

ZeroMQ's high-water mark is as high as the number of requests one client may have outstanding, so a
caller that keeps to it never loses an answer; who does not, loses what it does not read.
"""

from __future__ import annotations

import errno
import inspect
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import zmq

from mesh import limits
from mesh.errors import Closed, NotSerializable, PayloadTooLarge
from mesh.names import check_name
from mesh.options import ServiceOptions
from mesh.sockets import backlog, failure
from mesh.sockets.backlog import Backlog, Verdict
from mesh.sockets.control import Offer, OfferKind
from mesh.sockets.failure import describe, encode_failure
from mesh.sockets.frame import Malformed, Part, wire_name
from mesh.sockets.home import Counters, Home
from mesh.sockets.link import Link
from mesh.sockets.parts import NOBLOCK, look, read_rest, send_parts
from mesh.sockets.server_threads import Threads
from mesh.sockets.single import (
    CANCEL,
    ERROR,
    REPLY,
    REQUEST,
    Message,
    Reader,
    Writer,
    encode,
    payload_of,
    receive,
)
from mesh.sockets.transport import Bound, Socket, endpoints_of

logger = logging.getLogger(__name__)

_FRAMES_PER_ATTEMPT = 1024
"""Read at most so many before others get the lock."""
_MOMENT_MS = 1
"""After an answer the thread that gave it waits so long for the next request inside ZeroMQ, holding
the lock, if nobody else is about: that takes 8 µs less than to sleep on descriptors. Once in vain,
it does not until a request comes that soon again."""
_MOMENT_S = _MOMENT_MS / 1000
_LINGER_MS = 200
"""Answers given just before the service ended get this long to leave."""

Request = backlog.Request[tuple[Socket, bytes]]
Answer = tuple[int, Message]
"""The kind of its frame, and the message."""


class Server:
    """The core of a service: its ROUTER sockets, its backlog, and whoever runs its handler."""

    kind = "service"
    seeks: OfferKind | None = None

    def __init__(
        self, home: Home, channel: str, handler: Callable[[Any], Any], options: ServiceOptions
    ) -> None:
        self.channel = check_name(channel)
        self.counters = Counters()
        self.handler = handler
        self._home = home
        self._wire = wire = wire_name(channel)
        self._requests = Reader(wire, REQUEST)
        self._replies = Writer(wire, REPLY, home.node_id)
        self._errors = Writer(wire, ERROR, home.node_id)
        self._bytes_max = home.transport.message_bytes_max
        self._backlog: Backlog[tuple[Socket, bytes]] = Backlog(options.concurrency, options.backlog)
        self.link = Link(f"service {channel!r}", self._backlog.can_start)
        self.on_end: Callable[[], object] = _nothing
        """To be called once when the service ends, under the lock: it may end by itself, with the
        event loop of its handler."""
        self._compression = home.compression()
        self._closing = False
        self._ended = threading.Event()
        self._timer: threading.Timer | None = None
        self._bound: list[Bound] = home.transport.bind(
            zmq.ROUTER, "serve", hwm=limits.OUTSTANDING_MAX
        )
        self._only = self._bound[0].socket if len(self._bound) == 1 else None
        """The socket, if it is the only one, and with it a few shorter ways."""
        self._brisk = False
        """Whether the last request came within a moment of the answer before it."""
        self._answered = -math.inf
        with self.link:
            for bound in self._bound:
                bound.socket.setsockopt(zmq.RCVTIMEO, _MOMENT_MS)
                self.link.add(bound.socket)
        self._runner = _runner(self, options.concurrency)
        self._runner.start()

    def endpoints(self) -> tuple[str, ...]:
        """Where clients send their requests."""
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
        link = self.link
        if self._only is not None:
            request = None
            if link.rang:
                link.rang = False
                request = self._read_one(self._only, NOBLOCK)
                self._brisk = time.monotonic() - self._answered < _MOMENT_S
            elif self._brisk and link.alone and not self._closing and not self._backlog:
                request = self._read_one(self._only, 0)
                self._brisk = request is not None
            if request is not None:
                return request
        self.read()
        request, expired = self._backlog.start(time.monotonic())
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

    def _read_one(self, socket: Socket, flags: int) -> Request | None:
        """Read one message, and start it at once if it is a request, nothing came after it, and
        nothing is before it: as it mostly is. Without `NOBLOCK` it waits a moment."""
        try:
            routing_id, first = socket.recv(flags), socket.recv(NOBLOCK)
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
        request = self._arrived(socket, routing_id, plain)
        if plain[2] and not self._closing and self._backlog.start_at_once():
            return request
        self._admit(request)
        return None

    def _read_next(self, socket: Socket) -> None:
        try:
            routing_id = socket.recv(NOBLOCK)
        except zmq.Again:
            return
        parts: list[Part] = [routing_id]
        read_rest(socket, parts, 3)
        plain = self._requests.read(bytes(parts[1])) if len(parts) == 2 else None
        if plain is None:
            self._accept(socket, parts)
        else:
            self._admit(self._arrived(socket, routing_id, plain))

    def _arrived(
        self, socket: Socket, routing_id: bytes, plain: tuple[int, int, int, bytes]
    ) -> Request:
        _, seq, remaining, message = plain
        self.counters.received += 1
        self.counters.bytes_received += len(message)
        return Request((socket, routing_id), seq, remaining, message, time.monotonic())

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
        self.counters.bytes_received += len(frame.body) + len(frame.detached or b"")
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

    def _send(self, request: Request, parts: list[Part], size: int) -> None:
        counters = self.counters
        try:
            if send_parts(request.caller[0], parts):
                counters.sent += 1
                counters.bytes_sent += size
            else:
                counters.dropped["caller full"] += 1
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            counters.dropped["caller gone"] += 1

    # -- Running a handler: the lock is free -------------------------------------------------

    def payload(self, request: Request) -> Any:
        """What the handler is given. Raises `Malformed`."""
        return payload_of(request.message, self._bytes_max)

    def result(self, value: Any) -> Answer:
        """The answer that carries what the handler returned."""
        try:
            return REPLY, encode(value, None, self._bytes_max)
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
        """A handler has ended: answer its caller, and `then` take what else there is."""
        parts, size = self._parts(request, answer), len(answer[1])

        def send() -> bool:
            self._backlog.done()
            self._send(request, parts, size)
            self._answered = time.monotonic()
            return self._closing and not self._backlog.running

        try:
            if then is None:
                last = self.link.run(send)
            else:
                with self.link.lock:
                    self.link.check_open()
                    last = send()
                    then()
        except Closed:
            with self.link.lock:
                self.counters.dropped["answer after close"] += 1
            return
        if last:
            self._end()

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

    def wait_closed(self, timeout: float) -> bool:
        """Block until no handler has anything left to answer; False after `timeout` seconds."""
        return self._ended.wait(timeout)

    def _end(self) -> None:
        self.link.close(_LINGER_MS, first=self.on_end)
        if self._timer is not None:
            self._timer.cancel()
        self._home.transport.release(self._bound)
        self._runner.end()
        self._ended.set()


class Runner(Protocol):
    """Whoever reads requests and runs the handler."""

    def start(self) -> None:
        """Begin to read."""

    def over(self) -> bool:
        """Whether it can read no more, though nobody closed the service."""

    def end(self) -> None:
        """The service has ended: nobody waits for anything now."""


def _nothing() -> None:
    """Nobody has to be told."""


def _runner(server: Server, concurrency: int) -> Runner:
    if not _is_async(server.handler):
        return Threads(server, concurrency)
    from mesh.sockets.server_asyncio import loop_runner  # blocking programs never import asyncio

    return loop_runner(server)


def _is_async(handler: Callable[[Any], Any]) -> bool:
    """Whether it is an ``async def``, or an object that is called like one."""
    call = getattr(handler, "__call__", None)  # noqa: B004  to look at it, not whether it is there
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(call)
