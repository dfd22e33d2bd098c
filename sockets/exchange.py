"""A lone caller's request and its answer in one go: the shortest way there is.

Where the last answer came within a moment and nobody else is about (`mesh.sockets.moment`), the
caller sends, and waits for the answer inside ZeroMQ, with no record of its call in any table; one
function does it all, since just after a wake-up each that is entered costs a microsecond. Whatever
is out of the ordinary becomes a call like any other, and goes on as such.
"""

from __future__ import annotations

import time
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

import zmq

from mesh import limits
from mesh.sockets.frame import HEADER_BYTES, NUMBER, TIME_AND_REMAINING
from mesh.sockets.moment import IN_A_ROW, PATIENT_S, may_hold
from mesh.sockets.parts import NOBLOCK, parts_of, recv, send
from mesh.sockets.single import QUICK, REPLY, REQUEST, beginning, quick_body

if TYPE_CHECKING:
    from mesh.sockets.calls import Call, Requests
    from mesh.sockets.requests import ServerAccount
    from mesh.sockets.transport import Socket

_TIMEOUT_S_MAX: Final = 1_000_000.0
_pack_number: Final = NUMBER.pack


def _ms(timeout: float) -> int:
    return int(timeout * 1000) + 1


class Exchange:
    """Of a client that has one server."""

    def __init__(
        self, core: Requests, name: bytes, sender: int, socket: Socket, server: ServerAccount[Call]
    ) -> None:
        self._core = core
        # All that frames begin with, up to the sequence.
        self._asks = beginning(name, REQUEST) + _pack_number(sender)
        self._answers = beginning(name, REPLY) + _pack_number(server.peer)
        self._body_at = len(name) + HEADER_BYTES
        self._timeout = -1.0
        self._rest = b""
        """What follows the sequence where that is the timeout."""
        self._socket = socket
        self._server = server
        self.peer = server.peer
        self.renew()

    def renew(self) -> None:
        """It is allowed again, in this thread."""
        self._left = IN_A_ROW
        self._thread = get_ident()

    def _may_go_on(self) -> bool:
        """Now and then: whether what allowed it still does."""
        if not may_hold():
            return False
        self.renew()
        return True

    def attempt(self, payload: Any, timeout: float | None, retry: bool) -> bytes | Call | None:
        """The answer, not yet decoded; or the call that goes on, if it did not come within a
        moment; or None if nothing was sent, and the usual way is to be gone. Raises nothing of its
        own."""
        core = self._core
        link, table = core.link, core.table
        if type(payload) not in QUICK or type(timeout) is not float:
            return None
        try:
            body = quick_body(payload)
        except (ValueError, OverflowError):
            return None  # it has no form: the usual way says so
        size = len(body)
        if size >= limits.COMPRESS_BYTES_MIN or not PATIENT_S < timeout < _TIMEOUT_S_MAX:
            return None
        if link.lock.locked():
            link.met_at = time.monotonic()
            core.exchange = None
            return None
        with link.lock:
            self._left -= 1
            # Looked at without a call: `Link.alone`.
            if (
                core.exchange is not self
                or self._thread != get_ident()
                or not (self._left > 0 or self._may_go_on())
                or link._closed is not None  # or this is a forked child
                or table.outstanding
                or link._threads
                or link._waiting_loops
            ):
                core.exchange = None
                return None
            table.last_seq = seq = table.last_seq + 1
            socket, counters, sent = self._socket, core.counters, False
            if timeout != self._timeout:
                self._timeout, self._rest = timeout, TIME_AND_REMAINING.pack(0, _ms(timeout))
            number = _pack_number(seq)
            frame = self._asks + number + self._rest + body
            try:
                send(socket, frame, NOBLOCK)
                sent = True
                counters.sent += 1
                counters.bytes_sent += size
                expected = self._answers + number
                answer: bytes = recv(socket, 0)
            except zmq.Again:
                core.exchange = None
                return core.adopt(body, timeout, retry, seq, self._server) if sent else None
            except BaseException:  # Ctrl-C: but the request was sent
                core.forget(core.adopt(body, timeout, retry, seq, self._server))
                raise
            at = self._body_at
            if answer.startswith(expected) and len(answer) >= at:
                message = answer[at:]
                counters.received += 1
                counters.bytes_received += len(message)
                return message
            call = core.adopt(body, timeout, retry, seq, self._server)
            core.accept(self._server, parts_of(socket, answer), call)
            return call
