"""What a reader sees while the one who appends rolls, trims and mends: its records, or a gap."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mesh.durable import scan
from mesh.durable.batch import batch
from mesh.durable.check import Finding, check
from mesh.durable.cursor import Cursor, Cut, Gap
from mesh.durable.log import Log
from mesh.durable.storage import Disk
from mesh.errors import LogDamaged, StorageFailed
from tests.support.fake_disk import Content, FakeDisk, FakeFile
from tests.support.logs import (
    PARTITION,
    SECOND_NS,
    append,
    batches,
    bodies,
    open_log,
    record,
    sound,
)


class Meddled(FakeDisk):
    """One where something happens while somebody reads: before a file is opened for that, or before
    it is read the first time."""

    before_open: Callable[[], object] | None = None
    before_read: Callable[[], object] | None = None

    def open_to_read(self, name: str) -> FakeFile:
        action, self.before_open = self.before_open, None
        if action is not None:
            action()
        return MeddledFile(self, self._find(name), name)


class MeddledFile(FakeFile):
    def __init__(self, disk: Meddled, content: Content, name: str) -> None:
        super().__init__(content, name, disk.faults, writable=False)
        self._disk = disk

    def read(self, at: int, length: int) -> bytes:
        action, self._disk.before_read = self._disk.before_read, None
        if action is not None:
            action()
        return super().read(at, length)


@pytest.fixture
def disk() -> Meddled:
    return Meddled()


def filled(disk: FakeDisk, count: int = 60) -> Log:
    log = open_log(disk)
    for number in range(count):
        append(log, [number], now_s=number)
    return log


def unsynced(disk: FakeDisk, count: int = 10) -> Log:
    """One that shows what is written, and has not synced the second half."""
    log = Log(disk, PARTITION, now_ns=0, segment_bytes=4000, shown_when_synced=False)
    append(log, range(count // 2))
    for number in range(count // 2, count):
        log.append(batches([number]), 0)
    return log


def cut(log: Log, disk: FakeDisk) -> None:
    """A sync fails, and what was not on disk goes."""
    disk.faults.fail("sync")
    with pytest.raises(StorageFailed):
        log.sync()
    log.mend()


def read_to_the_end(cursor: Cursor) -> None:
    before = -1
    while cursor.offset > before:
        before = cursor.offset
        cursor.read(1 << 20)


def test_a_reader_is_told_of_a_segment_that_goes_while_it_opens_it(disk: Meddled) -> None:
    log = filled(disk)
    second = log.segments[1].base
    disk.before_open = lambda: log.trim(second)
    cursor = Cursor(log, 3)
    assert cursor.read(1) == Gap(3, second - 1)
    assert cursor.offset == second


def test_a_time_is_found_though_its_segment_goes_meanwhile(disk: Meddled) -> None:
    log = filled(disk)
    second = log.segments[1].base
    log.segments[0].index(disk)
    disk.before_open = lambda: log.trim(second)
    assert log.offset_at(SECOND_NS) == second


@pytest.mark.damages
def test_a_segment_that_is_missing_is_damage_and_no_gap(disk: Meddled) -> None:
    """A gap says that retention took it; and the reader would begin again at the front."""
    log = filled(disk)
    disk.remove(log.segments[2].name)
    cursor = Cursor(log, log.segments[1].base)
    with contextlib.closing(cursor), pytest.raises(LogDamaged, match="there is no file"):
        read_to_the_end(cursor)
    assert cursor.offset == log.segments[2].base
    with pytest.raises(FileNotFoundError):
        log.offset_at(log.segments[2].base * SECOND_NS)


def test_an_index_that_cannot_be_read_costs_nothing_but_time(
    disk: Meddled, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = filled(disk)
    log.close()
    log = open_log(disk)
    open_to_read = disk.open_to_read

    def fails(name: str) -> FakeFile:
        if name.endswith(".index"):
            raise OSError(5, "Input/output error")
        return open_to_read(name)

    monkeypatch.setattr(disk, "open_to_read", fails)
    assert bodies(log, 20) == [record(number) for number in range(20, 60)]


@pytest.mark.parametrize("then", [(), (13, 14, 15), (13, *range(20, 30))])
def test_what_is_cut_off_while_it_is_read_is_no_damage(
    disk: Meddled, then: tuple[int, ...]
) -> None:
    def cut_and_go_on() -> None:
        cut(log, disk)
        append(log, then)

    log = unsynced(disk)
    disk.before_read = cut_and_go_on
    cursor = Cursor(log, 7)
    assert cursor.read(1 << 20) == Cut(5, 6)
    assert bodies(log, cursor.offset) == [record(number) for number in then]
    assert bodies(log) == [record(number) for number in (*range(5), *then)]


def test_what_a_failed_sync_has_lost_while_it_is_read_is_no_damage() -> None:
    for seed in range(10):
        disk = Meddled(seed)
        log = unsynced(disk)
        disk.faults.fail("sync")
        disk.before_read = partial(fails, log)
        assert bodies(log, 7) in ([], [record(number) for number in range(7, 10)])
        log.mend()
        assert bodies(log) == [record(number) for number in range(5)]


def fails(log: Log) -> None:
    with pytest.raises(StorageFailed):
        log.sync()


@pytest.mark.damages
@pytest.mark.parametrize("segment", [1, -1])
def test_damage_is_named_to_whoever_reads_it_or_looks_for_a_time(
    disk: Meddled, segment: int
) -> None:
    log = filled(disk, 55)
    name, base = log.segments[segment].name, log.segments[segment].base
    file = disk.open(name)
    whole = bytearray(file.read(0, file.size()))
    whole[48 + 72] ^= 1
    disk._directory.put(name, Content(bytes(whole)))
    cursor = Cursor(log, base)
    with pytest.raises(LogDamaged, match="body is not what was appended") as damage:
        cursor.read(1)
    assert (damage.value.file, damage.value.offset) == (name, base)
    cursor.close()
    with pytest.raises(LogDamaged, match="body is not what was appended"):
        log.offset_at((base + 1) * SECOND_NS)


def test_a_time_is_not_found_in_what_is_not_shown(disk: Meddled) -> None:
    log = filled(disk, 1)
    log.append(batches([1]), 1 * SECOND_NS)
    log.append(batches([2]), 2 * SECOND_NS)
    assert log.offset_at(2 * SECOND_NS) == log.tip.offset == 1
    log.sync()
    assert log.offset_at(2 * SECOND_NS) == 2


def test_a_time_is_looked_for_in_what_is_left_after_a_cut(disk: Meddled) -> None:
    log = Log(disk, PARTITION, now_ns=0, segment_bytes=4000, shown_when_synced=False)
    append(log, [0], now_s=1)
    log.append(batches([1]), 2 * SECOND_NS)
    disk.before_read = lambda: cut(log, disk)
    assert log.offset_at(2 * SECOND_NS) == 1


def test_a_reader_behind_a_cut_is_told_and_reads_what_stands_there_now(disk: Meddled) -> None:
    """Its old place would be in the middle of something else, and behind some of it."""
    log = unsynced(disk)
    cursor = Cursor(log, 0)
    while cursor.offset < 10:
        assert cursor.read(1)
    cut(log, disk)
    assert cursor.read(1) == Cut(5, 9)
    assert cursor.read(1) == []
    append(log, [13])
    append(log, range(20, 30))
    found = cursor.read(1 << 20)
    assert isinstance(found, list)
    assert [bytes(each.body) for each in found] == [record(n) for n in (13, *range(20, 30))]


def test_a_place_from_before_a_cut_is_none_behind_it_however_late_it_was_found(
    disk: Meddled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has its new epoch already, and the file has not been cut yet."""
    log, truncate = unsynced(disk), FakeFile.truncate
    cursor = Cursor(log, 0)
    to_be_cut, was_read = threading.Event(), threading.Event()
    mending = threading.Thread(target=cut, args=(log, disk))

    def truncate_later(file: FakeFile, size: int) -> None:
        to_be_cut.set()
        assert was_read.wait(30)
        truncate(file, size)

    def mend() -> None:
        mending.start()
        assert to_be_cut.wait(30)

    monkeypatch.setattr(FakeFile, "truncate", truncate_later)
    disk.before_open = mend
    found = cursor.read(1 << 20)
    assert isinstance(found, list)
    assert len(found) == 10
    was_read.set()
    mending.join()
    log.append([batch([b"of another size"], count=1) for _ in range(10)], 0)
    assert cursor.read(1 << 20) == Cut(5, 9)
    found = cursor.read(1 << 20)
    assert isinstance(found, list)
    assert [each.header.offset for each in found] == list(range(5, 15))


