"""What every `Storage` does, the real one and the one in memory."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from mesh.durable import storage as storages
from mesh.durable.storage import Disk, File, Storage, directory_of
from mesh.errors import InvalidName, LogLocked, StorageFailed
from tests.support.fake_disk import FakeDisk


class World(Protocol):
    """One directory, and what may go wrong with it."""

    def opened(self) -> Storage:
        """The directory, opened once more."""

    def fail_append(self, code: int) -> None:
        """The next append fails."""

    def fail_sync(self, code: int) -> None:
        """The next sync of a file fails."""


class RealWorld:
    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path = path
        self._monkeypatch = monkeypatch

    def opened(self) -> Storage:
        return Disk(self._path)

    def fail_append(self, code: int) -> None:
        self._fail("pwritev", code)

    def fail_sync(self, code: int) -> None:
        self._fail("fdatasync", code)

    def _fail(self, function: str, code: int) -> None:
        original = getattr(os, function)

        def fail(*_: object) -> None:
            self._monkeypatch.setattr(os, function, original)
            raise OSError(code, os.strerror(code))

        self._monkeypatch.setattr(os, function, fail)


class FakeWorld:
    def __init__(self) -> None:
        self._disk = FakeDisk()

    def opened(self) -> Storage:
        return self._disk.again()

    def fail_append(self, code: int) -> None:
        self._disk.faults.fail("append", code=code)

    def fail_sync(self, code: int) -> None:
        self._disk.faults.fail("sync", code=code)


@pytest.fixture(params=["real", "fake"])
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    if request.param == "fake":
        return FakeWorld()
    return RealWorld(tmp_path / "log", monkeypatch)


@pytest.fixture
def storage(world: World) -> Iterator[Storage]:
    storage = world.opened()
    yield storage
    storage.close()


Keep = Callable[[File], File]


@pytest.fixture
def keep() -> Iterator[Keep]:
    """Closes files with the test."""
    with contextlib.ExitStack() as stack:

        def keep(file: File) -> File:
            stack.callback(file.close)
            return file

        yield keep


Write = Callable[[File], None]
WRITES: dict[str, Write] = {
    "append": lambda file: file.append([b"more"]),
    "sync": lambda file: file.sync(),
    "truncate": lambda file: file.truncate(0),
}


def content(storage: Storage, name: str) -> bytes:
    with contextlib.closing(storage.open_to_read(name)) as file:
        return file.read(0, file.size() + 1)


def test_a_new_directory_is_empty(storage: Storage) -> None:
    assert storage.names() == []


def test_names_are_those_of_files_and_folders_sorted(storage: Storage, keep: Keep) -> None:
    for name in ("b", "ä", "a.1"):
        keep(storage.create(name))
    storage.folder("aa")
    assert storage.names() == ["a.1", "aa", "b", "ä"]


def test_what_is_created_must_not_exist(storage: Storage, keep: Keep) -> None:
    keep(storage.create("a")).append([b"kept"])
    with pytest.raises(FileExistsError):
        storage.create("a")
    assert content(storage, "a") == b"kept"


def test_what_is_opened_or_removed_must_exist(storage: Storage) -> None:
    for call in (storage.open, storage.open_to_read, storage.remove):
        with pytest.raises(FileNotFoundError):
            call("a")
    assert storage.names() == []


def test_all_parts_are_appended_in_order(storage: Storage, keep: Keep) -> None:
    file = keep(storage.create("a"))
    file.append([b"one", memoryview(b"-two-")[1:4], b"", b"three"])
    file.append([])
    file.append([b""])
    file.append([b"four"])
    assert file.read(0, 100) == b"onetwothreefour"
    assert file.size() == 15


def test_more_parts_are_appended_than_one_call_of_the_system_takes(
    storage: Storage, keep: Keep
) -> None:
    parts = [b"%d," % number for number in range(3000)]
    file = keep(storage.create("a"))
    file.append(parts)
    assert file.read(0, file.size()) == b"".join(parts)


def test_reading_is_cut_short_by_the_end_of_the_file_only(storage: Storage, keep: Keep) -> None:
    file = keep(storage.create("a"))
    file.append([b"0123456789"])
    assert file.read(3, 4) == b"3456"
    assert file.read(7, 4) == b"789"
    assert file.read(10, 4) == b""
    assert file.read(99, 4) == b""
    assert file.read(3, 0) == b""


def test_appending_goes_on_at_the_end_after_a_cut_and_after_reopening(
    storage: Storage, keep: Keep
) -> None:
    file = keep(storage.create("a"))
    file.append([b"0123456789"])
    file.truncate(4)
    assert file.size() == 4
    file.append([b"ab"])
    again = keep(storage.open("a"))
    again.append([b"cd"])
    assert file.read(0, 100) == again.read(0, 100) == b"0123abcd"


def test_what_is_appended_comes_before_the_room_that_is_reserved(
    storage: Storage, keep: Keep
) -> None:
    file = keep(storage.create("a"))
    file.append([b"one"])
    file.reserve(10)
    assert (file.size(), file.read(0, 20)) == (10, b"one" + bytes(7))
    file.append([b"two"])
    file.reserve(5)
    assert file.read(0, 20) == b"onetwo" + bytes(4)
    file.append([b"three"])
    assert file.read(0, 20) == b"onetwothree"
    file.reserve(20)
    file.truncate(6)
    file.append([b"four"])
    assert file.read(0, 20) == b"onetwofour"


def test_a_file_opened_to_read_is_not_written(storage: Storage, keep: Keep) -> None:
    keep(storage.create("a")).append([b"kept"])
    for write in (WRITES["append"], WRITES["truncate"]):
        with pytest.raises(OSError, match=r"Bad file descriptor|Invalid argument"):
            write(keep(storage.open_to_read("a")))
    assert content(storage, "a") == b"kept"


def test_a_reader_sees_what_is_appended_after_it_opened(storage: Storage, keep: Keep) -> None:
    writer = keep(storage.create("a"))
    reader = keep(storage.open_to_read("a"))
    writer.append([b"new"])
    assert (reader.size(), reader.read(0, 9)) == (3, b"new")


def test_forgetting_loses_nothing_synced_or_not(storage: Storage, keep: Keep) -> None:
    file = keep(storage.create("a"))
    file.append([b"synced"])
    file.sync()
    file.append([b"-unsynced"])
    file.forget()
    assert file.read(0, 100) == content(storage, "a") == b"synced-unsynced"


def test_a_reader_goes_on_after_its_file_is_removed_or_replaced(
    storage: Storage, keep: Keep
) -> None:
    for name in ("removed", "replaced"):
        keep(storage.create(name)).append([b"old"])
    readers = [keep(storage.open_to_read(name)) for name in ("removed", "replaced")]
    storage.remove("removed")
    storage.replace("replaced", b"new")
    assert [reader.read(0, 9) for reader in readers] == [b"old", b"old"]
    assert storage.names() == ["replaced"]
    assert content(storage, "replaced") == b"new"


def test_replacing_makes_the_name_and_leaves_nothing_else(storage: Storage) -> None:
    for data in (b"first", b"", b"a longer second"):
        storage.replace("state", data)
        assert content(storage, "state") == data
        assert storage.names() == ["state"]


@pytest.mark.parametrize("fail", ["fail_append", "fail_sync"])
def test_what_could_not_be_replaced_is_what_it_was(
    world: World, storage: Storage, fail: str
) -> None:
    storage.replace("state", b"old")
    getattr(world, fail)(errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        storage.replace("state", b"new")
    assert content(storage, "state") == b"old"
    assert storage.names() == ["state"]
    storage.replace("state", b"newer")
    assert content(storage, "state") == b"newer"


def test_a_folder_is_a_directory_of_its_own_and_the_same_when_it_is_there(
    world: World, storage: Storage, keep: Keep
) -> None:
    inside = storage.folder("orders").folder("0")
    keep(inside.create("a")).append([b"kept"])
    assert storage.names() == ["orders"]
    assert storage.folder("orders").names() == ["0"]
    assert content(world.opened().folder("orders").folder("0"), "a") == b"kept"


def test_a_folder_is_no_file_nor_a_file_a_folder(storage: Storage, keep: Keep) -> None:
    storage.folder("folder")
    keep(storage.create("file"))
    with pytest.raises(FileExistsError):
        storage.folder("file")
    for call in (storage.open, storage.open_to_read, storage.remove):
        with pytest.raises(OSError, match=r"folder|directory"):
            call("folder")
    assert storage.names() == ["file", "folder"]


@pytest.mark.parametrize("name", ["", ".", "..", ".lock", "../a", "/a", "a/b", "a\0b"])
def test_no_name_leads_out_of_the_directory(storage: Storage, name: str) -> None:
    storage.lock()
    calls: list[Callable[[str], object]] = [
        *(storage.create, storage.open, storage.open_to_read, storage.remove, storage.folder),
        lambda name: storage.replace(name, b""),
    ]
    for call in calls:
        with pytest.raises(InvalidName, match=r"names no file: it is empty, or has a dot first"):
            call(name)


def test_a_directory_is_locked_for_one_opening_at_a_time(world: World, storage: Storage) -> None:
    other = world.opened()
    storage.lock()
    for who in (other, storage):
        with pytest.raises(LogLocked, match=rf"is in use by process {os.getpid()}$"):
            who.lock()
    other.close()
    with pytest.raises(LogLocked):
        other.lock()
    storage.close()
    storage.close()
    other.lock()
    with pytest.raises(LogLocked):
        storage.lock()
    other.close()


def test_a_lock_is_seen_by_nobody_and_holds_for_one_directory(storage: Storage) -> None:
    storage.lock()
    inside = storage.folder("inside")
    inside.lock()
    inside.close()
    assert storage.names() == ["inside"]


def test_a_closed_file_is_neither_read_nor_written(storage: Storage) -> None:
    file = storage.create("a")
    file.close()
    file.close()
    for call in (file.size, lambda: file.read(0, 1), lambda: file.append([b"x"])):
        with pytest.raises(OSError, match="Bad file descriptor"):
            call()
    assert content(storage, "a") == b""


def test_reading_while_another_thread_appends_finds_what_was_appended(
    storage: Storage, keep: Keep
) -> None:
    record = bytes(range(250))
    writer, done = keep(storage.create("a")), threading.Event()

    def append() -> None:
        for _ in range(500):
            writer.append([record[:100], record[100:]])
        done.set()

    thread = threading.Thread(target=append)
    thread.start()
    reader, looks = keep(storage.open_to_read("a")), 0
    while not done.is_set() or not looks:
        for file in (reader, writer):
            size = file.size()
            data = file.read(0, size)
            assert len(data) == size
            assert data == (record * (size // 250 + 1))[:size]
        looks += 1
    thread.join()
    assert writer.read(0, 500 * 250) == record * 500


@pytest.mark.parametrize("fail", ["append", "sync"])
def test_a_file_is_not_written_after_a_failure_and_says_what_it_was(
    world: World, storage: Storage, keep: Keep, fail: str
) -> None:
    file = keep(storage.create("a"))
    file.append([b"kept"])
    file.sync()
    getattr(world, f"fail_{fail}")(errno.EIO)
    with pytest.raises(OSError, match="Input/output error") as first:
        WRITES[fail](file)
    assert first.value.errno == errno.EIO
    # Another error would follow, but nothing gets so far.
    getattr(world, f"fail_{fail}")(errno.ENOSPC)
    for write in (*WRITES.values(), *WRITES.values()):
        with pytest.raises(
            StorageFailed, match=r"a is not written any more, after OSError: .*Input/output error$"
        ):
            write(file)
    assert file.read(0, 4) == b"kept"
    assert file.size() >= 4


@pytest.mark.parametrize("fail", ["append", "sync"])
def test_only_the_file_that_failed_is_poisoned_and_one_opened_anew_is_not(
    world: World, storage: Storage, keep: Keep, fail: str
) -> None:
    failed, other = keep(storage.create("a")), keep(storage.create("b"))
    getattr(world, f"fail_{fail}")(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        WRITES[fail](failed)
    anew = keep(storage.open("a"))
    anew.truncate(0)
    for file in (other, anew):
        file.append([b"written"])
        file.sync()
        assert file.read(0, 100) == b"written"


def test_all_directories_that_are_made_are_on_the_disk_each_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the one that was made last before, by whoever was killed then."""
    synced: list[tuple[Path, list[str]]] = []
    sync = storages._sync_directory

    def noting(path: Path) -> None:
        synced.append((path, sorted(os.listdir(path))))
        sync(path)

    monkeypatch.setattr(storages, "_sync_directory", noting)
    data = tmp_path / "data"
    data.mkdir()
    directory_of(str(data / "logs" / "site" / "shop"))
    logs, site = data / "logs", data / "logs" / "site"
    assert synced == [(tmp_path, ["data"]), (data, ["logs"]), (logs, ["site"]), (site, ["shop"])]
    modes = [path.stat().st_mode & 0o777 for path in (data, logs, site, site / "shop")]
    assert modes == [modes[0]] * 3 + [0o700], "others may have directories beside it"
    synced.clear()
    directory_of(str(site / "shop"))
    assert synced == [(site, ["shop"])]
