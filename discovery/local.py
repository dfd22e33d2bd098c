"""Nodes of this machine find each other by files in the runtime directory.

One file per node, ``<id>.node``, under a lock that its process holds while it lives; beside it the
node's sockets, ``<id>.<label>``. A node that is killed leaves its files behind: whoever finds one
whose lock can be taken removes it, with that node's sockets.

The locks are POSIX locks (`fcntl.lockf`), since a forked child does not inherit them. They have a
trap: a process that closes *any* descriptor of a file loses its locks on it. So nodes of one
process never open each other's files; they know each other by `_OwnFiles`.

Must not know: which nodes are trusted. Who can write here is this user, or a group it chose.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Final

import msgspec

from mesh import limits
from mesh.discovery.plausible import is_node_id, is_plausible
from mesh.discovery.source import Announcement, Sighting
from mesh.errors import InvalidOption, UnsafeRuntimeDir

INTERVAL_S: Final = 2.0
"""Between two looks at the directory. Newcomers dial all they find, so nobody waits for this."""

_SUFFIX: Final = ".node"
_ORPHAN_S: Final = 60.0
"""A socket that is this old has been listened to, if ever it was to be."""
_RUN_USER: Final = Path("/run/user")
_TMP: Final = Path("/tmp")  # noqa: S108 - checked after it was made

_log = logging.getLogger(__name__)
_decoder = msgspec.json.Decoder(Announcement)

_Inode = tuple[int, int]


def runtime_directory() -> Path:
    """The directory where this user's nodes meet, made if need be, and checked.

    ``MESH_RUNTIME_DIR``, else ``/run/user/<uid>/mesh`` where ``/run/user/<uid>`` exists, else
    ``/tmp/mesh-<uid>``: by uid and not by what the session says, so that a shell and a service of
    one user agree. Raises `UnsafeRuntimeDir` where others could enter; `OSError` where it cannot be
    made.
    """
    uid = os.geteuid()
    if given := os.environ.get("MESH_RUNTIME_DIR"):
        directory = Path(os.path.abspath(given))
    elif (_RUN_USER / str(uid)).is_dir():
        directory = _RUN_USER / str(uid) / "mesh"
    else:
        directory = _TMP / f"mesh-{uid}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    check_directory(directory, may_share=bool(given))
    return directory


def check_directory(directory: Path, *, may_share: bool) -> None:
    """Raise `UnsafeRuntimeDir` unless only this user, or with `may_share` its group, can enter."""
    status = os.lstat(directory)
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        problem = "is a symbolic link; name the directory itself"
    elif not stat.S_ISDIR(status.st_mode):
        problem = "is not a directory; remove it"
    elif may_share and mode & 0o777 == 0o770:
        if status.st_gid in {os.getegid(), *os.getgroups()}:
            return
        problem = f"is shared with group {status.st_gid}, which this user is not in; join it"
    elif status.st_uid != os.geteuid():
        problem = f"belongs to user {status.st_uid}, not to {os.geteuid()}; remove it"
    elif mode & 0o777 != 0o700:
        problem = f"has mode {mode:04o}, so that others could reach this node; chmod 700 it"
    else:
        return
    raise UnsafeRuntimeDir(
        f"the runtime directory {directory} {problem}, or set MESH_RUNTIME_DIR to another"
    )


def socket_path(directory: Path, node_id: str, label: str) -> str:
    """Where the socket `label` of a node lies; `LocalSource` removes it once the node is dead.

    Raises `InvalidOption` if Linux has no room for the path.
    """
    path = str(directory / f"{node_id}.{label}")
    if (size := len(os.fsencode(path))) > limits.SOCKET_PATH_BYTES_MAX:
        raise InvalidOption(
            f"socket path of {size:,} bytes over the limit of {limits.SOCKET_PATH_BYTES_MAX}; set "
            f"MESH_RUNTIME_DIR to a shorter one: {path}"
        )
    return path


def share(path: str | int, directory: Path) -> None:
    """Let the group of a shared `directory` use `path` in it; nothing to do in a private one.

    `path` may be a descriptor. A socket that was just bound has what the umask left, and connecting
    takes the right to write. Raises `OSError`.
    """
    status = os.lstat(directory)
    if status.st_mode & 0o070:
        os.chown(path, -1, status.st_gid)
        os.chmod(path, 0o660)


def remove_socket(path: str) -> None:
    """Remove the file of a socket that is closed: libzmq leaves it behind."""
    Path(path).unlink(missing_ok=True)


class _OwnFiles:
    """The files that nodes of this process hold, by inode, however they are reached."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.lock = threading.Lock()
        """Held while a file is put, taken away, or opened to be looked at."""
        self.announcements: dict[_Inode, Announcement] = {}