def test_a_failed_log_shows_what_is_on_disk_and_the_rest_when_it_was_mended() -> None:
    disk = FakeDisk()
    log = unsynced(disk)
    disk.faults.fail("append")
    with pytest.raises(StorageFailed):
        append(log, [10])
    assert bodies(log) == [record(number) for number in range(5)]
    log.mend()
    assert bodies(log) == [record(number) for number in range(10)]
    log.close()


def test_a_reader_lets_go_of_its_file_whatever_it_meets(disk: Meddled) -> None:
    log = filled(disk)
    cursor = Cursor(log, 0)
    assert cursor.read(1)
    place = cursor._place
    assert place is not None
    cursor.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        place.file.size()
    assert cursor.read(1)


# -- A check beside whoever appends


def test_a_check_finds_nothing_amiss_in_a_log_that_grows_meanwhile(disk: Meddled) -> None:
    log = filled(disk, 5)

    def grow() -> None:
        for number in range(5, 40):
            append(log, [number])
        log.close()

    disk.before_read = grow
    assert sound(disk).end in range(5, 41)


@pytest.mark.parametrize("nth", [0, 1, 2])
def test_a_check_finds_nothing_amiss_in_a_log_that_is_trimmed_meanwhile(
    disk: Meddled, nth: int
) -> None:
    log = filled(disk)
    to = log.segments[nth + 1].base

    def after_the_state() -> None:
        disk.before_open = lambda: log.trim(to)

    disk.before_open = after_the_state
    report = sound(disk)
    assert (report.start, report.end) == (to, 60)


