"""A disk in memory that does what real ones may: lose what was not synced, tear it, fail.

A `FakeDisk` is one directory, as `mesh.durable.storage.Disk` is. What a file *shows* is the page
cache; what is *stored* is the platter as the next successful sync would leave it; what is *synced*
is on the platter for sure. What lies between the last two is a list of writes, of which a crash
keeps some.

After power loss (`crash`):

- a file that was not synced has its old content, its new content, that of any moment between, with
  the last write cut short, or with any of the 512-byte sectors that changed as they were before
  (zeros beyond the old end);
- each name made, renamed or removed since the directory was synced is as it was before, as it is
  now, or as at any moment between, whatever became of the others: what was renamed may have both
  names or none, but the one it took is never without a file that it had before;
- what was synced is there.

After SIGKILL (`kill`) the page cache is there, and what was not synced is still to be lost.

Every operation that changes something is counted, so that a test can stop the process at each one
in turn::

    for stop_at in itertools.count(1):
        disk = FakeDisk(seed)
        disk.faults.stop_at = stop_at
        try:
            work(disk)
        except Stopped:
            recovered(disk.crash(random))
        else:
            break

All luck is drawn from seeded generators: the same seed and the same calls give the same disk. The
real thing is in `tests.support.faults`.
"""

from __future__ import annotations

import errno
import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from copy import deepcopy
from random import Random
from typing import Final, Literal, Self

from mesh.durable.storage import Bytes, Poison, check_name, fresh_name
from mesh.errors import LogLocked

SECTOR_BYTES = 512

Operation = Literal[
    "create", "append", "reserve", "sync", "truncate", "rename", "remove", "folder", "names"
]
"""``sync`` is a file's, ``names`` a directory's; a `replace` is create, append, sync, rename and
names, and so is a new `folder` folder and names."""


class Stopped(BaseException):
    """The process is dead: no cleaning up after this has any effect."""


class Faults:
    """What a disk, and the process that uses it, has before it."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.done: Counter[str] = Counter()
        """How often each operation was begun."""
        self.stop_at = 0
        """The process dies in the middle of its operation with this number, from 1; 0: never. Part
        of the operation may have happened."""
        self.room_bytes: int | None = None
        """How much more can be appended: then ENOSPC, behind what there was room for."""
        self._failing: dict[tuple[Operation, int], int] = {}
        self._stopped = False

    def fail(self, operation: Operation, nth: int = 1, code: int = errno.EIO) -> None:
        """Let the `nth` of these fail, counted from here."""
        self._failing[operation, self.done[operation] + nth] = code

    @property
    def stopped(self) -> bool:
        """Whether the process is dead."""
        return self._stopped

    def mend(self) -> None:
        """Nothing fails any more; but for what there is no room for."""
        self._failing.clear()

    @property
    def are_due(self) -> bool:
        """Whether something is to fail, or for want of room may."""
        return bool(self._failing) or self.room_bytes is not None

    def alive(self) -> None:
        if self._stopped:
            raise Stopped

    def begin(self, operation: Operation) -> OSError | Stopped | None:
        """Count it. What it ends in, if not well; the caller does a part of it, and raises that."""
        self.alive()
        self.done[operation] += 1
        if self.done.total() == self.stop_at:
            self._stopped = True
            return Stopped()
        code = self._failing.pop((operation, self.done[operation]), 0)
        return OSError(code, os.strerror(code)) if code else None

    def step(self, operation: Operation, change: Callable[[], object]) -> None:
        """An operation that happens whole or not at all."""
        end = self.begin(operation)
        if end is None or (isinstance(end, Stopped) and self.random.random() < 0.5):
            change()
        if end is not None:
            raise end


class Content:
    """What a file holds. Its names are the directory's."""

    def __init__(self, synced: bytes = b"") -> None:
        self.shown = bytearray(synced)
        self.stored = bytearray(synced)
        self.synced = synced
        self._writes: list[tuple[int, bytes | None]] = []
        """Since then: where, and what; None cuts off there."""

    def write(self, at: int, data: bytes | None) -> None:
        for layer in (self.shown, self.stored):
            _write(layer, at, data)
        self._writes.append((at, data))

    def sync(self) -> None:
        self.synced = bytes(self.stored)
        self._writes.clear()

    def lose(self, random: Random) -> None:
        """A sync failed: what was to be written counts as written, and is nowhere but perhaps in
        memory. Linux marks the pages as clean, and keeps them until it needs the room."""
        size = len(self.stored)
        self.stored[:] = self.synced[:size].ljust(size, b"\0")
        self._writes.clear()
        if random.random() < 0.5:
            self.shown[:] = self.stored

    def after_crash(self, random: Random) -> Content:
        if not self._writes:
            return Content(self.synced)
        fate = random.choice(("lost", "kept", "cut", "torn"))
        if fate == "lost":
            return Content(self.synced)
        if fate == "kept":
            return Content(bytes(self.stored))
        count = random.randint(1, len(self._writes))
        *before, (at, data) = self._writes[:count]
        found = bytearray(self.synced)
        for write in before:
            _write(found, *write)
        if data is not None and fate == "cut":
            data = data[: random.randint(0, len(data))]
        _write(found, at, data)
        if fate == "torn":
            old = self.synced[: len(found)].ljust(len(found), b"\0")
            for at in range(0, len(found), SECTOR_BYTES):
                if random.random() < 0.5:
                    found[at : at + SECTOR_BYTES] = old[at : at + SECTOR_BYTES]
        return Content(bytes(found))


