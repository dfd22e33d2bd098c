"""Disks that fail and processes that are killed, for real: what `tests.support.fake_disk` models.

Each is a context manager or a function, and skips the test by name where root, a tool or the kernel
does not allow it. File systems are mounted below the directory that is given, which is a test's
`tmp_path`, and unmounted at the end whatever happens. Mark such tests as slow::

    with loop_disk(tmp_path) as disk:             a file system of its own, at disk.path
        ...
        disk.cut_power()                          from here on everything fails with EIO
        file.close()                              what is open keeps it from being unmounted
        disk.restore_power()                      what is there now had been on the disk

    with small_disk(tmp_path, 1 << 20) as path:   a tmpfs of 1 MiB
        with filled(path, room_bytes=4096): ...   of which a page is left

    with thin_disk(tmp_path) as disk:             has less room than it says,
        with filled(disk.image.parent): ...       and tells at the sync

    with limited(resource.RLIMIT_FSIZE, 1000):    `ulimit -f`, for this process

    run = traced(PROGRAM, path, inject=kill_at("fdatasync", 3))
    assert run.status == -signal.SIGKILL
    assert run.calls["fdatasync"] == 3
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple
from unittest.mock import patch

import pytest

DEADLINE_S: Final = 30.0

JOURNAL_LOST: Final = 2
"""For `LoopDisk.cut_power`: only what was synced is on the disk."""
JOURNAL_KEPT: Final = 1
"""The journal is, too, as if its time had come just before: names and sizes that were not synced,
without the data. A file that was appended to has zeros there."""

_EXT4_IOC_SHUTDOWN: Final = 0x8004587D
_PATH: Final = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def need(*tools: str, root: bool = False) -> None:
    """Skip the test unless these are installed and, if need be, it runs as root."""
    if root and os.geteuid() != 0:
        pytest.skip("file systems may not be mounted here (it takes root)")
    for tool in tools:
        if shutil.which(tool, path=_PATH) is None:
            pytest.skip(f"{tool} is not installed")


# -- Disks -------------------------------------------------------------------------------------


class LoopDisk:
    """An ext4 file system in a file."""

    def __init__(self, image: Path, path: Path) -> None:
        self.image = image
        self.path = path
        """Where it is mounted."""

    def cut_power(self, flag: int = JOURNAL_LOST) -> None:
        """Nothing gets to the disk any more, not even by unmounting."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("I", flag))
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
                pytest.skip("this kernel's ext4 cannot be shut down")
            raise
        finally:
            os.close(fd)

    def restore_power(self) -> None:
        """Mount it anew. What was open in it has to be closed."""
        assert not (problem := _unmount(self.path)), f"{problem}; is a file open in it?"
        assert not (problem := self.mount()), problem

    def mount(self) -> str:
        """Returns what is wrong, if anything."""
        # Or the journal is written every 5 s, and with it perhaps what nobody synced.
        return _mount(self.path, "-t", "ext4", "-o", "loop,commit=3600", self.image)


@contextlib.contextmanager
def loop_disk(directory: Path, size_bytes: int = 16 << 20) -> Iterator[LoopDisk]:
    """A disk whose power can be cut."""
    need("mkfs.ext4", "mount", "umount", root=True)
    disk = LoopDisk(directory / "disk.image", directory / "disk")
    with disk.image.open("xb") as image:
        image.truncate(size_bytes)
    made = _run("mkfs.ext4", "-q", "-F", "-m", "0", disk.image)
    assert not made.returncode, made.stderr
    if problem := disk.mount():
        pytest.skip(f"no file can be mounted here: {problem}")
    try:
        yield disk
    finally:
        _unmount(disk.path, at_last=True)


@contextlib.contextmanager
def small_disk(directory: Path, size_bytes: int) -> Iterator[Path]:
    """A tmpfs of that size, rounded up to pages."""
    need("mount", "umount", root=True)
    path = directory / "small"
    if problem := _mount(path, "-t", "tmpfs", "-o", f"size={size_bytes}", "none"):
        pytest.skip(f"no tmpfs can be mounted here: {problem}")
    try:
        yield path
    finally:
        _unmount(path, at_last=True)


@contextlib.contextmanager
def thin_disk(directory: Path) -> Iterator[LoopDisk]:
    """A disk of 32 MiB in a tmpfs of 6 MiB. Where that is full, an append is taken; the sync fails;
    and a later one succeeds, though the data is gone."""
    with small_disk(directory, 6 << 20) as tmpfs, loop_disk(tmpfs, 32 << 20) as disk:
        yield disk


