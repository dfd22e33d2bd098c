"""Where the progress of a group is kept: a file of entries, begun anew when it has grown.

    ┌─────────────────┬───────────────────────────────┬────────────────────────┬──────
    │ magic, 4 bytes  │ u32 length, u32 check, entry  │ u32 length, u32 check… │
    └─────────────────┴───────────────────────────────┴────────────────────────┴──────

Little endian; a check is the CRC-32 of its entry, begun with the partition's low half. The first
entry says which group it is (`Beginning`), the others what is new (`mesh.durable.progress`), in
MessagePack. An entry that does not read ends the file: it was under way when the machine stopped,
or is damaged; then acknowledgements behind it are lost, and their records delivered again.

Guarantee: what was appended survives the process, what was synced the machine. After a failure the
file is written anew as a whole, before anything else goes in.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from typing import Final
from zlib import crc32

import msgspec

from mesh.durable.group import GroupOptions
from mesh.durable.progress import Progress
from mesh.durable.storage import File, Storage
from mesh.errors import LogDamaged, StorageFailed

logger = logging.getLogger(__name__)

MAGIC: Final = b"MGR1"
_ENTRY: Final = struct.Struct("<II")
_LOW_HALF: Final = 0xFFFFFFFF
_GROWN_BYTES: Final = 1 << 20
"""From here on a file that is four times its snapshot is begun anew."""
_GROWN: Final = 4


class Beginning(msgspec.Struct, frozen=True):
    """Which group that is."""

    name: str
    options: GroupOptions
    start: int
    """Offset of its first record."""
    log_epoch: int
    """Of the log whose records are meant: it may since have lost some, and given their offsets to
    others."""


_encode: Final = msgspec.msgpack.Encoder().encode
_decode_beginning: Final = msgspec.msgpack.Decoder(Beginning).decode
_decode_progress: Final = msgspec.msgpack.Decoder(Progress).decode


class Journal:
    """See above. For one thread."""

    def __init__(self, storage: Storage, file_name: str, partition: int) -> None:
        self._storage = storage
        self._name = file_name
        self._salt = partition & _LOW_HALF
        self._file: File | None = None
        """None: what is there is to be written anew."""
        self._size = 0
        self._snapshot_bytes = 0
        self._unsynced = False
        self.left_out_bytes = 0
        """At its end, when it was read: they do not read."""

    def read(self) -> tuple[Beginning, list[Progress]]:
        """What it holds. Raises `LogDamaged` if not even the beginning reads, `OSError`."""
        with contextlib.closing(self._storage.open_to_read(self._name)) as file:
            data = file.read(0, file.size())
        beginning: Beginning | None = None
        progress: list[Progress] = []
        at = len(MAGIC)
        while data.startswith(MAGIC) and at + _ENTRY.size <= len(data):
            length, check = _ENTRY.unpack_from(data, at)
            entry = data[at + _ENTRY.size : at + _ENTRY.size + length]
            if len(entry) != length or crc32(entry, self._salt) != check:
                break
            try:
                if beginning is None:
                    beginning = _decode_beginning(entry)
                else:
                    progress.append(_decode_progress(entry))
            except msgspec.MsgspecError:
                break
            at += _ENTRY.size + length
        if beginning is None:
            raise LogDamaged(self._name, 0, 0, "it does not say which group it is")
        self.left_out_bytes = len(data) - at
        if self.left_out_bytes:
            text = "%s: %d bytes at its end are left out; what they acknowledged comes again"
            logger.warning(text, self._name, self.left_out_bytes)
        return beginning, progress

    def begin(self, beginning: Beginning, snapshot: Progress) -> None:
        """Write it anew, and have it on disk. Raises `OSError`: then it is as it was, or anew, and
        nothing is appended before this was called again."""
        self.close()
        data = MAGIC + self._entry(_encode(beginning)) + self._entry(_encode(snapshot))
        self._storage.replace(self._name, data)
        self._file = self._storage.open(self._name)
        self._size = self._snapshot_bytes = len(data)
        self._unsynced = False

    def append(self, progress: Progress) -> bool:
        """Write what is new; False if the file is to be begun anew before anything is written, as
        it has grown, or failed."""
        if self._file is None:
            return False
        entry = self._entry(_encode(progress))
        try:
            self._file.append([entry])
        except (OSError, StorageFailed) as error:
            logger.warning("%s: %s", self._name, error)
            self.close()
            return False
        self._size += len(entry)
        self._unsynced = True
        return self._size < max(_GROWN_BYTES, _GROWN * self._snapshot_bytes)

    def sync(self) -> bool:
        """Have on disk what was written; False if it is to be begun anew."""
        if self._file is None:
            return False
        if self._unsynced:
            try:
                self._file.sync()
            except (OSError, StorageFailed) as error:
                logger.warning("%s: %s", self._name, error)
                self.close()
                return False
            self._unsynced = False
        return True

    def remove(self) -> None:
        """The group is gone. Raises `OSError`."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            self._storage.remove(self._name)
        self._storage.sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _entry(self, entry: bytes) -> bytes:
        return _ENTRY.pack(len(entry), crc32(entry, self._salt)) + entry
