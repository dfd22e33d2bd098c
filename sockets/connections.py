"""The single connections of a ZeroMQ socket, which libzmq hides: to cut one, to see one lost, to
have the kernel hold more for one, and to hold one until all is read.

A bound socket cannot be told to let go of one peer, and one that does not read holds up all (topics
that wait). libzmq's heartbeats are no way out: they also end the connection of a peer that is alive
and merely slow, since a socket whose buffer is full reads no answers either. So who knows that a
peer is gone cuts its connections here, and nobody else's.

A connecting socket comes back by itself, except where libzmq gives up without a word, for a frame
over the limit say. That can be seen here, and the connection made anew.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket as kernel
import stat
import struct
import termios
import time
from collections.abc import Callable, Iterable
from typing import Final

import msgspec
import zmq

from mesh.sockets.transport import Socket

logger = logging.getLogger(__name__)

_EVENT: Final = struct.Struct("=H")
"""The number of an event, zmq_socket_monitor(3); pyzmq's own parser imports asyncio."""
_EVENTS: Final = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_CONNECT_DELAYED
    | zmq.EVENT_CONNECT_RETRIED
)
_SEND_BUFFER_BYTES: Final = 1024 * 1024
"""Of a connection on this host. Linux takes no more than net.core.wmem_max, and doubles it for what
it needs itself. With that at 208 KiB, as mostly, messages of 1 MiB went a twentieth faster than
without, with 1 MiB a tenth."""
_INT: Final = struct.Struct("=i")
_LOOK_S: Final = 0.001


class Accepted(msgspec.Struct, frozen=True):
    """A connection to a bound socket. Equal to another that is the same one."""

    fd: int
    inode: int
    """Tells the connection from another that got its descriptor since; 0: it had ended already."""

    @classmethod
    def of(cls, message: zmq.Frame) -> Accepted:
        """The one that `message` came by."""
        fd = int(message.get(zmq.SRCFD))
        return cls(fd, _inode(fd))

    @property
    def ended(self) -> bool:
        return not self.inode or _inode(self.fd) != self.inode

    def cut(self) -> bool:
        """End it, as the other side's death would; False if it has ended."""
        connection = self.hold()
        if connection is None:
            return False
        with connection:
            try:
                connection.shutdown(kernel.SHUT_RDWR)
            except OSError:
                return False  # the other side was faster
        return True

    def widen(self) -> None:
        """Have the kernel hold more of what is sent by it, if it leads to this host. libzmq leaves
        that as it is; the two of its threads that copy a message of 1 MiB from one process to the
        other then wait for each other five times."""
        connection = self.hold()
        if connection is None:
            return
        with connection:
            size = connection.getsockopt(kernel.SOL_SOCKET, kernel.SO_SNDBUF)
            if connection.family == kernel.AF_UNIX and size < _SEND_BUFFER_BYTES:
                connection.setsockopt(kernel.SOL_SOCKET, kernel.SO_SNDBUF, _SEND_BUFFER_BYTES)

    def hold(self) -> kernel.socket | None:
        """The connection itself, which lasts until that is closed, too; None if it has ended, or
        there is no descriptor for it."""
        try:
            copy = os.dup(self.fd)
        except OSError as error:
            if error.errno != errno.EBADF:
                logger.warning("a connection cannot be reached: %s", error)
            return None
        try:
            if self.inode and _inode(copy) == self.inode:
                return kernel.socket(fileno=copy)
        except OSError:
            pass  # it has become something else, of that very number
        os.close(copy)
        return None


class Draining:
    """Connections that are held, though libzmq has closed them, until the other side has read what
    is on its way there.

    Over ipc it would lose that otherwise. libzmq does not read while its reader is held up, and
    when it hears that the connection has ended it throws away what the kernel has of it: a receiver
    whose buffer was full when its sender closed lost all but the buffer. (Over tcp the end is part
    of what is read.)
    """

    def __init__(self) -> None:
        self._held: list[kernel.socket] = []

    def hold(self, connections: Iterable[Accepted]) -> None:
        """Those of them that lead to this host."""
        for each in connections:
            held = each.hold()
            if held is not None and held.family == kernel.AF_UNIX:
                self._held.append(held)
            elif held is not None:
                held.close()

    def wait(self, until: Callable[[], float]) -> int:
        """Block until all is read, or that time of the monotonic clock, which may change meanwhile;
        then let go. Returns by how many of them something is left to be read."""
        while (left := sum(map(_is_unread, self._held))) and time.monotonic() < until():
            time.sleep(_LOOK_S)
        self.release()
        return left

    def release(self) -> None:
        """Hold none any more."""
        for each in self._held:
            each.close()
        self._held.clear()


class Watch:
    """What becomes of the connections that a connecting socket has. Made before it connects."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket
        self._monitor: Socket = socket.get_monitor_socket(_EVENTS)
        self._silent: dict[str, int] = {}
        self._up: set[str] = set()

    def look(self) -> tuple[bool, list[str]]:
        """To be called now and then: whether any connection was lost since the last time, and the
        endpoints of those that were lost before that and that libzmq does not dial again. A peer
        that is held up may miss the handshake: that was no connection yet, and lost nothing."""
        lost = False
        given_up = []
        for endpoint, looks in list(self._silent.items()):
            self._silent[endpoint] = looks + 1
        while self._monitor.poll(0):
            what, where = self._monitor.recv_multipart()
            (event,) = _EVENT.unpack_from(what)
            endpoint = where.decode(errors="replace")
            if event == zmq.EVENT_DISCONNECTED:
                lost = lost or endpoint in self._up
                self._up.discard(endpoint)
                self._silent[endpoint] = 0
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._up.add(endpoint)
            else:
                self._silent.pop(endpoint, None)
        for endpoint, looks in self._silent.items():
            if looks >= 2:
                given_up.append(endpoint)
        return lost, given_up

    def forget(self, endpoint: str) -> None:
        """It was dialled anew, or is not wanted any more."""
        self._silent.pop(endpoint, None)

    def close(self) -> None:
        """Before the socket is closed."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)


def _is_unread(connection: kernel.socket) -> bool:
    """Whether the other side has yet to read something."""
    (count,) = _INT.unpack(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(_INT.size)))
    return bool(count)


def _inode(fd: int) -> int:
    """0 for what is no socket, or nothing at all."""
    try:
        status = os.fstat(fd)
    except OSError:
        return 0
    return status.st_ino if stat.S_ISSOCK(status.st_mode) else 0