def _write(layer: bytearray, at: int, data: bytes | None) -> None:
    if data is None:
        del layer[at:]
    else:
        layer[:] = layer.ljust(at, b"\0")  # what was before it may be lost
        layer[at : at + len(data)] = data


class Directory:
    """Names, and what they stand for."""

    def __init__(self) -> None:
        self.entries: dict[str, Content | Directory] = {}
        self.history: dict[str, list[Content | Directory | None]] = {}
        """What each name that changed since the last sync stood for before; None for nothing."""
        self.locked = False

    def put(self, name: str, entry: Content | Directory | None) -> None:
        self.history.setdefault(name, []).append(self.entries.get(name))
        if entry is None:
            del self.entries[name]
        else:
            self.entries[name] = entry

    def rename(self, name: str, other: str) -> None:
        entry = self.entries[name]
        self.put(name, None)
        self.put(other, entry)

    def unlocked(self) -> None:
        self.locked = False
        for entry in self.entries.values():
            if isinstance(entry, Directory):
                entry.unlocked()

    def after_crash(
        self, random: Random, found: dict[int, Content | Directory] | None = None
    ) -> Directory:
        """`found`: what each file and directory has become, since it may have two names."""
        found = {} if found is None else found
        survivor = Directory()
        entries: dict[str, Content | Directory | None] = {**self.entries}
        fate = random.choice(("before", "now", "any"))
        for name, before in self.history.items():
            versions = [*before, self.entries.get(name)]
            entries[name] = {
                "before": versions[0],
                "now": versions[-1],
                "any": random.choice(versions),
            }[fate]
        for name in sorted(entries):
            entry = entries[name]
            if entry is not None and id(entry) not in found:
                found[id(entry)] = (
                    entry.after_crash(random)
                    if isinstance(entry, Content)
                    else entry.after_crash(random, found)
                )
            if entry is not None:
                survivor.entries[name] = found[id(entry)]
        return survivor


class FakeFile:
    """A `File` of a `FakeDisk`."""

    def __init__(self, content: Content, name: str, faults: Faults, *, writable: bool) -> None:
        self._content = content
        self._faults = faults
        self._writable = writable
        self._poison = Poison(name)
        self._open = True
        self._end = len(content.shown)

    def size(self) -> int:
        self._check(True)
        return len(self._content.shown)

    def append(self, parts: Sequence[Bytes]) -> None:
        self._faults.alive()
        with self._poison:
            self._check(self._writable)
            faults, content = self._faults, self._content
            data = b"".join(parts)
            if not data:
                return
            end = faults.begin("append")
            fits = len(data)
            if end is not None:
                fits = faults.random.randint(0, fits)
            elif faults.room_bytes is not None and faults.room_bytes < fits:
                end, fits = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), faults.room_bytes
            if faults.room_bytes is not None:
                faults.room_bytes -= min(fits, faults.room_bytes)
            content.write(self._end, data[:fits])
            self._end += fits
            if end is not None:
                raise end

    def reserve(self, size: int) -> None:
        self._check(self._writable)
        content, faults = self._content, self._faults
        more = size - len(content.shown)
        if more <= 0:
            return
        if faults.room_bytes is not None and faults.room_bytes < more:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        zeros = bytes(more)
        faults.step("reserve", lambda: content.write(len(content.shown), zeros))

    def read(self, at: int, length: int) -> bytes:
        self._check(True)
        return bytes(self._content.shown[at : at + length])

    def sync(self) -> None:
        self._faults.alive()
        with self._poison:
            self._check(True)
            end = self._faults.begin("sync")
            if end is None:
                self._content.sync()
            elif isinstance(end, OSError):
                self._content.lose(self._faults.random)
            if end is not None:
                raise end

    def truncate(self, size: int) -> None:
        self._faults.alive()
        with self._poison:
            self._check(self._writable)
            assert size <= len(self._content.shown), "a real file would grow, and hold zeros there"
            self._faults.step("truncate", lambda: self._content.write(size, None))
            self._end = size

    def forget(self) -> None:
        self._check(True)
        self._content.shown[:] = self._content.stored

    def close(self) -> None:
        self._open = False

    def _check(self, allowed: bool) -> None:
        self._faults.alive()
        if not (self._open and allowed):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))


