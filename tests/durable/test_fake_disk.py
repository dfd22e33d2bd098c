"""The disk in memory loses all that a real one may lose, and nothing that was synced."""

from __future__ import annotations

import errno
import itertools
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from mesh.errors import StorageFailed
from tests.support.fake_disk import SECTOR_BYTES, FakeDisk, Operation, Stopped

SEEDS = range(200)
MIXED = bytes(range(1, 251)) * 20
"""No two sectors of it alike, and no zeros."""


def content(disk: FakeDisk, name: str) -> bytes:
    file = disk.open_to_read(name)
    return file.read(0, file.size())


def found(disk: FakeDisk, name: str = "a") -> set[bytes | None]:
    """What each of many crashes leaves of a file; None for no file."""
    crashed = [disk.crash(Random(seed)) for seed in SEEDS]
    return {content(each, name) if name in each.names() else None for each in crashed}


def with_file(data: bytes, *, name: str = "a", seed: int = 0) -> FakeDisk:
    """A disk that has that file for sure."""
    disk = FakeDisk(seed)
    file = disk.create(name)
    file.append([data])
    file.sync()
    disk.sync()
    return disk


def test_what_was_synced_is_there_after_any_crash() -> None:
    disk = with_file(b"synced")
    disk.folder("inside").replace("state", b"replaced")
    for seed in SEEDS:
        crashed = disk.crash(Random(seed))
        assert crashed.names() == ["a", "inside"]
        assert content(crashed, "a") == b"synced"
        assert content(crashed.folder("inside"), "state") == b"replaced"


def test_what_was_not_synced_may_be_lost_kept_or_cut_anywhere() -> None:
    disk = with_file(b"synced")
    file = disk.open("a")
    for part in (b"-one", b"-two"):
        file.append([part])
    assert found(disk) == {b"synced-one-two"[:size] for size in range(6, 15)} | {
        b"synced" + part
        for part in (b"\0\0\0\0", b"\0\0\0\0\0\0\0\0")  # the sector was not written
    }


def test_a_long_append_is_often_lost_or_kept_as_a_whole() -> None:
    disk = with_file(MIXED)
    disk.open("a").append([MIXED, MIXED])
    after = [content(disk.crash(Random(seed)), "a") for seed in SEEDS]
    for whole in (MIXED, MIXED * 3):
        assert after.count(whole) > len(SEEDS) // 8


def test_sectors_that_were_not_synced_may_be_there_in_any_order() -> None:
    sectors = [MIXED[at : at + SECTOR_BYTES] for at in range(0, 4 * SECTOR_BYTES, SECTOR_BYTES)]
    disk = with_file(sectors[0])
    disk.open("a").append(sectors[1:])
    whole = {each for each in found(disk) if each is not None and len(each) == 4 * SECTOR_BYTES}
    expected = {
        b"".join((sectors[0], *chosen))
        for chosen in itertools.product(*((each, bytes(SECTOR_BYTES)) for each in sectors[1:]))
    }
    assert whole == expected


def test_a_cut_that_was_not_synced_may_be_undone_or_mixed_with_what_followed() -> None:
    old, new = b"o" * 2 * SECTOR_BYTES, b"n" * 2 * SECTOR_BYTES
    disk = with_file(old)
    file = disk.open("a")
    file.truncate(SECTOR_BYTES)
    assert found(disk) == {old, old[:SECTOR_BYTES]}
    file.append([new])
    after = found(disk)
    assert {old, old[:SECTOR_BYTES], old[:SECTOR_BYTES] + new} <= after
    assert old[: 2 * SECTOR_BYTES] + new[:SECTOR_BYTES] in after
    file.sync()
    assert found(disk) == {old[:SECTOR_BYTES] + new}


def test_a_name_that_was_not_synced_may_be_missing_though_its_file_was() -> None:
    disk = FakeDisk()
    file = disk.create("a")
    file.append([b"synced"])
    file.sync()
    assert found(disk) == {None, b"synced"}
    disk.sync()
    assert found(disk) == {b"synced"}


def test_a_removed_file_may_be_back_until_the_directory_is_synced() -> None:
    disk = with_file(b"synced")
    disk.remove("a")
    assert found(disk) == {None, b"synced"}
    disk.create("a").sync()
    assert found(disk) == {None, b"synced", b""}
    disk.remove("a")
    disk.sync()
    assert found(disk) == {None}


def test_names_that_were_not_synced_survive_each_for_itself() -> None:
    disk = FakeDisk()
    for name in ("a", "b"):
        disk.create(name)
    assert {tuple(disk.crash(Random(seed)).names()) for seed in SEEDS} == {
        *((), ("a",), ("b",), ("a", "b"))
    }