@contextlib.contextmanager
def filled(path: Path, room_bytes: int = 0) -> Iterator[None]:
    """Fill the file system that has this directory, but for `room_bytes`, rounded up to blocks.
    There is room again at the end."""
    ballast = path / ".ballast"
    block = os.statvfs(path).f_bsize
    try:
        with ballast.open("xb", buffering=0) as file:
            for size in (1 << 20, block):
                with contextlib.suppress(OSError):
                    while file.write(b"b" * size):
                        pass
            os.fsync(file)
            file.truncate(file.tell() - -(-room_bytes // block) * block)
            os.fsync(file)  # ext4 gives blocks up when the journal is written
        yield
    finally:
        ballast.unlink(missing_ok=True)


def _mount(where: Path, *options: str | Path) -> str:
    where.mkdir(exist_ok=True)
    return _problem("mount", *options, where)


def _unmount(where: Path, *, at_last: bool = False) -> str:
    """`at_last`: if a failed test left a file open in it, once that is closed."""
    problem = _problem("umount", where)
    return _problem("umount", "--lazy", where) if problem and at_last else problem


def _problem(tool: str, *arguments: str | Path) -> str:
    """What it says if it fails; what it says otherwise is only advice."""
    run = _run(tool, *arguments)
    return run.stderr.partition("\n")[0] or tool if run.returncode else ""


def _run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [shutil.which(tool, path=_PATH) or tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)


# -- Calls -------------------------------------------------------------------------------------

CHANGING: Final = (
    "mkdir",
    "pwritev",
    "posix_fallocate",
    "fdatasync",
    "fsync",
    "rename",
    "unlink",
    "ftruncate",
)
"""Of `os`: what this process changes something on a disk with."""


@contextlib.contextmanager
def before_each_call(action: Callable[[], object], *more: str) -> Iterator[None]:
    """Do that before this process changes something on a disk, or calls any of `more` of `os`."""

    def preceded(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            action()
            return function(*arguments)

        return call

    with contextlib.ExitStack() as stack:
        for name in (*CHANGING, *more):
            stack.enter_context(patch.object(os, name, preceded(getattr(os, name))))
        yield


@contextlib.contextmanager
def before_call(nth: int, action: Callable[[], object]) -> Iterator[None]:
    """Likewise, before the nth time only."""
    left = nth

    def count_down() -> None:
        nonlocal left
        left -= 1
        if not left:
            action()

    with before_each_call(count_down):
        yield


@contextlib.contextmanager
def failing(name: str, nth: int, error: int, *, for_ever: bool = False) -> Iterator[list[int]]:
    """That function of `os` fails the nth time it is called, and perhaps from then on. The list has
    the numbers of the calls that failed."""
    function, called, failed = getattr(os, name), 0, list[int]()

    def call(*arguments: object) -> object:
        nonlocal called
        called += 1
        if called == nth or (for_ever and called > nth):
            failed.append(called)
            raise OSError(error, os.strerror(error))
        return function(*arguments)

    with patch.object(os, name, call):
        yield failed


# -- Processes ---------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    """A soft limit, ``resource.RLIMIT_…``, of this whole process."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


class Traced(NamedTuple):
    """What became of a program that was traced."""

    status: int
    """Less than 0: the signal that ended it."""
    out: str
    err: str
    calls: Counter[str]
    """How many of each watched system call were begun."""


WATCHED: Final = (
    "pwritev2",
    "pwrite64",
    "fallocate",
    "fdatasync",
    "fsync",
    "ftruncate",
    "rename",
    "unlink",
)
"""What `mesh.durable.storage` changes things with, and the interpreter does not while it starts.
Of others the interpreter's own are counted, too."""


def kill_at(call: str, nth: int) -> str:
    """SIGKILL instead of the `nth` of these system calls."""
    return f"{call}:signal=SIGKILL:when={nth}"


def fail_at(call: str, nth: int, error: str = "EIO") -> str:
    """An error instead of it."""
    return f"{call}:error={error}:when={nth}"


def fail_from(call: str, nth: int, error: str = "EIO") -> str:
    """An error instead of it, and of each that comes after it."""
    return f"{call}:error={error}:when={nth}+"


def short_at(call: str, nth: int, count: int) -> str:
    """Instead of it, the word that `count` bytes were written. They were not: a program that goes
    on with the rest has a file with zeros there."""
    return f"{call}:retval={count}:when={nth}"


def traced(
    source: str,
    *arguments: str | Path,
    inject: Sequence[str] = (),
    watch: Sequence[str] = WATCHED,
) -> Traced:
    """Run a Python program under strace, and wait for its end.

    strace counts the calls of each thread for itself: the `nth` call is the first thread's to get
    there. `Traced.calls` is of them all.
    """
    need("strace")
    with tempfile.TemporaryDirectory(prefix="mesh-") as directory:
        log = Path(directory, "calls")
        command = [
            *("strace", "--follow-forks", "--quiet=all", "-o", log, "-e", "signal=none"),
            *("-e", f"trace={','.join(watch)}"),
            *(word for fault in inject for word in ("-e", f"inject={fault}")),
            *(sys.executable, "-u", "-c", textwrap.dedent(source), *arguments),
        ]
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},  # written files are renamed
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=DEADLINE_S)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)  # strace alone would let the program go on
                raise
        calls = Counter(re.findall(r"^\d+ +(\w+)\(", log.read_text(), re.MULTILINE))
    if "PTRACE" in err and not calls:
        pytest.skip(f"strace may not trace here: {err.strip()}")
    return Traced(process.returncode, out, err, calls)
