"""Whether LZ4 pays on one channel: tried where it did, and given up for a while where it did not.

For tcp alone. On a link of 1 Gbit/s what shrinks by a tenth or more arrives sooner; from some
3 Gbit/s on it would not, which is what ``compress=False`` is for. The core takes bodies and returns
bytes: no clock, so that what it does depends on nothing but what was sent.
"""

from __future__ import annotations

from typing import Final

from mesh import limits
from mesh.sockets import codec
from mesh.sockets.frame import Part

PAUSE_BODIES_MAX: Final = 1024
"""Of a channel of which nothing shrinks one body in so many is tried, at some 10 us."""


class Compression:
    """Of one topic, queue, service, or connection to one. Used under its link's lock."""

    __slots__ = ("_pause_bodies", "_skip_bodies")

    def __init__(self) -> None:
        self._pause_bodies = 0
        self._skip_bodies = 0

    def compress(self, body: Part) -> bytes | None:
        """`body` as an LZ4 frame, or None if it is to go as it is."""
        if len(body) < limits.COMPRESS_BYTES_MIN:
            return None
        if self._skip_bodies:
            self._skip_bodies -= 1
            return None
        packed = codec.compress(body)
        if packed is None:
            self._pause_bodies = min(2 * self._pause_bodies or 1, PAUSE_BODIES_MAX)
        else:
            self._pause_bodies = 0
        self._skip_bodies = self._pause_bodies
        return packed