_own_files = _OwnFiles()
_NOTHING_YET: Final = Announcement("", "", "", ())
"""Of a file that is not in place."""
# The locks stay with the parent, so to a child these files are somebody else's.
os.register_at_fork(after_in_child=_own_files.reset)


class _StrangeFile(Exception):
    """Something in the directory that is none of ours; it is left alone."""


class LocalSource:
    """The source ``local``. `directory` is one that `runtime_directory` returned, or was given."""

    name = "local"

    def __init__(self, directory: Path) -> None:
        self.ignored = 0
        """Files found that nothing could be made of."""
        self._directory = directory
        self._own_id = ""
        self._fd = -1
        self._seen: dict[str, Announcement] = {}
        self._strange: set[str] = set()

    def start(self, own: Announcement) -> None:
        """Put the node's file in place. Raises `UnsafeRuntimeDir` or `OSError`."""
        check_directory(self._directory, may_share=True)
        _remove_orphans(self._directory)
        self._own_id = own.id
        self._fd = _create_file(self._directory, own.id)
        try:
            _put_file(self._fd, self._directory, own)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """-1: the directory is looked at, not watched."""
        return -1

    @property
    def interval_s(self) -> float:
        """Seconds between two looks at the directory."""
        return INTERVAL_S

    def sightings(self) -> list[Sighting]:
        """Look at the directory: what changed since the last call."""
        if self._fd < 0:
            return []
        seen, strange = self._scan()
        changes = [
            Sighting(self.name, announcement, True)
            for node_id, announcement in seen.items()
            if self._seen.get(node_id) != announcement
        ]
        changes += [
            Sighting(self.name, announcement, False)
            for node_id, announcement in self._seen.items()
            if node_id not in seen
        ]
        self._note_strange(strange)
        self._seen = seen
        return changes

    def update(self, own: Announcement) -> None:
        """Replace the node's file. Raises `OSError`, and leaves the old one then."""
        new = _create_file(self._directory, own.id)
        try:
            _put_file(new, self._directory, own)
        except BaseException:
            _give_up(new)
            _fresh(self._directory, own.id).unlink(missing_ok=True)
            raise
        old, self._fd = self._fd, new
        _give_up(old)

    def close(self) -> None:
        """Remove the node's file, also if it was not put in place yet. In a forked child, leave it:
        it is the parent's."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        with _own_files.lock:
            own = _own_files.announcements.get(_inode(os.fstat(fd)))
        fresh = _fresh(self._directory, self._own_id)
        if own is not None:
            Path(self._directory, self._own_id + _SUFFIX).unlink(missing_ok=True)
            fresh.unlink(missing_ok=True)
        # Last, since it gives the lock up: nobody takes the file for a dead node's.
        _give_up(fd)

    def _scan(self) -> tuple[dict[str, Announcement], dict[str, str]]:
        """The nodes that live, by id; and the files that are strange, with the reason."""
        seen: dict[str, Announcement] = {}
        strange: dict[str, str] = {}
        try:
            # Cleaners of /tmp remove what has not been touched for days.
            os.utime(self._fd)
            names = [name for name in os.listdir(self._directory) if name.endswith(_SUFFIX)]
        except OSError as error:
            # Seen before, it may be seen again: a directory that cannot be read withdraws nobody.
            return self._seen, {str(self._directory): str(error)}
        for name in names:
            try:
                if len(seen) >= limits.SIGHTINGS_MAX:
                    raise _StrangeFile(f"one over the limit of {limits.SIGHTINGS_MAX:,} nodes")
                announcement = _look_at(self._directory, name)
            except (_StrangeFile, OSError) as error:
                strange[name] = str(error)
            else:
                if announcement is not None and announcement.id != self._own_id:
                    seen[announcement.id] = announcement
        return seen, strange

    def _note_strange(self, strange: dict[str, str]) -> None:
        """Count and log each file once, for as long as it is there."""
        for name in strange.keys() - self._strange:
            self.ignored += 1
            _log.warning("ignored %s in the runtime directory: %s", name, strange[name])
        self._strange = set(strange)


def _fresh(directory: Path, node_id: str) -> Path:
    """The node's file while it is being written."""
    return directory / f".{node_id}.new"


