"""The way from a source's own thread to the control thread: bounded, and never a wait.

Of each key only the newest sighting is kept, so that a flood about one node costs one place.
"""

from __future__ import annotations

import os
import threading
from typing import Final

from mesh import limits
from mesh.discovery.source import Sighting

WATCHED_INTERVAL_S: Final = 60.0
"""`Source.interval_s` of a source with a descriptor: nothing is missed by waiting on that alone."""


class Outbox:
    """Sightings that wait to be taken. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, Sighting] = {}
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """A descriptor that is readable while something waits; -1 after `close`."""
        return self._fd

    def put(self, key: str, sighting: Sighting) -> bool:
        """Leave `sighting` in place of what waits under `key`; False if it was refused.

        That is when `limits.SIGHTINGS_MAX` others wait, or after `close`. For withdrawals there is
        as much room again: what is not withdrawn is dialled for ever.
        """
        with self._lock:
            room = limits.SIGHTINGS_MAX * (1 if sighting.present else 2)
            full = len(self._waiting) >= room and key not in self._waiting
            if self._fd < 0 or full:
                return False
            os.eventfd_write(self._fd, 1)
            # The newest goes to the back, as it would in a queue.
            self._waiting.pop(key, None)
            self._waiting[key] = sighting
            return True

    def take(self) -> list[Sighting]:
        """All that waits, oldest first; does not block."""
        with self._lock:
            taken = list(self._waiting.values())
            if taken:
                self._waiting.clear()
                os.eventfd_read(self._fd)
            return taken

    def close(self) -> None:
        """Throw away what waits and refuse what comes. May be called twice."""
        with self._lock:
            self._waiting.clear()
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
