"""What a log promises on real disks: processes killed wherever they are, power that fails, disks
that are full or broken. What was acknowledged is there, in its place, and the log goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from random import Random

import pytest

from mesh.durable.log import Log
from mesh.durable.storage import Disk
from mesh.errors import LogDamaged, StorageFailed
from tests.support.faults import (
    JOURNAL_KEPT,
    JOURNAL_LOST,
    LoopDisk,
    before_call,
    fail_at,
    fail_from,
    filled,
    kill_at,
    limited,
    loop_disk,
    small_disk,
    thin_disk,
    traced,
)
from tests.support.log_process import MEND, OPCODES, WORK, heard, mends, room_for_work
from tests.support.logs import append
from tests.support.planted import receipt_before_the_sync
from tests.support.planted_parts import (
    Planting,
    gone_on_with_after_a_failure,
    memory_believed_after_a_failed_sync,
)
from tests.support.trials import Journal, work

pytestmark = pytest.mark.slow

CALLS = ("pwritev2", "fallocate", "fdatasync", "fsync", "ftruncate", "rename", "unlink")


# -- Processes that are killed


def killed(path: Path, journal: Journal, call: str, nth: int, planted: str = "") -> bool:
    """Whether it was, at that call; what it said before goes into the journal."""
    run = traced(WORK, path, planted, inject=[kill_at(call, nth)])
    assert run.status in (0, -signal.SIGKILL), run.err
    heard(journal, run.out.splitlines())
    return run.status != 0


@pytest.mark.parametrize("call", CALLS)
def test_acknowledged_records_survive_sigkill_at_a_system_call(tmp_path: Path, call: str) -> None:
    journal, path = Journal(), tmp_path / "log"
    assert killed(path, journal, call, 7)
    journal.holds_and_goes_on(Disk(path))


@pytest.mark.long
@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("call", CALLS)
def test_acknowledged_records_survive_sigkill_at_every_system_call(
    tmp_path: Path, call: str, first: int
) -> None:
    assert killed_at_calls(tmp_path, call, first, 2) > 8


def killed_at_calls(tmp_path: Path, call: str, first: int, step: int, planted: str = "") -> int:
    for nth in count(first, step):
        journal, path = Journal(), tmp_path / str(nth)
        if not killed(path, journal, call, nth, planted):
            return nth
        journal.holds_and_goes_on(Disk(path))
    raise AssertionError


@pytest.mark.long
def test_acknowledged_records_survive_one_sigkill_after_another(tmp_path: Path) -> None:
    """At once, and while the log recovers, in one log that goes on."""
    luck, journal = Random(1), Journal()
    for _ in range(60):
        killed(tmp_path / "log", journal, luck.choice(CALLS), luck.choice((1, 2, 3, 5, 20)))
    journal.holds_and_goes_on(Disk(tmp_path / "log"))
    assert journal.acknowledged > 50


def at_opcodes(path: Path, first: int, step: int, planted: str = "") -> str:
    """What is found, or how many opcodes it were."""
    with tempfile.TemporaryDirectory(dir=room_for_work() or path) as directory:
        command = [sys.executable, "-c", OPCODES, directory, str(first), str(step), planted]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=55)
    return run.stdout if run.returncode == 0 else run.stderr


def test_acknowledged_records_survive_sigkill_at_many_opcodes(tmp_path: Path) -> None:
    assert int(at_opcodes(tmp_path, 7, 97)) > 1000


@pytest.mark.damages
def test_what_is_acknowledged_before_it_is_written_is_lost_at_some_opcode(tmp_path: Path) -> None:
    assert "lost" in at_opcodes(tmp_path, 7, 97, "written_with_what_comes_next")


@pytest.mark.damages
def test_what_is_acknowledged_before_it_is_written_is_lost_at_some_call(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="lost"):
        killed_at_calls(tmp_path, "pwritev2", 3, 2, "written_with_what_comes_next")


@pytest.mark.long
@pytest.mark.parametrize("first", range(1, 13))
def test_acknowledged_records_survive_sigkill_at_every_opcode(tmp_path: Path, first: int) -> None:
    assert int(at_opcodes(tmp_path, first, 12)) > 1000


# -- Power that fails


class Closing(Journal):
    """One that lets go of what was opened, so that the disk can be unmounted."""

    log: Log | None = None

    def open(self, storage: object) -> Log:
        self.close()
        self.log = super().open(storage)  # type: ignore[arg-type]
        return self.log

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
            self.log = None


def lose_power(disk: LoopDisk, journal: Closing, luck: Random) -> bool:
    """Somewhere in the work, or in the recovery before it. Whether that was before its end."""
    flag = luck.choice((JOURNAL_LOST, JOURNAL_KEPT))
    at_end = False
    with before_call(luck.choice((3, 10, 150)) - luck.randrange(3), lambda: disk.cut_power(flag)):
        try:
            work(Disk(disk.path / "log"), journal)
            at_end = True
        except (StorageFailed, OSError):
            pass
    if at_end:
        disk.cut_power(flag)
    journal.close()
    disk.restore_power()
    journal.holds(Disk(disk.path / "log"))
    journal.close()
    return not at_end


def power_losses(tmp_path: Path, seed: int, cycles: int, journal: Closing) -> int:
    """How many of them were in the middle of something."""
    luck, cut = Random(seed), 0
    with loop_disk(tmp_path) as disk:
        for _ in range(cycles):
            cut += lose_power(disk, journal, luck)
    return cut


def test_acknowledged_records_survive_some_power_losses(tmp_path: Path) -> None:
    assert power_losses(tmp_path, 0, 8, Closing())


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 7))
def test_acknowledged_records_survive_many_power_losses(tmp_path: Path, seed: int) -> None:
    journal = Closing()
    assert power_losses(tmp_path, seed, 50, journal) > 30
    assert journal.acknowledged > 80


@pytest.mark.damages
def test_an_acknowledgement_before_the_sync_does_not_survive_a_power_loss(tmp_path: Path) -> None:
    with receipt_before_the_sync(), pytest.raises(AssertionError, match="lost"):
        power_losses(tmp_path, 0, 30, Closing())


# -- Disks that are broken or full


def test_no_descriptor_stays_open_whatever_fails(tmp_path: Path) -> None:
    before, failures = len(os.listdir("/proc/self/fd")), 0
    for nth in range(1, 200, 11):
        journal, disk = Closing(), Disk(tmp_path / str(nth))
        try:
            with before_call(nth, fails):
                work(disk, journal)
        except (StorageFailed, OSError):
            failures += 1
        journal.close()
        assert len(os.listdir("/proc/self/fd")) == before, nth
        journal.holds_and_goes_on(disk)
        journal.close()
        assert len(os.listdir("/proc/self/fd")) == before, nth
    assert failures > 5


@pytest.mark.damages
def test_a_damaged_log_is_not_kept_open(tmp_path: Path) -> None:
    disk, journal = Disk(tmp_path / "log"), Closing()
    work(disk, journal)
    journal.close()
    before = len(os.listdir("/proc/self/fd"))
    name = [name for name in disk.names() if name.endswith(".log")][-1]
    os.truncate(disk.path / name, 100)
    for _ in range(3):
        with pytest.raises(LogDamaged):
            journal.open(disk)
    assert len(os.listdir("/proc/self/fd")) == before


def fails() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def failed(tmp_path: Path, fault: str, planted: str = "") -> bool:
    journal = Journal()
    run = traced(MEND, tmp_path / "log", planted, inject=[fault])
    assert run.status == 0, run.err
    heard(journal, run.out.splitlines())
    journal.holds_and_goes_on(Disk(tmp_path / "log"))
    return "mends" in run.out


@pytest.mark.parametrize("call", ["pwritev2", "fdatasync", "fsync", "rename"])
def test_a_call_that_fails_once_costs_nothing_acknowledged(tmp_path: Path, call: str) -> None:
    assert failed(tmp_path, fail_at(call, 8))


def test_a_sync_that_fails_for_ever_ends_the_appends_and_costs_nothing_acknowledged(
    tmp_path: Path,
) -> None:
    assert not failed(tmp_path, fail_from("fdatasync", 9))


@pytest.mark.long
@pytest.mark.timeout(85)
@pytest.mark.parametrize("fault", [partial(fail_at, error="ENOSPC"), fail_at, fail_from])
@pytest.mark.parametrize("call", ["pwritev2", "fdatasync", "fsync", "rename"])
def test_each_call_that_fails_once_or_from_then_on_costs_nothing_acknowledged(
    tmp_path: Path, call: str, fault: Callable[[str, int], str]
) -> None:
    assert failed_at_calls(tmp_path, call, fault) or fault is fail_from


def failed_at_calls(
    tmp_path: Path, call: str, fault: Callable[[str, int], str], planted: str = ""
) -> int:
    """How many were mended."""
    mended = 0
    for nth in range(4, 36):
        (directory := tmp_path / str(nth)).mkdir()
        mended += failed(directory, fault(call, nth), planted)
    return mended


@pytest.mark.damages
def test_a_write_that_failed_and_is_taken_for_written_is_missed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"not what was appended|is damaged"):
        failed_at_calls(tmp_path, "pwritev2", fail_at, "failed_writes_taken_for_written")


def append_until_failure(journal: Journal, log: Log) -> None:
    for number in range(1, 200):
        try:
            journal.append(log, number % 4 + 1)
        except StorageFailed:
            return
    raise AssertionError("there was room for all of it")


def test_a_full_disk_costs_nothing_acknowledged_and_the_log_goes_on_when_there_is_room(
    tmp_path: Path,
) -> None:
    on_a_full_disk(tmp_path)


def on_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path, 1 << 20) as path:
        disk, journal = Disk(path / "log"), Closing()
        log = Log(disk, 0x0123456789ABCDEF, now_ns=0, segment_bytes=6000)
        for pages in (1, 2, 3, 5, 8):
            with filled(path, room_bytes=pages * 4096):
                append_until_failure(journal, log)
                with contextlib.suppress(StorageFailed):
                    log.mend()
            log.mend()
            journal.mended(log)
            journal.append(log, 1)
        log.close()
        journal.holds_and_goes_on(disk)
        journal.close()


def test_writes_that_are_cut_short_cost_nothing_acknowledged(tmp_path: Path) -> None:
    with_writes_cut_short(tmp_path)


def with_writes_cut_short(tmp_path: Path) -> None:
    disk, journal = Disk(tmp_path / "log"), Journal()
    log = Log(disk, 0x0123456789ABCDEF, now_ns=0, segment_bytes=10_000)
    for limit in range(200, 3000, 41):
        size = log.segments[-1].size
        with limited(resource.RLIMIT_FSIZE, max(limit, size + limit % 100)):
            append_until_failure(journal, log)
        assert mends(log)
        journal.mended(log)
        journal.append(log, 1)
    log.close()
    journal.holds_and_goes_on(disk)


def test_a_sync_that_really_failed_is_not_believed_by_the_next_process(tmp_path: Path) -> None:
    after_a_failed_sync(tmp_path, killed=True)


def test_a_sync_that_really_failed_is_not_believed_once_it_was_mended(tmp_path: Path) -> None:
    after_a_failed_sync(tmp_path, killed=False)


def after_a_failed_sync(tmp_path: Path, *, killed: bool) -> None:
    """The disk lacks what memory still has; a second sync would succeed, in this process and in the
    next."""
    with thin_disk(tmp_path) as thin:
        disk, journal = Disk(thin.path / "log"), Closing()
        log = Log(disk, 0x0123456789ABCDEF, now_ns=0)
        journal.append(log, 3)
        journal.attempted = 20_000
        with filled(thin.image.parent):
            with pytest.raises(StorageFailed):
                append(log, range(3, 20_000))
            if killed:
                log._file.close()
        if killed:
            log = Log(disk, 0x0123456789ABCDEF, now_ns=0)
        else:
            log.mend()
        journal.mended(log)
        journal.append(log, 2)
        thin.cut_power(JOURNAL_KEPT)
        log.close()
        thin.restore_power()
        journal.holds(disk)
        journal.close()


@pytest.mark.damages
@pytest.mark.parametrize(
    ("planted", "trial"),
    [
        (gone_on_with_after_a_failure, partial(after_a_failed_sync, killed=False)),
        (memory_believed_after_a_failed_sync, partial(after_a_failed_sync, killed=True)),
        (gone_on_with_after_a_failure, on_a_full_disk),
        (gone_on_with_after_a_failure, with_writes_cut_short),
    ],
)
def test_what_is_believed_of_a_disk_that_failed_is_found_out(
    tmp_path: Path, planted: Planting, trial: Callable[[Path], None]
) -> None:
    with planted(), pytest.raises((AssertionError, LogDamaged), match=r"^lost|is damaged"):
        trial(tmp_path)