def _create_file(directory: Path, node_id: str) -> int:
    """The descriptor of a new file, which nobody takes for a node's yet."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    path = _fresh(directory, node_id)
    fd = -1
    try:
        fd = os.open(path, flags, 0o600)
        with _own_files.lock:
            _own_files.announcements[_inode(os.fstat(fd))] = _NOTHING_YET
        return fd
    except BaseException:
        if fd >= 0:
            _give_up(fd)
            path.unlink(missing_ok=True)
        raise


def _put_file(fd: int, directory: Path, own: Announcement) -> None:
    """Fill the new file and put it in the place of the node's, replacing an older one.

    It comes into sight complete and locked, or not at all.
    """
    fresh = _fresh(directory, own.id)
    content = msgspec.json.encode(own)
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    share(fd, directory)
    if (written := os.write(fd, content)) < len(content):
        raise OSError(errno.ENOSPC, f"{written} of {len(content)} bytes written", str(fresh))
    with _own_files.lock:
        _own_files.announcements[_inode(os.fstat(fd))] = own
        os.rename(fresh, directory / (own.id + _SUFFIX))


def _give_up(fd: int) -> None:
    """Close a file of this process, and its lock with that."""
    with _own_files.lock:
        _own_files.announcements.pop(_inode(os.fstat(fd)), None)
        os.close(fd)


def _look_at(directory: Path, name: str) -> Announcement | None:
    """The announcement in a node's file; None if it is gone, or was a dead node's and is now.

    Raises `_StrangeFile` or `OSError` for what is no node's file.
    """
    path = directory / name
    with _own_files.lock:
        try:
            status = os.lstat(path)
            if own := _own_files.announcements.get(_inode(status)):
                return own
            if not stat.S_ISREG(status.st_mode):
                raise _StrangeFile("not a regular file")
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        try:
            announcement = _read(fd, name)
            return announcement if _is_held(fd) else _bury(directory, announcement, fd)
        finally:
            os.close(fd)


def _read(fd: int, name: str) -> Announcement:
    content = os.read(fd, limits.ANNOUNCEMENT_BYTES_MAX + 1)
    if len(content) > limits.ANNOUNCEMENT_BYTES_MAX:
        raise _StrangeFile(f"over the limit of {limits.ANNOUNCEMENT_BYTES_MAX:,} bytes")
    try:
        announcement = _decoder.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _StrangeFile(f"not an announcement: {error}") from error
    if not is_plausible(announcement) or name != announcement.id + _SUFFIX:
        raise _StrangeFile("not an announcement: a part is malformed, or it is another node's")
    return announcement


def _is_held(fd: int) -> bool:
    """Whether another process holds the file's lock; if not, it is held here from now on."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    return False


def _bury(directory: Path, dead: Announcement, fd: int) -> Announcement | None:
    """Remove a dead node's files, whose lock is held on `fd`.

    Returns `dead` if it lives after all: it replaced its file, and gave up the lock on the old one,
    between our opening and our locking it.
    """
    path = directory / (dead.id + _SUFFIX)
    try:
        if _inode(os.lstat(path)) != _inode(os.fstat(fd)):
            return dead
    except FileNotFoundError:
        return None
    for name in os.listdir(directory):
        if name.startswith(f"{dead.id}.") and stat.S_ISSOCK(os.lstat(directory / name).st_mode):
            os.unlink(directory / name)
    # Last, so that whoever is killed here leaves it to the next.
    os.unlink(path)
    _log.info("node %s (%r) died; its files are removed", dead.id, dead.name)
    return None


def _remove_orphans(directory: Path) -> None:
    """Remove sockets that nobody listens to and whose node has no file here: it did not use this
    source, or was killed while it closed. Asked of the kernel, by connecting: the others do not
    hear more of it than of anybody who connects and leaves."""
    names = os.listdir(directory)
    with_file = {name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)}
    for name in names:
        node_id, _, label = name.partition(".")
        if label and is_node_id(node_id) and node_id not in with_file:
            with contextlib.suppress(OSError):  # somebody else was faster, or may not be asked
                if _is_orphan(directory / name):
                    os.unlink(directory / name)


def _is_orphan(path: Path) -> bool:
    status = os.lstat(path)
    if not stat.S_ISSOCK(status.st_mode) or time.time() - status.st_mtime < _ORPHAN_S:
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED


def _inode(status: os.stat_result) -> _Inode:
    return status.st_dev, status.st_ino
