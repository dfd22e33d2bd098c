"""The single connections of a ZeroMQ socket, which libzmq hides: to cut one, to see one lost.

A bound socket cannot be told to let go of one peer, and one that does not read holds up all (topics
that wait). libzmq's heartbeats are no way out: they also end the connection of a peer that is alive
and merely slow, since a socket whose buffer is full reads no answers either. So who knows that a
peer is gone cuts its connections here, and nobody else's.

A connecting socket comes back by itself, except where libzmq gives up without a word, for a frame
over the limit say. That can be seen here, and the connection made anew.
"""

from __future__ import annotations

import os
import socket as kernel
import struct
from dataclasses import dataclass
from typing import Final

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


@dataclass(frozen=True, slots=True)
class Accepted:
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
        try:
            copy = os.dup(self.fd)
        except OSError:
            return False
        if not self.inode or _inode(copy) != self.inode:
            os.close(copy)
            return False
        with kernel.socket(fileno=copy) as connection:
            try:
                connection.shutdown(kernel.SHUT_RDWR)
            except OSError:
                return False  # the other side was faster
        return True


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


def _inode(fd: int) -> int:
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return 0
