"""How far a log may be read, as its writer shows it to whoever does: all in one go, so that what is
seen of it fits together."""

from __future__ import annotations

import msgspec


class Tip(msgspec.Struct, frozen=True, gc=False):
    """How far a log may be read."""

    offset: int
    """Of the first record that may not be read yet."""
    base: int
    """Of the segment that this record is in, or will be: the offset of its first record."""
    size: int
    """Bytes of that segment which may be read."""
    log_epoch: int

    def holds(self, now: Tip) -> bool:
        """Whether all that could be read then can be, if `now` is where the log stands: else some
        of it was cut off, or is about to be."""
        return self.log_epoch == now.log_epoch and self.offset <= now.offset
