"""Real disks that lose power, fill up and fail, and processes killed at a call of the system: that
the faults are what they say, and what the storage does then."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mesh.durable.storage import Disk, Storage
from mesh.errors import StorageFailed
from tests.support.faults import (
    JOURNAL_KEPT,
    JOURNAL_LOST,
    LoopDisk,
    fail_at,
    filled,
    kill_at,
    limited,
    loop_disk,
    short_at,
    small_disk,
    thin_disk,
    traced,
)
from tests.support.hosts import Host

pytestmark = pytest.mark.slow

WRITER = """
    import sys
    from pathlib import Path
    from mesh.durable.storage import Disk
    file = Disk(Path(sys.argv[1])).create("a")
    for number in range(5):
        file.append([b"%d" % number, b"-"])
        print("appended", number)
        file.sync()
        print("synced", number)
    file.close()
"""

REPLACER = """
    import sys
    from pathlib import Path
    from mesh.durable.storage import Disk
    Disk(Path(sys.argv[1])).replace("state", b"new")
    print("replaced")
"""


def content(storage: Storage, name: str) -> bytes:
    with contextlib.closing(storage.open_to_read(name)) as file:
        return file.read(0, file.size())


@pytest.mark.parametrize("flag", [JOURNAL_LOST, JOURNAL_KEPT])
def test_power_loss_takes_what_was_not_synced_and_leaves_what_was(
    tmp_path: Path, flag: int
) -> None:
    with loop_disk(tmp_path) as disk:
        storage = Disk(disk.path / "log")
        file = storage.create("a")
        file.append([b"synced"])
        file.sync()
        storage.create("unnamed").close()
        storage.folder("inside").replace("state", b"old")
        storage.folder("inside").replace("state", b"new")
        file.append([b"-lost"])
        storage.create("lost").close()
        disk.cut_power(flag)
        with pytest.raises(OSError, match="Input/output error"):
            file.append([b"x"])
        with pytest.raises(StorageFailed):
            file.sync()
        file.close()
        disk.restore_power()
        after = Disk(disk.path / "log")
        names = ["a", "inside", "unnamed"]
        if flag == JOURNAL_LOST:
            assert after.names() == names
            assert content(after, "a") == b"synced"
        else:
            assert after.names() == ["a", "inside", "lost", "unnamed"]
            assert content(after, "a") == b"synced" + bytes(5)
        assert content(after.folder("inside"), "state") == b"new"


def test_power_loss_takes_a_name_that_was_not_synced_and_brings_back_a_removed_one(
    tmp_path: Path,
) -> None:
    with loop_disk(tmp_path) as disk:
        storage = Disk(disk.path / "log")
        for name in ("removed", "removed for good"):
            storage.create(name).close()
        storage.sync()
        storage.remove("removed for good")
        storage.sync()
        storage.remove("removed")
        storage.create("made").close()
        disk.cut_power()
        disk.restore_power()
        assert Disk(disk.path / "log").names() == ["removed"]


@pytest.mark.parametrize(
    ("flag", "after_the_rename"), [(JOURNAL_LOST, b"old"), (JOURNAL_KEPT, b"new")]
)
def test_power_loss_at_each_call_of_a_replacement_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: int, after_the_rename: bytes
) -> None:
    with loop_disk(tmp_path) as disk:
        storage = Disk(disk.path / "log")
        found = []
        for function in ("pwritev", "fdatasync", "rename", "fsync"):
            storage.replace("state", b"old")
            with monkeypatch.context() as patch:
                cut_power_before(function, disk, flag, patch)
                with pytest.raises(OSError, match="Input/output error"):
                    storage.replace("state", b"new")
            disk.restore_power()
            assert storage.names() == ["state"]
            found.append(content(storage, "state"))
        assert found == [b"old", b"old", b"old", after_the_rename]


def cut_power_before(
    function: str, disk: LoopDisk, flag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(os, function)

    def cut(*arguments: object) -> object:
        monkeypatch.setattr(os, function, original)
        disk.cut_power(flag)
        return original(*arguments)

    monkeypatch.setattr(os, function, cut)


def test_a_disk_without_power_takes_nothing_until_it_is_back(tmp_path: Path) -> None:
    with loop_disk(tmp_path) as disk:
        storage = Disk(disk.path)
        disk.cut_power()
        for call in (lambda: storage.create("a"), storage.sync):
            with pytest.raises(OSError, match="Input/output error"):
                call()
        disk.restore_power()
        storage.create("a").close()
        assert os.path.ismount(disk.path)
    assert not os.path.ismount(disk.path)


@pytest.mark.netns
def test_power_comes_back_though_a_host_was_started_meanwhile(
    tmp_path: Path, hosts: tuple[Host, Host]
) -> None:
    """It sees the mounts of its maker, and would keep the disk as it is."""
    with loop_disk(tmp_path) as disk, hosts[0].start("print('here'); input()") as program:
        program.expect("here")
        disk.cut_power()
        disk.restore_power()
        (disk.path / "file").write_text("written")


def test_a_file_left_open_is_named_and_does_not_keep_the_disk_after_the_test(
    tmp_path: Path,
) -> None:
    with contextlib.ExitStack() as stack:
        with loop_disk(tmp_path) as disk:
            file = Disk(disk.path).create("a")
            stack.callback(file.close)
            disk.cut_power()
            with pytest.raises(AssertionError, match="is a file open in it"):
                disk.restore_power()
        assert not os.path.ismount(disk.path)


def test_a_disk_is_unmounted_when_the_test_fails(tmp_path: Path) -> None:
    def fails() -> None:
        with small_disk(tmp_path, 1 << 20) as path:
            assert os.path.ismount(path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not os.path.ismount(tmp_path / "small")


def test_a_full_tmpfs_takes_what_fits_and_more_when_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path, 1 << 20) as path:
        storage = Disk(path / "log")
        file = storage.create("a")
        with filled(path, room_bytes=8000):
            with pytest.raises(OSError, match="No space left") as error:
                file.append([b"x" * 6000, b"y" * 6000])
            assert error.value.errno == errno.ENOSPC
            assert file.read(0, 1 << 20) == b"x" * 6000 + b"y" * 2192
            with pytest.raises(StorageFailed, match="No space left"):
                file.append([b"z"])
        with contextlib.closing(storage.open("a")) as anew:
            anew.truncate(6000)
            anew.append([b"z" * 100_000])
            assert anew.size() == 106_000
        file.close()


def test_a_full_ext4_replaces_nothing_and_keeps_what_it_had(tmp_path: Path) -> None:
    with loop_disk(tmp_path) as disk:
        storage = Disk(disk.path / "log")
        storage.replace("state", b"old")
        with filled(disk.path):
            with pytest.raises(OSError, match="No space left"):
                storage.replace("state", b"n" * 100_000)
            assert content(storage, "state") == b"old"
            assert storage.names() == ["state"]
            assert os.listdir(storage.path) == ["state"]
        storage.replace("state", b"n" * 100_000)
        assert content(storage, "state") == b"n" * 100_000


def test_after_a_failed_sync_another_succeeds_and_the_data_is_gone(tmp_path: Path) -> None:
    """Why a file is poisoned, and what it is good for."""
    with thin_disk(tmp_path) as disk:
        storage = Disk(disk.path / "log")
        file = storage.create("a")
        storage.sync()
        file.append([b"synced"])
        file.sync()
        with filled(disk.image.parent):
            file.append([b"x" * 1_000_000])
            with pytest.raises(OSError, match=r"No space left|Input/output error"):
                file.sync()
            with pytest.raises(StorageFailed, match=r"/a is not written any more, after OSError"):
                file.sync()
            file.close()
            assert any(is_synced(storage, "a") for _ in range(100))
        disk.cut_power(JOURNAL_KEPT)
        disk.restore_power()
        after = content(storage, "a")
        assert after.startswith(b"synced")
        assert after.count(b"x") < 1_000_000


def is_synced(storage: Disk, name: str) -> bool:
    with contextlib.closing(storage.open(name)) as file, contextlib.suppress(OSError):
        file.sync()
        return True
    return False


def test_a_file_over_the_limit_of_its_process_is_an_error(tmp_path: Path) -> None:
    with contextlib.closing(Disk(tmp_path / "log").create("a")) as file:
        with limited(resource.RLIMIT_FSIZE, 1000), pytest.raises(OSError, match="too large"):
            file.append([b"x" * 600, b"y" * 600])
        assert file.read(0, 2000) == b"x" * 600 + b"y" * 400
        with pytest.raises(StorageFailed, match="File too large"):
            file.append([b"z"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert before[0] != 1000


def test_a_process_without_descriptors_left_opens_nothing(tmp_path: Path) -> None:
    storage = Disk(tmp_path / "log")
    storage.replace("a", b"kept")
    with limited(resource.RLIMIT_NOFILE, 3), pytest.raises(OSError, match="Too many open files"):
        storage.replace("a", b"new")
    assert content(storage, "a") == b"kept"


def test_a_program_that_is_only_watched_runs_to_its_end_and_its_calls_are_counted(
    tmp_path: Path,
) -> None:
    run = traced(WRITER, tmp_path / "log")
    assert (run.status, run.err) == (0, "")
    assert run.out.split("\n")[-2] == "synced 4"
    assert run.calls == {"pwritev2": 5, "fdatasync": 5, "fsync": 1}


@pytest.mark.parametrize(("call", "last"), [("fdatasync", "appended 2"), ("pwritev2", "synced 1")])
def test_sigkill_ends_the_program_at_the_call_that_was_named(
    tmp_path: Path, call: str, last: str
) -> None:
    run = traced(WRITER, tmp_path / "log", inject=[kill_at(call, 3)])
    assert run.status == -signal.SIGKILL
    assert run.out.split("\n")[-2] == last
    assert run.calls[call] == 3
    written = content(Disk(tmp_path / "log"), "a")
    assert written == (b"0-1-2-" if call == "fdatasync" else b"0-1-")


def test_sigkill_at_each_call_of_a_replacement_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    storage = Disk(tmp_path / "log")
    storage.replace("state", b"old")
    calls = traced(REPLACER, storage.path).calls
    assert calls == {"pwritev2": 1, "fdatasync": 1, "rename": 1, "fsync": 2, "unlink": 1}
    found = {}
    for call, count in calls.items():
        for nth in range(1, count + 1):
            storage.replace("state", b"old")
            run = traced(REPLACER, storage.path, inject=[kill_at(call, nth)])
            assert (run.status, run.out) == (-signal.SIGKILL, "")
            assert storage.names() == ["state"]
            found[call, nth] = content(storage, "state")
    assert found.pop(("fsync", 2)) == b"new"
    assert set(found.values()) == {b"old"}


@pytest.mark.parametrize("call", ["pwritev2", "fdatasync"])
def test_an_error_of_a_call_gets_to_the_program_and_poisons_the_file(
    tmp_path: Path, call: str
) -> None:
    run = traced(WRITER, tmp_path / "log", inject=[fail_at(call, 2, "EDQUOT")])
    assert run.status == 1
    assert run.err.endswith("OSError: [Errno 122] Disk quota exceeded\n")
    assert run.calls[call] == 2


def test_a_program_goes_on_where_a_short_write_ended(tmp_path: Path) -> None:
    source = """
        import sys
        from pathlib import Path
        from mesh.durable.storage import Disk
        file = Disk(Path(sys.argv[1])).create("a")
        file.append([b"0123", b"4567", b"89"])
        file.close()
    """
    run = traced(source, tmp_path / "log", inject=[short_at("pwritev2", 1, 6)])
    assert (run.status, run.err) == (0, "")
    assert run.calls["pwritev2"] == 2
    assert content(Disk(tmp_path / "log"), "a") == bytes(6) + b"6789"


@pytest.mark.parametrize(
    ("tool", "fault"),
    [
        ("strace", lambda path: traced("")),
        ("mkfs.ext4", lambda path: loop_disk(path).__enter__()),
        ("mount", lambda path: small_disk(path, 1).__enter__()),
    ],
)
def test_a_fault_that_cannot_be_had_is_skipped_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, fault: Callable[[Path], object]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, **rest: None if name == tool else which(name, **rest)
    )
    with pytest.raises(pytest.skip.Exception, match=f"^{tool} is not installed$"):
        fault(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    if tool != "strace":
        with pytest.raises(pytest.skip.Exception, match="takes root"):
            fault(tmp_path)
