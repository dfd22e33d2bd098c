"""The sockets that one receiver reads, in turn. Used under its link's lock."""

from __future__ import annotations

from collections import deque
from typing import Final

from mesh.sockets.link import Link
from mesh.sockets.parts import read_first
from mesh.sockets.transport import Socket

_SURE_HITS: Final = 2
"""After so many frames in a row there is most likely another."""


class Turns:
    """The one whose turn it is comes first."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._sockets: deque[Socket] = deque()
        self._hits = 0
        """How often in a row there was something to read."""

    def add(self, socket: Socket) -> None:
        self._sockets.append(socket)

    @property
    def only(self) -> Socket | None:
        """The socket, if there is one."""
        return self._sockets[0] if len(self._sockets) == 1 else None

    def read_first(self) -> tuple[Socket, bytes] | None:
        """The first part of the next frame, and where it came; None if there is none."""
        link, sockets = self._link, self._sockets
        sure = (self._hits >= _SURE_HITS or link.rang) and len(sockets) == 1
        link.rang = False
        for socket in sockets:
            if (first := read_first(socket, sure=sure)) is not None:
                self._hits += 1
                sockets.rotate(-1)
                return socket, first
        self._hits = 0
        return None
