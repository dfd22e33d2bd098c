"""Where the log meets the disk: the only module of `mesh.durable` that touches files.

`Storage` is one directory and `File` a file in it, as little of both as a log needs, so that it can
be tested on a disk in memory that fails on demand. `Disk` is the real one.

What is promised, and what is not::

    append    in the kernel's memory: it survives this process, not the machine
    reserve   room on the disk; after a crash there are zeros, or there is nothing
    sync      of a file: what was appended survives the machine, if its name does
    sync      of a directory: so do the names that were made and removed in it
    replace   all of it: after a crash the old data or the new, whole; when it returns, the new

After a failed append, truncate or sync a file is *poisoned*: it can be read, and is never written
again. The kernel may have thrown away what it could not write, and would report the next fsync as a
success (PostgreSQL's "fsyncgate" of 2018). What is on the disk then can only be found out from a
file that is opened anew.

Must not know: what is in the files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

from mesh.errors import InvalidName, LogLocked, StorageFailed

Bytes = bytes | memoryview
"""A view has bytes for its items."""

_IOV_MAX: Final = os.sysconf("SC_IOV_MAX")
"""How many parts one `pwritev` takes: 1024 on Linux."""
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LOCK: Final = ".lock"
_FLAGS: Final = os.O_NOFOLLOW | os.O_NONBLOCK
"""Of every file, besides O_CLOEXEC, which Python gives them all. Opening a named pipe would wait
without O_NONBLOCK; a file never does."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether it says that there is no room: on the disk, in the quota, or in a file that is as
    large as files may be."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


class File(Protocol):
    """One file. One thread writes; any thread may read meanwhile, until it is closed."""

    def size(self) -> int:
        """Bytes, the unsynced ones included. Raises `OSError`."""

    def append(self, parts: Sequence[Bytes]) -> None:
        """Write all parts at the end, one behind the other: that is where the file ended when it
        was opened or truncated, and what was appended since. Raises `OSError`, and then a part of
        them may be there; `StorageFailed` if the file is poisoned."""

    def reserve(self, size: int) -> None:
        """Have the file be that long, with zeros behind what was appended: a sync of what is
        appended there has less to write, as the file's length stays what it is. Raises `OSError`
        if there is no room, or it cannot be done here; the file is no worse then."""

    def read(self, at: int, length: int) -> bytes:
        """That many bytes from there; fewer only at the end of the file. Raises `OSError`."""

    def sync(self) -> None:
        """Have on the disk what was appended; blocks. Raises `OSError`, `StorageFailed`."""

    def truncate(self, size: int) -> None:
        """Cut off what is beyond `size`. Unsynced, it may be back after a crash. Raises `OSError`,
        `StorageFailed`."""

    def forget(self) -> None:
        """Read from the disk from now on, and no more from memory, but for what was not synced:
        after a failed sync memory may have what the disk has not. Raises `OSError`."""

    def close(self) -> None:
        """Let go of it, which syncs nothing. May be repeated."""


class Storage(Protocol):
    """One directory. Names have no slash; those that begin with a dot are its own.

    Every method may raise `OSError`, and `InvalidName` where it takes a name. Threads may share it
    as long as no two of them make, replace or remove the same name.
    """

    def names(self) -> list[str]:
        """Of the files and folders in it, sorted."""

    def create(self, name: str) -> File:
        """A new, empty file. Raises `FileExistsError`."""

    def open(self, name: str) -> File:
        """To read and append. Raises `FileNotFoundError`."""

    def open_to_read(self, name: str) -> File:
        """Likewise, but writing raises `OSError`."""

    def replace(self, name: str, data: bytes) -> None:
        """Make `name` hold `data`, and be on the disk. After an error it holds the old or the new,
        whole. Who has the old file open, goes on reading that."""

    def remove(self, name: str) -> None:
        """A file. Who has it open, goes on reading. Raises `FileNotFoundError`."""

    def sync(self) -> None:
        """Have on the disk what was created and removed; blocks."""

    def folder(self, name: str) -> Storage:
        """A directory inside this one, made if it is missing, and on the disk."""

    def lock(self) -> None:
        """Keep other openings of this directory out, in this process and others, until `close` or
        the end of this process. Raises `LogLocked`."""

    def close(self) -> None:
        """Give up the lock, if it is held. May be repeated."""


def check_name(name: str) -> str:
    """Raise `InvalidName` unless it names something inside a directory."""
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise InvalidName(f"{name!r} names no file: it is empty, or has a dot first, '/' or NUL")
    return name


def fresh_name(name: str) -> str:
    """Of what is to take the place of `name`, while it is written."""
    return f".{name}.new"