def before_read(nth: int, disk: Meddled, action: Callable[[], object]) -> None:
    left = nth

    def meddle() -> None:
        nonlocal left
        left -= 1
        if left:
            disk.before_read = meddle
        else:
            action()

    disk.before_read = meddle


def cut_and_filled_anew(log: Log, disk: FakeDisk) -> None:
    cut(log, disk)
    while log.end < 30:
        log.append([batch([b"of another size"], count=1)], 0)
        log.sync()


def test_a_check_finds_nothing_amiss_in_a_log_that_is_cut_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What stands there then need not go on with what was read before."""
    monkeypatch.setattr(scan, "_CHUNK_BYTES", 100)
    for nth in range(1, 33):
        disk = Meddled()
        log = unsynced(disk, 30)
        before_read(nth, disk, partial(cut_and_filled_anew, log, disk))
        assert sound(disk).end == log.end == 30


@pytest.mark.damages
def test_a_check_names_a_segment_that_is_missing(disk: Meddled) -> None:
    log = filled(disk)
    disk.remove(log.segments[2].name)
    (finding,) = check(disk, PARTITION).findings
    assert finding.reason == f"it begins with offset {log.segments[3].base:,}"


# -- For real


@pytest.mark.slow
def test_readers_and_checks_beside_an_appender_see_each_record_once_and_nothing_else(
    tmp_path: Path,
) -> None:
    disk = Disk(tmp_path)
    log = open_log(disk, segment_bytes=2000)
    end = 600
    grown = threading.Condition()
    seen: list[list[int]] = [[], []]
    findings: list[Finding] = []
    looked: list[int] = []

    def wait_beyond(offset: int) -> None:
        with grown:
            assert grown.wait_for(lambda: log.tip.offset > offset, timeout=30)

    def follow(numbers: list[int]) -> None:
        with contextlib.closing(Cursor(log, 0)) as cursor:
            while cursor.offset < end:
                wait_beyond(cursor.offset)
                found = cursor.read(700)
                if isinstance(found, Gap):
                    numbers += range(found.first, found.last + 1)
                    continue
                assert isinstance(found, list)
                for each in found:
                    if each.header.count and bytes(each.body) == record(each.header.offset):
                        numbers.append(each.header.offset)

    def look() -> None:
        while not looked or looked[-1] < end:
            wait_beyond(looked[-1] if looked else 0)
            findings.extend(check(disk, PARTITION).findings)
            looked.append(log.offset_at(log.clock.time_ns) + 1)

    actions: list[Callable[[], None]] = [partial(follow, numbers) for numbers in seen]
    threads = [threading.Thread(target=action) for action in [*actions, look]]
    for thread in threads:
        thread.start()
    for number in range(end):
        log.append(batches([number]), number * SECOND_NS)
        if number % 5 == 4:
            log.sync()
            with grown:
                grown.notify_all()
        if number % 37 == 0:
            log.mark()
        if number % 101 == 0 and number > 200:
            log.trim(number - 200)
    for thread in threads:
        thread.join()
    log.close()
    assert seen == [list(range(end))] * 2
    assert not findings
    assert sound(disk).end == end