def test_a_folder_is_lost_with_all_that_is_in_it() -> None:
    disk = FakeDisk()
    disk.faults.fail("names")
    with pytest.raises(OSError, match="Input/output error"):
        disk.folder("inside")
    assert {tuple(disk.crash(Random(seed)).names()) for seed in SEEDS} == {(), ("inside",)}
    disk.folder("inside").replace("a", b"synced")
    assert content(disk.crash(Random(0)).folder("inside"), "a") == b"synced"


def test_a_crash_anywhere_in_a_replacement_leaves_the_old_or_the_new() -> None:
    after = set()
    for seed in range(50):
        for stop_at in itertools.count(1):
            disk = with_file(b"old", seed=seed)
            disk.faults.stop_at = disk.operations + stop_at
            try:
                disk.replace("a", b"new")
            except Stopped:
                after.add((stop_at, content(disk.crash(Random(seed)), "a")))
                assert content(disk.kill(), "a") in (b"old", b"new")
            else:
                assert stop_at == 6, "create, append, sync, rename, names"
                break
    assert after == {
        *((1, b"old"), (2, b"old"), (3, b"old"), (4, b"old"), (5, b"old")),
        *((4, b"new"), (5, b"new")),
    }


def test_renaming_what_was_not_synced_shows() -> None:
    """As a replacement would that forgot to sync: the name is new, and the data gone."""
    disk = with_file(b"old")
    disk.create("fresh").append([b"new"])
    disk._directory.rename("fresh", "a")
    disk.sync()
    assert b"" in found(disk)


def test_what_a_failed_sync_has_lost_is_in_memory_at_most_and_not_once_that_is_forgotten() -> None:
    shown = set()
    for seed in range(20):
        disk = FakeDisk(seed)
        file = disk.create("a")
        file.append([b"data"])
        disk.faults.fail("sync")
        with pytest.raises(OSError, match="Input/output error"):
            file.sync()
        shown.add(file.read(0, 10))
        file.forget()
        assert file.read(0, 10) == bytes(4)
    assert shown == {b"data", bytes(4)}


def test_a_killed_process_loses_nothing_that_was_written_though_the_power_may() -> None:
    disk = with_file(b"synced")
    disk.open("a").append([b"-not"])
    disk.create("b").append([b"new"])
    killed = disk.kill().kill()
    assert (content(killed, "a"), content(killed, "b")) == (b"synced-not", b"new")
    assert {b"synced", b"synced-not"} < found(killed)
    assert found(killed, "b") >= {None, b"", b"new"}
    killed.open("a").append([b"-more"])
    assert content(disk, "a") == b"synced-not", "they share something"


def test_a_kill_in_an_append_leaves_part_of_it() -> None:
    left = set()
    for seed in SEEDS:
        disk = FakeDisk(seed)
        file = disk.create("a")
        disk.faults.stop_at = disk.operations + 1
        with pytest.raises(Stopped):
            file.append([b"12", b"34"])
        left.add(content(disk.kill(), "a"))
    assert left == {b"", b"1", b"12", b"123", b"1234"}


def test_a_dead_process_changes_nothing_any_more() -> None:
    disk = with_file(b"synced")
    file = disk.open("a")
    disk.faults.stop_at = disk.operations + 1
    with pytest.raises(Stopped):
        file.append([b"x"])
    calls: list[Callable[[], object]] = [
        *(disk.names, disk.sync, disk.lock, file.sync, file.size),
        *(lambda: disk.open("a"), lambda: disk.create("b"), lambda: disk.remove("a")),
        *(lambda: disk.replace("a", b""), lambda: disk.folder("b"), lambda: file.append([b"y"])),
        *(lambda: file.truncate(0), lambda: file.read(0, 1), lambda: disk.open_to_read("a")),
    ]
    for call in calls:
        with pytest.raises(Stopped):
            call()
    assert disk.kill().names() == ["a"]
    assert content(disk.kill(), "a") in (b"synced", b"syncedx")


def test_a_lock_ends_with_its_process() -> None:
    disk = FakeDisk()
    disk.folder("inside").lock()
    disk.lock()
    for after in (disk.kill(), disk.crash(Random(0))):
        after.lock()
        after.folder("inside").lock()


