"""The file `producers`: what tells repeated appends from new ones, as of the start of a segment.

    0  u64  base      of that segment: the offset of its first record; little endian
    8       snapshot  see `mesh.durable.producers`

With it a log is opened without reading all segments. Once retention has taken those before `base`,
this file alone knows what they said: so `safe_to` says how far retention may go. Must not know what
a snapshot says.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from typing import Final

from mesh.durable.complaint import Complaint
from mesh.durable.storage import Storage, is_disk_full

logger = logging.getLogger(__name__)

_NAME: Final = "producers"
_BASE: Final = struct.Struct("<Q")


class SnapshotFile:
    """See above. For one thread."""

    def __init__(self, storage: Storage) -> None:
        self.safe_to = 0
        """Retention may take what is below this offset: the file on disk knows what it said."""
        self.has_no_room = False
        """Whether that is why the last one could not be written."""
        self._storage = storage
        self._unsaved: tuple[int, bytes] | None = None
        """What could not be written yet."""
        self._not_written = Complaint(logger)

    def read(self) -> tuple[int, bytes] | None:
        """The base, and the snapshot; None if there is no file, or it is too short. Raises
        `OSError`."""
        try:
            file = self._storage.open_to_read(_NAME)
        except FileNotFoundError:
            return None
        with contextlib.closing(file):
            data = file.read(0, file.size())
        if len(data) < _BASE.size:
            return None
        return _BASE.unpack_from(data)[0], data[_BASE.size :]

    def write(self, base: int, snapshot: bytes) -> None:
        """Have it on disk. If that fails now, `write_again` may do it later."""
        self._unsaved = base, snapshot
        self.write_again()

    def write_again(self) -> None:
        if self._unsaved is None:
            return
        base, snapshot = self._unsaved
        try:
            self._storage.replace(_NAME, _BASE.pack(base) + snapshot)
        except OSError as error:
            self.has_no_room = is_disk_full(error)
            text = "nothing from %d on is given up until what tells repeats is on disk: %s"
            self._not_written.say(text, self.safe_to, error)  # it is tried about every second
        else:
            self.safe_to, self._unsaved, self.has_no_room = base, None, False
            self._not_written.ended()
