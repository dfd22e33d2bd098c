"""What a node has to do with logs: its sidecar, its streams, what it records, what fills its gaps.

Each is made when it is first asked for: programs without streams load none of `mesh.durable`.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mesh.assembly import Assembly
    from mesh.durable.hosting import Hosting
    from mesh.durable.recordings import Recordings
    from mesh.durable.repairer import Repairer
    from mesh.durable.streams import Streams
    from mesh.sockets.home import Counters

_THREAD_S = 1.0
"""How long a thread may take that was told to end: many times what it needs."""


class Logs:
    """See above. A part of an `Assembly`."""

    def __init__(self, parts: Assembly) -> None:
        self._parts = parts
        self._lock = threading.Lock()
        self._hosting: Hosting | None = None
        self._streams: Streams | None = None
        self._recordings: Recordings | None = None
        self._repairer: Repairer | None = None

    def host(self, directory: str) -> None:
        """Open the sidecar in that directory. Raises `LogLocked`, `LogDamaged`, `StorageFailed`,
        `OSError`."""
        from mesh.durable.hosting import Hosting

        parts = self._parts
        self._hosting = hosting = Hosting(
            directory, parts.home(), add=parts.loop.add, offer=parts.offer, next_key=parts.next_key
        )
        parts.loop.post(lambda: parts.presence.observe(hosting.observe))

    def streams(self) -> Streams:
        """What all of this node's streams share."""
        from mesh.durable.streams import Streams

        parts = self._parts
        with self._lock:
            if self._streams is None:
                sidecar = None if self._hosting is None else self._hosting.sidecar
                self._streams = Streams(
                    parts.home(), parts.join, parts.release_of, sidecar, parts.name_of
                )
            return self._streams

    def recordings(self) -> Recordings:
        """What this node records."""
        from mesh.durable.recordings import Recordings

        parts, streams = self._parts, self.streams()
        with self._lock:
            if self._recordings is None:
                self._recordings = Recordings(
                    streams,
                    parts.topics.values(),
                    offer=parts.offer,
                    withdraw=parts.withdraw,
                    next_key=parts.next_key,
                )
            return self._recordings

    def repairer(self) -> Repairer:
        """What fills the gaps of this node's subscribers."""
        from mesh.durable.repairer import Repairer

        streams = self.streams()
        with self._lock:
            if self._repairer is None:
                self._repairer = Repairer(streams)
            return self._repairer

    def count(self, by_kind: dict[str, Counters]) -> None:
        """Add what the sidecar's server has not counted."""
        if self._hosting is not None:
            self._hosting.count(by_kind["stream"])

    def dropped(self) -> Counter[str]:
        """What the sidecar refused and lost, by reason."""
        return Counter() if self._hosting is None else self._hosting.sidecar.dropped()

    def leave(self) -> None:
        """The node is about to close. Does not block."""
        if self._hosting is not None:
            self._hosting.leave()

    def close(self) -> None:
        """The node's loop has ended."""
        if self._repairer is not None:
            self._repairer.close()
        if self._streams is not None:
            self._streams.close()
        for threads in (self._recordings, self._repairer):
            if threads is not None:
                threads.join(_THREAD_S)
        if self._hosting is not None:
            self._hosting.close()

    def abandon(self) -> None:
        """In a forked child: all of it is the parent's, and somebody may have had a lock."""
        self._lock = threading.Lock()
        if self._streams is not None:
            self._streams.abandon()
        if self._hosting is not None:
            self._hosting.sidecar.abandon()
