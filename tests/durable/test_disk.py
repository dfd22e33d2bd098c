"""What only a real directory has: modes, links, locks between processes, short writes."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mesh.durable.storage import Disk
from mesh.errors import LogLocked, StorageFailed
from tests.support.processes import Programs

HOLDER = """
    import sys
    from pathlib import Path
    from mesh.durable.storage import Disk
    disk = Disk(Path(sys.argv[1]))
    disk.lock()
    print("locked")
    sys.stdin.readline()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def disk(path: Path) -> Iterator[Disk]:
    disk = Disk(path)
    yield disk
    disk.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_nobody_else_may_read_what_is_made(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        disk = Disk(tmp_path / "log")
        disk.folder("inside")
        disk.create("made").close()
        disk.replace("replaced", b"")
        disk.lock()
        disk.close()
    finally:
        os.umask(umask)
    assert [mode(disk.path), mode(disk.path / "inside")] == [0o700, 0o700]
    files = [path for path in disk.path.iterdir() if path.is_file()]
    assert {path.name: mode(path) for path in files} == dict.fromkeys(
        ("made", "replaced", ".lock"), 0o600
    )


def test_a_directory_that_is_there_is_taken_as_it_is(path: Path) -> None:
    path.mkdir(mode=0o750)
    path.chmod(0o750)
    Disk(path)
    assert mode(path) == 0o750


def test_a_directory_is_made_in_one_that_is_there_and_in_the_place_of_nothing(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Disk(path / "below")
    path.write_bytes(b"")
    with pytest.raises(FileExistsError):
        Disk(path)


def test_no_program_that_is_started_inherits_a_file(disk: Disk) -> None:
    before = set(os.listdir("/proc/self/fd"))
    disk.lock()
    with (
        contextlib.closing(disk.create("a")),
        contextlib.closing(disk.open("a")),
        contextlib.closing(disk.open_to_read("a")),
    ):
        opened = set(os.listdir("/proc/self/fd")) - before
        inherited = [int(fd) for fd in opened if _is_open(int(fd)) and os.get_inheritable(int(fd))]
    assert len(opened) >= 4
    assert inherited == []


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_links_are_not_followed(disk: Disk, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"somebody's")
    for name in ("link", ".lock", ".state.new"):
        (disk.path / name).symlink_to(target)
    calls: list[Callable[[], object]] = [
        *(lambda: disk.open("link"), lambda: disk.open_to_read("link")),
        disk.lock,
    ]
    for call in calls:
        with pytest.raises(OSError, match="symbolic links") as error:
            call()
        assert error.value.errno == errno.ELOOP
    with pytest.raises(FileExistsError):
        disk.create("link")
    for name in ("link", "state"):
        disk.replace(name, b"ours")
        assert not (disk.path / name).is_symlink()
    assert target.read_bytes() == b"somebody's"


def test_what_is_no_file_is_not_opened_nor_waited_for(disk: Disk) -> None:
    os.mkfifo(disk.path / "pipe")
    for call in (disk.open, disk.open_to_read):
        with pytest.raises(OSError, match=r"not a regular file: '.*pipe'"):
            call("pipe")


def test_no_file_is_left_open_by_what_failed(
    disk: Disk, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.mkfifo(path / "pipe")
    disk.folder("folder")
    before = descriptors()
    for opening, name in (
        *((disk.open, "pipe"), (disk.open, "folder"), (disk.create, "pipe")),
        *((disk.open_to_read, "pipe"), (disk.open_to_read, "folder")),
    ):
        with pytest.raises(OSError, match=r"not a regular file|exists|Is a directory"):
            opening(name)
    assert descriptors() == before
    calls: list[Callable[[], object]] = [
        *(disk.sync, disk.lock, lambda: disk.folder("new")),
        lambda: disk.replace("state", b"new"),
    ]
    for function in ("fsync", "fdatasync", "pwritev", "rename", "ftruncate", "fstat"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            for call in calls:
                with contextlib.suppress(OSError):
                    call()
        disk.close()
        assert descriptors() == before, function
        assert not list(path.glob(".*.new")), function


def test_parts_go_out_in_as_few_calls_as_the_system_allows(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = os.pwritev

    def count(fd: int, parts: list[memoryview], at: int) -> int:
        calls.append(len(parts))
        return original(fd, parts, at)

    monkeypatch.setattr(os, "pwritev", count)
    with contextlib.closing(disk.create("a")) as file:
        file.append([b"x"] * 1024)
        file.append([b"y"] * 2500)
        file.append([])
    assert calls == [1024, 1024, 1024, 452]


def test_a_short_write_is_gone_on_with(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.pwritev
    lengths = iter(range(1, 1000))

    def write_some(fd: int, parts: list[memoryview], at: int) -> int:
        return original(fd, [memoryview(b"".join(parts))[: next(lengths)]], at)

    parts = [bytes([number]) * (number % 7) for number in range(200)]
    monkeypatch.setattr(os, "pwritev", write_some)
    with contextlib.closing(disk.create("a")) as file:
        file.append(parts)
        assert file.read(0, file.size()) == b"".join(parts)


def test_a_write_that_writes_nothing_is_an_error_and_no_loop(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(disk.create("a")) as file:
        monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: 0)
        with pytest.raises(OSError, match="nothing was written"):
            file.append([b"x"])


def test_a_short_read_is_gone_on_with(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.pread
    with contextlib.closing(disk.create("a")) as file:
        file.append([b"0123456789"])
        monkeypatch.setattr(os, "pread", lambda fd, length, at: original(fd, min(length, 3), at))
        assert file.read(1, 8) == b"12345678"
        assert file.read(5, 100) == b"56789"


def test_an_interrupted_append_poisons_too(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not known how much of it was written."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with contextlib.closing(disk.create("a")) as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", interrupt)
            with pytest.raises(KeyboardInterrupt):
                file.append([b"x"])
        with pytest.raises(StorageFailed, match="after KeyboardInterrupt"):
            file.append([b"x"])


def test_what_replaces_is_on_the_disk_before_it_has_the_name_and_the_name_afterwards(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(function: str) -> None:
        original = getattr(os, function)

        def called(*arguments: object) -> object:
            calls.append(function)
            return original(*arguments)

        monkeypatch.setattr(os, function, called)

    for function in ("pwritev", "fdatasync", "rename", "fsync"):
        record(function)
    disk.replace("state", b"new")
    assert calls == ["pwritev", "fdatasync", "rename", "fsync"]
    calls.clear()
    disk.folder("inside")
    assert calls == ["fsync"]


def test_what_a_killed_replacement_left_is_out_of_sight_and_in_nobodys_way(disk: Disk) -> None:
    (disk.path / ".state.new").write_bytes(b"half of it")
    assert disk.names() == []
    disk.replace("state", b"new")
    assert os.listdir(disk.path) == ["state"]


def test_a_directory_that_cannot_be_synced_from_above_is_used_if_it_was_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An administrator made it in a directory that this user may enter and not read."""
    original = os.open

    def refuse(name: Path, *arguments: int) -> int:
        if name == path.parent:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))
        return original(name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(PermissionError):
            Disk(path)
        assert Disk(path).names() == []


def lock_in_a_child(path: Path) -> str:
    """What a forked child of this process is told when it locks that directory."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Disk(path).lock()
            os.write(writer, b"locked")
        except LogLocked as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        told = pipe.read().decode()
    os.waitpid(child, 0)
    return told


def test_a_forked_child_has_no_part_in_the_lock_and_leaves_it_alone(path: Path) -> None:
    disk = Disk(path)
    disk.lock()
    for _ in range(2):  # the first, at its end, closed what it had of the lock
        assert lock_in_a_child(path) == f"{path} is in use by process {os.getpid()}"
    disk.close()
    assert lock_in_a_child(path) == "locked"


def test_a_forked_child_that_lives_on_does_not_keep_the_lock(path: Path) -> None:
    disk, reader, writer = Disk(path), *os.pipe()
    disk.lock()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)  # until the test is over
        os._exit(0)
    try:
        disk.close()
        disk.lock()
        disk.close()
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(child, 0)


def test_a_second_opening_in_this_process_does_not_undo_the_lock(path: Path) -> None:
    """POSIX: closing any descriptor of a file gives up the locks on it."""
    disk, other = Disk(path), Disk(path)
    disk.lock()
    with pytest.raises(LogLocked):
        other.lock()
    other.close()
    assert "is in use by" in lock_in_a_child(path)
    disk.close()


@pytest.mark.slow
def test_the_process_that_has_the_directory_is_named_and_gives_it_up_with_its_life(
    path: Path, programs: Programs
) -> None:
    disk = Disk(path)
    (path / ".lock").write_text("1234567890 of an earlier one\n")
    holder = programs.start(HOLDER, str(path))
    holder.expect("locked")
    with pytest.raises(LogLocked, match=rf"^{path} is in use by process {holder.pid}$"):
        disk.lock()
    holder.kill(signal.SIGKILL)
    holder.finish()
    disk.lock()
    assert (path / ".lock").read_text() == f"{os.getpid()}\n"
    disk.close()
