"""Serving requests.

Guarantee: the handler runs at most once for each attempt of a caller, never for one whose time is
over or who gave up before it started, and every request is answered once: by the result, or by an
error that says why there is none. A server whose backlog is full says so at once. A handler that
raises takes nothing down.

A handler runs in the thread that read its request; if every other is busy too, another is started
first to read: so there is always one thread that stamps arrivals, takes cancellations and turns
away what is too much, while up to `concurrency` others run handlers. An ``async def`` handler runs
in the event loop that was running where the service was registered, or in a loop of the service's
own; each request has a task, and the loop watches the sockets itself.

ZeroMQ's high-water mark is as high as the number of requests one client may have outstanding, so a
caller that keeps to it never loses an answer; who does not, loses what it does not read.
"""

from __future__ import annotations

import errno
import inspect
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import zmq

from mesh import limits
from mesh.errors import Closed, NotSerializable, PayloadTooLarge
from mesh.names import check_name
from mesh.options import ServiceOptions
from mesh.sockets import backlog, codec, failure
from mesh.sockets.backlog import Backlog, Verdict
from mesh.sockets.control import Offer, OfferKind
from mesh.sockets.failure import describe, encode_failure
from mesh.sockets.frame import Kind, Malformed, Part, decode, wire_name
from mesh.sockets.home import Counters, Home
from mesh.sockets.link import Link, read_parts, send_parts
from mesh.sockets.outgoing import Outgoing, encode_message
from mesh.sockets.transport import Bound, Socket, endpoints_of

logger = logging.getLogger(__name__)

_FRAMES_PER_ATTEMPT = 1024
"""Read at most so many before others get the lock."""
_LINGER_MS = 200
"""Answers given just before the service ended get this long to leave."""

Request = backlog.Request[tuple[Socket, bytes]]
Answer = tuple[int, Outgoing]
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
        self._wire = wire_name(channel)
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
        with self.link:
            for bound in self._bound:
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
        self._read()
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

    def _read(self) -> None:
        """Take in all that has come before any of it is started: a request may be followed by the
        word that nobody waits for it."""
        for bound in self._bound:
            for _ in range(_FRAMES_PER_ATTEMPT):
                if (parts := read_parts(bound.socket, 3)) is None:
                    break
                try:
                    self._accept(bound.socket, parts)
                except Malformed as fault:
                    self.counters.dropped[fault.reason] += 1
            else:
                self.link.wake_all()  # there may be more

    def _accept(self, socket: Socket, parts: list[Part]) -> None:
        """One message from a caller."""
        if len(parts) < 2:
            raise Malformed("malformed")
        caller = (socket, bytes(parts[0]))
        frame = decode(parts[1:])
        if frame.name != self._wire or frame.count != 1:
            raise Malformed("malformed")
        if frame.kind == Kind.CANCEL:
            cancelled = self._backlog.cancel(caller, frame.seq)
            if cancelled is not None:
                self._turn_away(cancelled, failure.CANCELLED)
            return
        if frame.kind != Kind.REQUEST:
            raise Malformed("malformed")
        self.counters.received += 1
        self.counters.bytes_received += len(frame.body) + len(frame.detached or b"")
        now = time.monotonic()
        request = Request(caller, frame, now)
        if self._closing:
            self._turn_away(request, failure.BUSY)
            return
        match self._backlog.arrive(request, now):
            case Verdict.BUSY:
                self._turn_away(request, failure.BUSY)
            case Verdict.EXPIRED:
                self._turn_away(request, failure.EXPIRED)
            case Verdict.REPEATED:
                raise Malformed("repeated request")
            case Verdict.WAIT:
                pass

    def _turn_away(self, request: Request, code: str) -> None:
        self.counters.dropped[code] += 1
        self._send(request, (Kind.ERROR, encode_failure(code)))

    def _send(self, request: Request, answer: Answer) -> None:
        socket, routing_id = request.caller
        kind, message = answer
        parts = message.parts(
            self._wire,
            kind,
            sender=self._home.node_id,
            seq=request.frame.seq,
            compression=None if socket is self._bound[0].socket else self._compression,
        )
        try:
            if send_parts(socket, [routing_id, *parts]):
                self.counters.sent += 1
                self.counters.bytes_sent += message.size
            else:
                self.counters.dropped["caller full"] += 1
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self.counters.dropped["caller gone"] += 1

    # -- Running a handler: the lock is free -------------------------------------------------

    def payload(self, request: Request) -> Any:
        """What the handler is given. Raises `Malformed`."""
        bytes_max = self._home.transport.message_bytes_max
        payloads, _headers = codec.unpack_frame(request.frame, bytes_max)
        return payloads[0]

    def result(self, value: Any) -> Answer:
        """The answer that carries what the handler returned."""
        try:
            bytes_max = self._home.transport.message_bytes_max
            return Kind.REPLY, encode_message(value, None, bytes_max)
        except (NotSerializable, PayloadTooLarge) as error:
            return Kind.ERROR, describe(failure.PAYLOAD, error)

    def failed(self, error: BaseException) -> Answer:
        """The answer that carries what was raised instead."""
        if isinstance(error, Malformed):
            with self.link.lock:
                self.counters.dropped[error.reason] += 1
            text = "the payload or the headers cannot be decoded"
            return Kind.ERROR, encode_failure(failure.PAYLOAD, "Malformed", text)
        level = logging.DEBUG if isinstance(error, Exception) else logging.WARNING
        logger.log(level, "the handler of service %r raised", self.channel, exc_info=error)
        return Kind.ERROR, describe(failure.REMOTE, error)

    def finish(self, request: Request, answer: Answer) -> None:
        """A handler has ended: answer its caller."""
        try:
            last = self.link.run(lambda: self._answer(request, answer))
        except Closed:
            with self.link.lock:
                self.counters.dropped["answer after close"] += 1
            return
        if last:
            self._end()

    def _answer(self, request: Request, answer: Answer) -> bool:
        """True if nothing else runs, and the server is to end with that."""
        self._backlog.done()
        self._send(request, answer)
        return self._closing and not self._backlog.running

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
            self._read()
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
        self._ended.set()


