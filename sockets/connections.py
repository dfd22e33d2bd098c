"""The single connections of a ZeroMQ socket, which libzmq hides: to cut one, to see one lost.

A bound socket cannot be told to let go of one peer, and one that does not read holds up all (topics
that wait). libzmq's heartbeats are no way out: they also end the connection of a peer that is alive
and merely slow, since a socket whose buffer is full reads no answers either. So who knows that a
peer is gone cuts its connections here, and nobody else's.

A connecting socket comes back by itself, except where libzmq gives up without a word, for a frame
over the limit say. That can be seen here, and the connection made anew.
"""

from __future__ import annotations

import fcntl
import os
import socket as kernel
import struct
import termios
import time
from collections.abc import Iterable
from typing import Final

import msgspec
import zmq

from mesh.sockets.transport import Socket

_EVENT: Final = struct.Struct("=H")
"""The number of an event, zmq_socket_monitor(3); pyzmq's own parser imports asyncio."""
_EVENTS: Final = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_CONNECT_DELAYED
    | zmq.EVENT_CONNECT_RETRIED
)
SEND_BUFFER_BYTES: Final = 1024 * 1024
"""Of a connection on this host. Linux holds twice that, and no more than net.core.wmem_max."""
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
        if connection is not None:
            with connection:
                if connection.family == kernel.AF_UNIX:
                    connection.setsockopt(kernel.SOL_SOCKET, kernel.SO_SNDBUF, SEND_BUFFER_BYTES)

    def hold(self) -> kernel.socket | None:
        """The connection itself, which lasts until that is closed, too; None if it has ended."""
        try:
            copy = os.dup(self.fd)
        except OSError:
            return None
        if not self.inode or _inode(copy) != self.inode:
            os.close(copy)
            return None
        return kernel.socket(fileno=copy)


class Parting:
    """Connections that are held, though libzmq has closed them, until the other side has read what
    is on its way there.

    Over ipc it would lose that otherwise. libzmq does not read while its reader is held up, and
    when it hears that the connection has ended it throws away what the kernel has of it: a receiver
    whose buffer was full when its sender closed lost all but the buffer. (Over tcp the end is part
    of what is read.)
    """

    def __init__(self, connections: Iterable[Accepted]) -> None:
        held = [connection.hold() for connection in connections]
        self._held = [each for each in held if each is not None]

    def wait(self, until: float) -> int:
        """Block until all is read, or that time of the monotonic clock; then let go. Returns to how
        many something is left to be read."""
        while (left := sum(map(_is_unread, self._held))) and time.monotonic() < until:
            time.sleep(_LOOK_S)
        for each in self._held:
            each.close()
        self._held.clear()
        return left


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
    if connection.family != kernel.AF_UNIX:
        return False
    (count,) = _INT.unpack(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(_INT.size)))
    return bool(count)


def _inode(fd: int) -> int:
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return 0
