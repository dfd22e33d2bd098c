"""How a blocking handler is run: in the thread that read its request.

Up to `concurrency` threads take turns to read; who read runs the handler at once, and another reads
on. While all of them run handlers nobody reads, which is the quickest way to an answer, and right
as long as handlers are quick: what came meanwhile is read before the next is started. A *deputy*
sees to it that this does not last: it looks every few milliseconds while there are requests, and
where one handler takes longer it reads in its stead, so that arrivals are stamped, cancellations
taken, and what is too much is turned away. It sleeps soundly while the service has nothing to do.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from mesh.errors import Closed
from mesh.sockets.single import QUICK, payload_of

if TYPE_CHECKING:
    from mesh.sockets.link import Recipient
    from mesh.sockets.server import Request, Server

logger = logging.getLogger(__name__)

NAP_S: Final = 0.005
"""A handler that takes longer has the deputy read in its stead, after two of these at the latest.
Each nap's end costs some 10 µs, and disturbs a request that is under way: one in fifty or so."""
_QUIET_NAPS: Final = 4
"""After so many without a request the deputy sleeps until the next one wakes it."""


class Threads:
    """Threads that read requests and run a handler, and their deputy. Started when needed."""

    def __init__(self, server: Server, concurrency: int) -> None:
        self._server = server
        self._concurrency = concurrency
        self._workers = 0
        self._has_deputy = False
        self._staffed = False
        """Whether there are all the threads that may be."""
        self._parked = False
        """Whether the deputy waits for the bell. This and the like under the link's lock."""
        self._bell = threading.Lock()
        self._bell.acquire()
        self.waiter: Recipient | None = None
        """The deputy, while it reads."""

    def start(self) -> None:
        self._workers += 1
        self._start(self._work)

    def over(self) -> bool:
        return False

    def end(self) -> None:
        with self._server.link.lock:
            self._parked = False
            if self._bell.locked():
                self._bell.release()

    def _start(self, work: Callable[[], None]) -> None:
        name = f"mesh service {self._server.channel}"
        threading.Thread(target=work, name=name, daemon=True).start()

    # -- Those who run the handler -----------------------------------------------------------

    def _work(self) -> None:
        server, bytes_max = self._server, self._server.bytes_max
        request: Request | None = None
        while True:
            if request is None:
                try:
                    request = server.link.wait(self._take, None, "request")
                except Closed:
                    return
            if not self._staffed and server.running >= self._workers:
                self._hand_on()
            try:
                value = server.handler(payload_of(request.message, bytes_max))
            except BaseException as error:  # noqa: BLE001  the handler's: told to the caller
                server.finish(request, server.failed(error))
                request = None
                continue
            if server.came_alone and type(value) in QUICK:
                request = server.exchange(request, value)
                if self._parked and request is not None:
                    with server.link.lock:
                        self._wake_deputy()
            else:
                server.finish(request, server.result(value))
                request = None

    def _take(self) -> Request | None:
        request = self._server.take()
        if request is not None and self._parked and self._server.running >= self._concurrency:
            self._wake_deputy()
        if self.waiter is not None:
            self.waiter.wake()  # somebody else reads now
        return request

    def _hand_on(self) -> None:
        """Every thread there is runs a handler now: have another, within the bound."""
        with self._server.link.lock:
            worker = self._workers < self._concurrency
            if not worker and self._has_deputy:
                self._staffed = True
                return
            self._workers += worker
            self._has_deputy = self._has_deputy or not worker
        try:
            self._start(self._work if worker else self._stand_by)
        except (RuntimeError, OSError):
            logger.exception("service %r has no thread to read with", self._server.channel)
            with self._server.link.lock:
                self._workers -= worker
                self._has_deputy = self._has_deputy and worker

    # -- Their deputy ------------------------------------------------------------------------

    def _wake_deputy(self) -> None:
        if self._parked:
            self._parked = False
            self._bell.release()

    def _stand_by(self) -> None:
        link, quiet = self._server.link, 0
        while not link.closed:
            started = self._server.started
            self._bell.acquire(timeout=NAP_S)  # which only the end of the service cuts short
            if self._server.started != started:
                quiet = 0
            elif self._server.running >= self._concurrency:
                self._read(started)
                quiet = 0
            elif (quiet := quiet + 1) >= _QUIET_NAPS:
                self._park(started)
                quiet = 0

    def _park(self, started: int) -> None:
        with self._server.link.lock:
            if self._server.link.closed or self._server.started != started:
                return
            self._parked = True
        self._bell.acquire()

    def _read(self, started: int) -> None:
        """Read until a handler ends."""

        def attempt() -> bool | None:
            if self._server.started != started or self._server.running < self._concurrency:
                return True
            self._server.read()
            return None

        try:
            self._server.link.wait(attempt, None, "end of a handler", slot=self)
        except Closed:
            return