class Runner(Protocol):
    """Whoever reads requests and runs the handler."""

    def start(self) -> None:
        """Begin to read."""

    def over(self) -> bool:
        """Whether it can read no more, though nobody closed the service."""


class _Threads:
    """Threads that read requests and run a handler, one more than may run it: the reader."""

    def __init__(self, server: Server, concurrency: int) -> None:
        self._server = server
        self._threads_max = concurrency + 1
        self._threads = 0

    def start(self) -> None:
        """Have one more thread, within the bound."""
        with self._server.link.lock:
            if self._threads >= self._threads_max:
                return
            self._threads += 1
        name = f"mesh service {self._server.channel}"
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def over(self) -> bool:
        return False

    def _work(self) -> None:
        server = self._server
        while True:
            try:
                request = server.link.wait(server.take, None, "request")
            except Closed:
                return
            if server.running >= self._threads:
                self._hand_on()
            try:
                answer = server.result(server.handler(server.payload(request)))
            except BaseException as error:  # noqa: BLE001  the handler's: told to the caller
                answer = server.failed(error)
            server.finish(request, answer)

    def _hand_on(self) -> None:
        """Every thread there is runs a handler now: another has to read."""
        try:
            self.start()
        except (RuntimeError, OSError):
            logger.exception("service %r has no thread to read with", self._server.channel)
            with self._server.link.lock:
                self._threads -= 1


def _nothing() -> None:
    """Nobody has to be told."""


def _runner(server: Server, concurrency: int) -> Runner:
    if not _is_async(server.handler):
        return _Threads(server, concurrency)
    from mesh.sockets.server_asyncio import loop_runner  # blocking programs never import asyncio

    return loop_runner(server)


def _is_async(handler: Callable[[Any], Any]) -> bool:
    """Whether it is an ``async def``, or an object that is called like one."""
    call = getattr(handler, "__call__", None)  # noqa: B004  to look at it, not whether it is there
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(call)