class Poison:
    """The first failure of a file, which is written inside ``with poison:`` only."""

    __slots__ = ("_first", "_name")

    def __init__(self, name: str) -> None:
        self._name = name
        self._first = ""

    def __enter__(self) -> None:
        if self._first:
            raise StorageFailed(f"{self._name} is not written any more, after {self._first}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # Not only an OSError: a Ctrl-C in the middle leaves as little known of what was written.
        if error is not None:
            self._first = f"{type(error).__name__}: {error}"


class DiskFile:
    """A `File` of a `Disk`."""

    def __init__(self, path: Path, flags: int) -> None:
        self._poison = Poison(str(path))
        self._fd = os.open(path, flags | _FLAGS, 0o600)
        try:
            found = os.fstat(self._fd)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            self._end = found.st_size
            """Where to append."""
        except BaseException:
            self.close()
            raise

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def append(self, parts: Sequence[Bytes]) -> None:
        with self._poison:
            for first in range(0, len(parts), _IOV_MAX):
                self._write(parts[first : first + _IOV_MAX])

    def _write(self, parts: Sequence[Bytes]) -> None:
        written = os.pwritev(self._fd, parts, self._end)
        self._end += written
        if written == sum(map(len, parts)):
            return
        rest = memoryview(b"".join(parts))[written:]
        while rest:
            written = os.pwritev(self._fd, [rest], self._end)
            if not written:
                raise OSError(errno.EIO, "nothing was written, without an error")
            self._end += written
            rest = rest[written:]

    def reserve(self, size: int) -> None:
        if size > self._end:
            os.posix_fallocate(self._fd, self._end, size - self._end)

    def read(self, at: int, length: int) -> bytes:
        data = os.pread(self._fd, length, at)
        while 0 < len(data) < length and (
            more := os.pread(self._fd, length - len(data), at + len(data))
        ):
            data += more
        return data

    def sync(self) -> None:
        with self._poison:
            os.fdatasync(self._fd)

    def truncate(self, size: int) -> None:
        with self._poison:
            os.ftruncate(self._fd, size)
            self._end = size

    def forget(self) -> None:
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Disk:
    """A real directory, made if it is missing, and on the disk then. Its parent has to be there.

    Directories are made with mode 0700 and files with 0600; one that is there is taken as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: _Lock | None = None
        _have(path, 0o700)

    def names(self) -> list[str]:
        return sorted(name for name in os.listdir(self.path) if not name.startswith("."))

    def create(self, name: str) -> File:
        return self._create(check_name(name))

    def open(self, name: str) -> File:
        return DiskFile(self.path / check_name(name), os.O_RDWR)

    def open_to_read(self, name: str) -> File:
        return DiskFile(self.path / check_name(name), os.O_RDONLY)

    def replace(self, name: str, data: bytes) -> None:
        path, fresh = self.path / check_name(name), fresh_name(name)
        (self.path / fresh).unlink(missing_ok=True)  # of one that was killed
        try:
            with contextlib.closing(self._create(fresh)) as file:
                file.append([data])
                file.sync()
            os.rename(self.path / fresh, path)
        except BaseException:
            with contextlib.suppress(OSError):
                (self.path / fresh).unlink()
            raise
        self.sync()

    def remove(self, name: str) -> None:
        os.unlink(self.path / check_name(name))

    def sync(self) -> None:
        _sync_directory(self.path)

    def folder(self, name: str) -> Storage:
        return Disk(self.path / check_name(name))

    def lock(self) -> None:
        self._lock = _Lock(self.path / _LOCK)

    def close(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def _create(self, name: str) -> File:
        return DiskFile(self.path / name, os.O_RDWR | os.O_CREAT | os.O_EXCL)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _Held:
    """The lock files that this process holds, by device and inode.

    The kernel gives a process every POSIX lock that it holds itself, and takes them all away when
    it closes *any* descriptor of the file: so a file that is held is never opened a second time.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.mutex = threading.Lock()
        self.files: set[tuple[int, int]] = set()


_held: Final = _Held()
# The locks stay with the parent.
os.register_at_fork(after_in_child=_held.reset)


class _Lock:
    """A lock that the kernel gives up with the process, and that a forked child does not have."""

    def __init__(self, path: Path) -> None:
        with _held.mutex:
            with contextlib.suppress(FileNotFoundError):
                if _file_id(os.lstat(path)) in _held.files:
                    raise LogLocked(_locked(path, str(os.getpid())))
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
            try:
                self._take(path)
            except BaseException:
                os.close(self._fd)
                raise

    def _take(self, path: Path) -> None:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip()
            raise LogLocked(_locked(path, holder or "unknown")) from None
        text = f"{os.getpid()}\n".encode()
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))
        self._id = _file_id(os.fstat(self._fd))
        _held.files.add(self._id)

    def release(self) -> None:
        with _held.mutex:
            _held.files.discard(self._id)
            os.close(self._fd)


def _locked(path: Path, holder: str) -> str:
    return f"{path.parent} is in use by process {holder}"


def _file_id(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def directory_of(path: str | Path) -> Disk:
    """That directory, for its owner alone; it and those that it is in are made if they are missing,
    each on the disk before the next is made. Raises `OSError`."""
    directory = Path(path)
    missing = [directory]
    while not (missing[-1].exists() or missing[-1].parent.is_file()):
        missing.append(missing[-1].parent)
    for each in reversed(missing[1:]):
        _have(each, 0o777)
    return Disk(directory)


def _have(directory: Path, mode: int) -> None:
    """Make it if it is missing, and have it on the disk. Raises `OSError`."""
    made = False
    try:
        os.mkdir(directory, mode)
        made = True
    except FileExistsError:
        if not directory.is_dir():
            raise
    try:  # also if it was there: whoever made it may have been killed before this
        _sync_directory(directory.parent)
    except PermissionError:
        if made:
            raise
