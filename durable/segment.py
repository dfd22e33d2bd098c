"""One file of a log: its name, its head, its index.

Which segments a log has, and what is appended to them, is the log's business (`mesh.durable.log`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from typing import Final

from mesh.durable import index as indexes
from mesh.durable.batch import FORMAT, HEAD_BYTES, Head, decode_head, encode_head
from mesh.durable.index import Index
from mesh.durable.scan import Walk
from mesh.durable.storage import File, Storage
from mesh.errors import LogDamaged, LogFormat

_NAME: Final = re.compile(r"(\d{20})\.log")


def name_of(base: int) -> str:
    """Of the segment that begins with that offset: names sort as segments follow each other."""
    return f"{base:020d}.log"


def bases(names: Iterable[str]) -> list[int]:
    """Of the segments among those files, the first first."""
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)


class Segment:
    """One that is there, as its log and all who read it share it."""

    __slots__ = ("_index", "base", "partition", "size")

    def __init__(self, partition: int, base: int, size: int, index: Index | None = None) -> None:
        self.partition = partition
        self.base = base
        """Offset of its first record."""
        self.size = size
        """Bytes. Of the last segment of a log more than may be read yet."""
        self._index = index

    @property
    def name(self) -> str:
        return name_of(self.base)

    @property
    def index_name(self) -> str:
        return f"{self.base:020d}.index"

    def index(self, storage: Storage) -> Index:
        """Read from its file, or else made by reading the segment. Raises `LogDamaged`."""
        if self._index is None:
            self._index = self._stored_index(storage) or self.remade(storage)
        return self._index

    def _stored_index(self, storage: Storage) -> Index | None:
        with (
            contextlib.suppress(OSError),  # it is missing, or does not read
            contextlib.closing(storage.open_to_read(self.index_name)) as file,
        ):
            return indexes.decode(file.read(0, file.size()), self.base, self.size)
        return None

    def remade(self, storage: Storage) -> Index:
        """Its index, made by reading it. Raises `LogDamaged`."""
        index = Index(self.base, HEAD_BYTES)
        with contextlib.closing(storage.open_to_read(self.name)) as file:
            walk = self.walk(file, HEAD_BYTES, self.base)
            for found in walk:
                index.note(found.header)
        self.check(walk)
        self._index = index
        return index

    def store_index(self, storage: Storage) -> None:
        """It will not be appended to any more."""
        if self._index is not None:
            storage.replace(self.index_name, self._index.encode())

    def remove(self, storage: Storage) -> None:
        """What belongs to it before it. Raises `OSError`."""
        self.remove_beside(storage)
        with contextlib.suppress(FileNotFoundError):  # it went the last time, which was interrupted
            storage.remove(self.name)

    def remove_beside(self, storage: Storage) -> None:
        """What belongs to it. Raises `OSError`."""
        for name in storage.names():
            if name.startswith(f"{self.name}.") or name == self.index_name:
                storage.remove(name)

    def walk(
        self, file: File, position: int, offset: int, time_ns: int = 0, *, end: int | None = None
    ) -> Walk:
        """Over the batches from there on, up to the end of what is in use, or to `end`."""
        return Walk(
            file.read,
            self.size if end is None else end,
            position=position,
            offset=offset,
            time_ns=time_ns,
            partition=self.partition,
        )

    def check(self, walk: Walk) -> None:
        """Raise `LogDamaged` if `walk` did not reach the end."""
        if walk.fault:
            raise LogDamaged(self.name, walk.position, walk.offset, walk.fault)


def begin(storage: Storage, head: Head) -> File:
    """Make the file of a new segment, and have its head on disk. Raises `OSError`: then there may
    be such a file or not, now and after a crash."""
    file = storage.create(name_of(head.offset))
    try:
        file.append([encode_head(head)])
        file.sync()
        storage.sync()
    except BaseException:
        file.close()
        raise
    return file


def read_head(file: File, name: str, partition: int) -> Head | None:
    """The head of that segment; None if it is damaged or incomplete. Raises `LogFormat` for one of
    another version, and `LogDamaged` for one that belongs elsewhere."""
    head = decode_head(file.read(0, HEAD_BYTES))
    if head is None:
        return None
    if head.format != FORMAT:
        raise LogFormat(f"{name} has format {head.format}; this version reads format {FORMAT}")
    if head.partition != partition or name_of(head.offset) != name:
        text = f"it is {name_of(head.offset)} of partition {head.partition:016x}"
        raise LogDamaged(name, 0, head.offset, text)
    return head