def test_a_full_disk_takes_what_fits() -> None:
    disk = FakeDisk()
    file = disk.create("a")
    disk.faults.room_bytes = 7
    file.append([b"1234"])
    with pytest.raises(OSError, match="No space left") as error:
        file.append([b"5678"])
    assert error.value.errno == errno.ENOSPC
    assert content(disk, "a") == b"1234567"
    with pytest.raises(StorageFailed):
        file.append([b"8"])
    with pytest.raises(OSError, match="No space left"):
        disk.replace("b", b"x")
    assert list(disk._directory.entries) == ["a"]
    disk.faults.room_bytes = None
    disk.open("a").append([b"8"])
    assert content(disk, "a") == b"12345678"


@pytest.mark.parametrize("operation", ["append", "sync", "truncate", "create", "remove", "names"])
def test_the_operation_that_was_asked_to_fail_does(operation: Operation) -> None:
    disk = with_file(b"old", name="old")
    if operation == "remove":
        for name in ("first", "second"):
            disk.create(name)
    work: dict[Operation, Callable[[str], object]] = {
        "create": lambda name: disk.create(name),
        "append": lambda name: disk.open("old").append([b"x"]),
        "sync": lambda name: disk.open("old").sync(),
        "truncate": lambda name: disk.open("old").truncate(0),
        "remove": disk.remove,
        "names": lambda name: disk.sync(),
    }
    disk.faults.fail(operation, nth=2, code=errno.EROFS)
    work[operation]("first")
    with pytest.raises(OSError, match="Read-only") as error:
        work[operation]("second")
    assert error.value.errno == errno.EROFS
    work[operation]("second" if operation == "remove" else "third")


def test_a_failed_sync_loses_the_data_and_the_next_one_succeeds() -> None:
    """As Linux does, whose page cache may show what is on no disk, until it does not."""
    shown = set()
    for seed in SEEDS:
        disk = FakeDisk(seed)
        file = disk.create("a")
        file.append([b"synced"])
        file.sync()
        disk.sync()
        file.append([b"-lost"])
        disk.faults.fail("sync")
        with pytest.raises(OSError, match="Input/output error"):
            file.sync()
        shown.add(content(disk, "a"))
        again = disk.open("a")
        again.append([b"-more"])
        again.sync()
        assert content(disk.crash(Random(seed)), "a") == b"synced\0\0\0\0\0-more"
        # Cut off, nothing of it comes back.
        again.truncate(6)
        again.append([b"-new"])
        again.sync()
        assert content(disk, "a") == b"synced-new"
        assert content(disk.crash(Random(seed)), "a") == b"synced-new"
    assert shown == {b"synced-lost", b"synced\0\0\0\0\0"}


def test_a_crash_after_a_failed_sync_does_not_find_the_data() -> None:
    disk = with_file(b"synced")
    file = disk.open("a")
    file.append([b"-lost"])
    disk.faults.fail("sync")
    with pytest.raises(OSError, match="Input/output error"):
        file.sync()
    assert found(disk) == {b"synced"}
    cut = disk.kill()
    cut.open("a").truncate(8)
    assert found(cut) == {b"synced", b"synced\0\0"}
    disk.open("a").append([b"+more"])
    after = found(disk)
    assert {b"synced", b"synced\0\0\0\0\0+more"} < after
    assert all(each is not None and set(each[6:11]) <= {0} for each in after)


def test_operations_are_counted_where_something_changes() -> None:
    disk = FakeDisk()
    file = disk.create("a")
    file.append([b"x"])
    file.sync()
    file.truncate(0)
    assert disk.operations == 4
    disk.names()
    file.size()
    file.read(0, 1)
    file.append([])
    disk.open("a").close()
    assert disk.operations == 4
    disk.replace("b", b"x")
    disk.folder("c")
    disk.remove("a")
    assert disk.faults.done == Counter(
        create=2, append=2, sync=2, truncate=1, rename=1, remove=1, folder=1, names=2
    )
    assert disk.operations == 12


def test_the_same_seed_gives_the_same_disk() -> None:
    def story(seed: int) -> list[bytes | None]:
        disk = FakeDisk(seed)
        file = disk.create("a")
        file.append([MIXED])
        disk.faults.stop_at = disk.operations + 1
        with pytest.raises(Stopped):
            file.append([MIXED])
        crashed = disk.crash(Random(seed))
        return [
            content(each, "a") if "a" in each.names() else None for each in (disk.kill(), crashed)
        ]

    assert [story(seed) for seed in range(20)] == [story(seed) for seed in range(20)]
    assert story(1) != story(2)
    disk = FakeDisk()
    lucks = {disk.crash(Random(seed)).faults.random.random() for seed in (1, 1, 2)}
    assert len(lucks) == 2
