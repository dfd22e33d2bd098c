"""A direct line to a server on the same host: one small request, and its answer, at a time.

Beside ZeroMQ, whose own threads cost a lone caller 100 µs a round trip here: through a UNIX socket,
from the caller's thread into the server's, it takes 13 µs. For who waits for each answer before it
asks again; whatever goes wrong with a line, it is closed, and who used it asks the usual way. What
was on it then may have been done or not, so only what may be asked twice travels so.

A line is a SOCK_SEQPACKET socket, each packet of it a request or an answer as ZeroMQ would carry
it. It lies in the runtime directory, as ipc sockets do, which is its fence.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from mesh.sockets.home import Counters
from mesh.sockets.sleeping import NAP_S, Waker

logger = logging.getLogger(__name__)

PACKET_BYTES_MAX: Final = 64 * 1024
"""Well below what the kernel takes at once (`net.core.wmem_default` is 208 KiB)."""
LINES_MAX: Final = 256
"""At one server. Who comes then asks the usual way."""
_TIMEVAL: Final = struct.Struct("ll")
_MICROSECONDS: Final = 1_000_000

Answer = Callable[[bytes], object]
Handler = Callable[[bytes, Answer, bool], Callable[[], object] | None]


class NotReceived(Exception):
    """The server has not read that request, and never will."""


class DirectLine:
    """The caller's end. Whoever `claim`s it may `exchange` once; `close` from any thread."""

    def __init__(self, path: str) -> None:
        """Raises `OSError` if nobody is there."""
        self._claimed = threading.Lock()
        self._nap_s = 0.0
        self._closed = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.setblocking(False)
            self._socket.connect(path)  # not blocking: a stopped server's backlog may be full
            self._socket.setblocking(True)
            self._set_nap(NAP_S)
        except BaseException:
            self._socket.close()
            raise

    @property
    def closed(self) -> bool:
        return self._closed

    def claim(self) -> bool:
        """Have it to oneself, if nobody has. Does not block."""
        return not self._closed and self._claimed.acquire(blocking=False)

    def exchange(self, request: bytes, timeout: float | None) -> bytes | None:
        """The answer to `request`. None: there was none within `timeout` seconds, or the line
        broke; then it is closed. Raises `NotReceived`; then it is closed, too. Gives it back, in
        any case."""
        until = None if timeout is None else time.monotonic() + timeout
        answer = b""
        sent = False
        try:
            self._socket.send(request)
            sent = True
            while not self._closed:
                left_s = NAP_S if until is None else until - time.monotonic()
                if left_s <= 0:
                    break
                if (nap_s := min(left_s, NAP_S)) != self._nap_s:
                    self._set_nap(nap_s)
                try:
                    answer = self._socket.recv(PACKET_BYTES_MAX)
                    break
                except BlockingIOError:
                    continue
        except OSError as error:
            logger.debug("a direct line broke: %s", error)
            # A reset says that its other end was closed before all was read, and this is all.
            if not sent or isinstance(error, ConnectionResetError):
                raise NotReceived from None
        finally:
            if not answer:  # also after a Ctrl-C: an answer to this is not for the next
                self._end()
            self._give_back()
        return answer or None

    def close(self) -> None:
        """Who waits on it is told. Does not block; idempotent."""
        self._end()
        self._close_if_free()

    def give_up(self) -> None:
        """Instead of whoever claimed it, and will not exchange: close it."""
        self._end()
        self._give_back()

    def _give_back(self) -> None:
        self._claimed.release()
        if self._closed:  # looked at after that: it may be closed at this moment
            self._close_if_free()

    def _close_if_free(self) -> None:
        """Else whoever has it does this."""
        if self._claimed.acquire(blocking=False):
            self._socket.close()
            self._claimed.release()

    def _end(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _set_nap(self, nap_s: float) -> None:
        whole, part = divmod(max(1, round(nap_s * _MICROSECONDS)), _MICROSECONDS)
        packed = _TIMEVAL.pack(whole, part)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, packed)
        self._nap_s = nap_s


class DirectListener:
    """The server's end: one thread reads all lines, and calls `handler` with each request, a
    function to answer it with, from any thread, and whether nothing else came with it: what it
    returns then is called before more is read."""

    def __init__(self, path: str, handler: Handler, name: str) -> None:
        """Bind it to `path`. Raises `OSError`."""
        self._handler = handler
        self._name = name
        self._lines: dict[int, socket.socket] = {}
        self._counters = Counters()
        self._counting = threading.Lock()
        """Answers are sent from any thread."""
        self._closed = False
        self._bell = Waker()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._epoll = select.epoll()
        try:
            self._socket.bind(path)
            self._socket.listen(LINES_MAX)
            for each in (self._socket, self._bell):
                self._epoll.register(each.fileno(), select.EPOLLIN)
        except BaseException:
            self._socket.close()
            self._epoll.close()
            raise
        threading.Thread(target=self._work, name=f"mesh direct {name}", daemon=True).start()

    def close(self) -> None:
        """Close all lines. What is answered after this is not sent: it may say no more than that
        the server closes, and who asked asks the usual way. Does not block."""
        self._closed = True
        self._bell.wake()

    def count(self, total: Counters) -> None:
        """Add what came and went by all lines. From any thread."""
        with self._counting:
            total.add(self._counters)

    def _work(self) -> None:
        own = self._socket.fileno()
        while not self._closed:
            requests: list[tuple[socket.socket, bytes]] = []
            for fd, _ in self._epoll.poll():
                if fd == own:
                    self._accept()
                elif (line := self._lines.get(fd)) is not None:
                    data = self._read(line)
                    if data:
                        requests.append((line, data))
            for line, data in requests:
                self._handle(line, data, lone=len(requests) == 1)
        for line in (self._socket, *self._lines.values()):
            line.close()
        self._epoll.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            line, _ = self._socket.accept()
            if len(self._lines) >= LINES_MAX:
                with self._counting:
                    self._counters.dropped["lines full"] += 1
                line.close()
                return
            line.setblocking(False)
            self._lines[line.fileno()] = line
            self._epoll.register(line.fileno(), select.EPOLLIN)

    def _read(self, line: socket.socket) -> bytes:
        """Empty, if it is over with that line."""
        data = b""
        with contextlib.suppress(OSError):
            data = line.recv(PACKET_BYTES_MAX + 1)
        if not 0 < len(data) <= PACKET_BYTES_MAX:
            self._drop(line)
            return b""
        with self._counting:
            self._counters.received += 1
            self._counters.bytes_received += len(data)
        return data

    def _drop(self, line: socket.socket) -> None:
        del self._lines[line.fileno()]
        self._epoll.unregister(line.fileno())
        line.close()

    def _handle(self, line: socket.socket, data: bytes, *, lone: bool) -> None:
        try:
            work = self._handler(data, partial(self._answer, line), lone)
            if work is not None:
                work()
        except Exception:  # whatever it is, the others go on; who asked is told by the line's end
            logger.exception("a request by the direct line of %s failed", self._name)
            _end(line)

    def _answer(self, line: socket.socket, answer: bytes) -> None:
        if self._closed:
            return
        try:
            line.send(answer, socket.MSG_NOSIGNAL)
        except OSError:  # it is gone, or does not read: its end is noticed by who reads
            _end(line)
            return
        with self._counting:
            self._counters.sent += 1
            self._counters.bytes_sent += len(answer)


def _end(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