class FakeDisk:
    """One directory in memory, with the `Faults` that it shares with those inside it."""

    def __init__(
        self, seed: int = 0, *, directory: Directory | None = None, faults: Faults | None = None
    ) -> None:
        self.faults = Faults(seed) if faults is None else faults
        self._directory = Directory() if directory is None else directory
        self._locked_here = False
        if faults is None:
            MADE.append(self)

    @property
    def operations(self) -> int:
        """How many were begun: what `Faults.stop_at` counts."""
        return self.faults.done.total()

    def again(self) -> Self:
        """The same directory, opened once more."""
        return type(self)(directory=self._directory, faults=self.faults)

    def crash(self, random: Random) -> Self:
        """The disk as it may be found after the power failed now. This one stays as it is."""
        return type(self)(random.getrandbits(32), directory=self._directory.after_crash(random))

    def kill(self) -> Self:
        """The disk as it is found after SIGKILL now. This one stays as it is."""
        directory = deepcopy(self._directory)
        directory.unlocked()
        return type(self)(self.faults.random.getrandbits(32), directory=directory)

    def names(self) -> list[str]:
        self.faults.alive()
        return sorted(name for name in self._directory.entries if not name.startswith("."))

    def create(self, name: str) -> FakeFile:
        return self._create(check_name(name))

    def open(self, name: str) -> FakeFile:
        return self._open(name, writable=True)

    def open_to_read(self, name: str) -> FakeFile:
        return self._open(name, writable=False)

    def replace(self, name: str, data: bytes) -> None:
        fresh = fresh_name(check_name(name))
        if fresh in self._directory.entries:
            self.faults.step("remove", lambda: self._directory.put(fresh, None))
        try:
            file = self._create(fresh)
            file.append([data])
            file.sync()
            self.faults.step("rename", lambda: self._directory.rename(fresh, name))
        except OSError:
            if fresh in self._directory.entries:
                self._directory.put(fresh, None)
            raise
        self.sync()

    def remove(self, name: str) -> None:
        self._find(name)
        self.faults.step("remove", lambda: self._directory.put(name, None))

    def sync(self) -> None:
        self.faults.step("names", self._directory.history.clear)

    def folder(self, name: str) -> FakeDisk:
        check_name(name)
        self.faults.alive()
        entry = self._directory.entries.get(name)
        if entry is None:
            entry = Directory()
            made = entry
            self.faults.step("folder", lambda: self._directory.put(name, made))
        if not isinstance(entry, Directory):
            raise _os_error(errno.EEXIST, name)
        self.sync()
        return FakeDisk(directory=entry, faults=self.faults)

    def lock(self) -> None:
        self.faults.alive()
        if self._directory.locked:
            raise LogLocked(f"a directory in memory is in use by process {os.getpid()}")
        self._directory.locked = self._locked_here = True

    def close(self) -> None:
        if self._locked_here:
            self._directory.locked = self._locked_here = False

    def _create(self, name: str) -> FakeFile:
        self.faults.alive()
        if name in self._directory.entries:
            raise _os_error(errno.EEXIST, name)
        content = Content()
        self.faults.step("create", lambda: self._directory.put(name, content))
        return FakeFile(content, name, self.faults, writable=True)

    def _open(self, name: str, *, writable: bool) -> FakeFile:
        return FakeFile(self._find(name), name, self.faults, writable=writable)

    def _find(self, name: str) -> Content:
        check_name(name)
        self.faults.alive()
        entry = self._directory.entries.get(name)
        if entry is None:
            raise _os_error(errno.ENOENT, name)
        if isinstance(entry, Directory):
            raise _os_error(errno.EISDIR, name)
        return entry


MADE: Final[deque[FakeDisk]] = deque(maxlen=16)
"""The latest, which are looked at when a test is over (`tests.support.integrity`)."""


def _os_error(code: int, name: str) -> OSError:
    return OSError(code, os.strerror(code), name)
