"""What a log promises whatever happens to it: nothing that was acknowledged is lost, nothing wrong
is delivered, nothing goes missing in silence."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from itertools import count
from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mesh import limits
from mesh.durable import aside
from mesh.durable.batch import batch, encode
from mesh.durable.check import check
from mesh.durable.cursor import Cursor
from mesh.durable.index import Index
from mesh.durable.log import Log
from mesh.errors import LogDamaged, LogFormat, StorageFailed
from tests.support.fake_disk import Content, FakeDisk, FakeFile, Operation, Stopped
from tests.support.logs import (
    PARTITION,
    SECOND_NS,
    append,
    batches,
    bodies,
    open_log,
    record,
    sound,
    written,
)
from tests.support.trials import End, Journal, ended_at_every_operation, failed_every_time


@pytest.mark.slow
@pytest.mark.parametrize("end", ["crash", "kill"])
def test_acknowledged_records_survive_an_end_at_every_operation(end: End) -> None:
    assert ended_at_every_operation(end) > 50


@pytest.mark.slow
def test_acknowledged_records_survive_one_crash_after_another() -> None:
    """Each of them while the log recovers from the one before."""
    for seed in range(300):
        luck = Random(seed)
        disk, journal = FakeDisk(seed), Journal()
        for _ in range(6):
            disk.faults.stop_at = disk.operations + luck.randint(1, 25)
            try:
                log = journal.open(disk)
                journal.attempted = log.end
                assert log.end >= journal.acknowledged
                while True:
                    journal.append(log, luck.randint(1, 3))
            except Stopped:
                disk = disk.crash(luck) if luck.random() < 0.7 else disk.kill()
        journal.holds(disk)


# -- Damage


def small_log() -> FakeDisk:
    """Three segments, closed."""
    disk = FakeDisk()
    log = open_log(disk, segment_bytes=300)
    for number in range(7):
        append(log, [number])
    log.close()
    return disk


def contents(disk: FakeDisk) -> dict[str, bytes]:
    found = {}
    for name in disk.names():
        file = disk.open_to_read(name)
        found[name] = file.read(0, file.size())
    return found


def damaged(name: str, data: bytes) -> FakeDisk:
    disk = small_log()
    disk._directory.put(name, Content(data))
    return disk


def never_wrong(disk: FakeDisk, name: str) -> None:
    """All records are read, or else what is missing is named, and nothing was changed. What is no
    segment can be done without."""
    before = contents(disk)
    read: list[bytes] = []
    error = None
    try:
        log = open_log(disk)
        for offset in range(7):
            read += bodies(log, offset, 1)[:1]
        log.close()
    except (LogDamaged, LogFormat) as found:
        error = found
    assert read == [record(number) for number in range(len(read))], "not what was appended"
    if error is None or not name.endswith(".log"):
        assert len(read) == 7, "missing in silence"
    else:
        assert len(read) < 7
        assert not isinstance(error, LogDamaged) or error.offset >= len(read)
        assert {name: data for name, data in contents(disk).items() if name in before} == before


NAMES = small_log().names()
LOGS = [name for name in NAMES if name.endswith(".log")]


@pytest.mark.damages
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["flipped", "zeroed", "cut off", "added"])
def test_no_damaged_byte_of_a_log_yields_a_wrong_record_or_silence(name: str, fault: str) -> None:
    damage_every_byte(name, fault)


def damage_every_byte(name: str, fault: str) -> None:
    data = contents(small_log())[name]
    for at in range(len(data)):
        changed = bytearray(data)
        if fault == "flipped":
            changed[at] ^= 1 << at % 8
        elif fault == "zeroed":
            changed[at : at + 16] = bytes(len(changed[at : at + 16]))
        elif fault == "cut off":
            del changed[at:]
        else:
            changed[at:at] = b"\0"
        never_wrong(damaged(name, bytes(changed)), name)


@pytest.mark.damages
@pytest.mark.parametrize("name", LOGS)
def test_a_segment_that_is_missing_is_named(name: str) -> None:
    disk = small_log()
    disk._directory.put(name, None)
    try:
        log = open_log(disk)
    except LogDamaged:
        return
    if name == LOGS[0]:  # just as if retention had removed it
        assert log.start == int(LOGS[1][:20])
        assert bodies(log, log.start) == [record(n) for n in range(log.start, 7)]
    else:
        with pytest.raises(LogDamaged, match="the file ends"):
            bodies(log)


@pytest.mark.damages
def test_a_check_finds_what_is_behind_the_end_of_a_sealed_segment_and_what_is_not_there() -> None:
    data = contents(small_log())
    (finding,) = check(damaged(LOGS[0], data[LOGS[0]] + b"x"), PARTITION).findings
    assert (finding.file, finding.reason) == (LOGS[0], "there is no batch")
    assert finding.position == len(data[LOGS[0]])
    disk = small_log()
    disk.remove(LOGS[-1])
    (finding,) = check(disk, PARTITION).findings
    assert finding.reason == "there were 7 records"


def test_log_epochs_go_on_also_without_the_state() -> None:
    """By what the last segment says: in its batches, or in its head if it has none yet."""
    disk = FakeDisk()
    epochs = []
    for number in range(3):
        log = open_log(disk)
        append(log, [number])
        epochs.append(log.log_epoch)
        log.close()
        disk.remove("state")
    log = open_log(disk)
    append(log, [3])
    log.make_room(1000, 0)
    epochs.append(log.log_epoch)
    found = disk.kill()
    found.remove("state")
    epochs.append(open_log(found).log_epoch)
    assert epochs == sorted(set(epochs))


def test_a_log_without_any_segment_is_not_begun_anew() -> None:
    disk = small_log()
    for name in LOGS:
        disk.remove(name)
    names = disk.names()
    with pytest.raises(LogDamaged, match="no segment is left of 7 records"):
        open_log(disk)
    assert disk.names() == names


@pytest.mark.damages
def test_a_segment_in_the_place_of_another_is_named_and_not_cut_off() -> None:
    disk = damaged(LOGS[-1], contents(small_log())[LOGS[0]])
    before = contents(disk)
    with pytest.raises(LogDamaged, match=f"it is {LOGS[0]} of partition"):
        open_log(disk)
    assert contents(disk) == before


def test_a_torn_tail_is_kept_aside() -> None:
    disk = FakeDisk()
    log = open_log(disk)
    append(log, range(3))
    name = log.segments[-1].name
    size = log.size
    log.append(batches([3]), 0)
    found = disk.kill()
    file = found.open(name)
    torn = file.read(size, 70).rstrip(b"\0")
    file.truncate(size + len(torn))
    log = open_log(found)
    assert (log.end, log.torn_bytes) == (3, len(torn))
    assert contents(found)[f"{name}.{size}.torn"] == torn


def test_room_that_was_reserved_is_no_torn_tail() -> None:
    disk = FakeDisk()
    log = open_log(disk)
    append(log, range(3))
    name, size = log.segments[-1].name, log.size
    found = disk.kill()
    assert found.open(name).size() > size
    assert sound(found).torn_bytes == 0
    log = open_log(found)
    assert (log.end, log.torn_bytes, log.size) == (3, 0, size)
    assert found.open(name).size() == size
    assert not [each for each in found.names() if each.endswith(".torn")]


def test_no_room_stays_reserved_in_what_is_not_appended_to() -> None:
    disk = FakeDisk()
    log = open_log(disk)
    for n in range(30):
        append(log, [n])
    assert len(log.segments) > 1
    for segment in log.segments[:-1]:
        assert disk.open(segment.name).size() == segment.size
    log.close()
    last = log.segments[-1]
    assert disk.open(last.name).size() == last.size


def test_what_has_no_room_to_reserve_is_appended_as_long_as_there_is_room_for_it() -> None:
    disk = FakeDisk()
    log = open_log(disk, segment_bytes=1 << 20)
    disk.faults.room_bytes = 500
    append(log, range(2))
    assert bodies(log) == [record(0), record(1)]
    assert disk.open(log.segments[-1].name).size() == log.size


def test_of_a_huge_torn_tail_the_first_part_is_kept_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a file that has grown by gigabytes would take as much memory, and the log not open."""
    monkeypatch.setattr(limits, "TORN_BYTES_MAX", 100)
    disk = FakeDisk()
    log = open_log(disk)
    append(log, range(3))
    name, size = log.segments[-1].name, log.size
    written(disk, name, size, bytes(range(250)) * 20)
    log = open_log(disk)
    assert (log.end, log.torn_bytes) == (3, 5000)
    assert contents(disk)[f"{name}.{size}.torn"] == bytes(range(100))


def test_of_many_torn_tails_the_latest_are_kept_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log whose machine fails again and again fills no disk with what it never promised."""
    monkeypatch.setattr(limits, "TORN_BYTES_MAX", 100)
    monkeypatch.setattr(limits, "TORN_FILES_MAX", 3)
    disk = FakeDisk()
    found: list[list[int]] = []
    for bytes_torn in (10, 20, 30, 40, 70, 5, 100):
        log = open_log(disk)
        append(log, range(log.end, log.end + 20))
        written(disk, log.segments[-1].name, log.segments[-1].size, b"x" * bytes_torn)
        open_log(disk)
        found.append([size for name, size in aside.kept(disk).items()])
    assert found == [
        [10],
        [10, 20],
        [10, 20, 30],
        [20, 30, 40],
        [70],
        [70, 5],
        [100],
    ]
    report = sound(disk)
    assert (report.aside, report.aside_bytes) == (1, 100)


# -- What a crash may leave, and what it may not


def test_a_hole_in_one_append_is_cut_off_with_all_behind_it() -> None:
    """The disk took the second of two batches, and not the first: nobody was told of either."""
    disk = FakeDisk()
    log = open_log(disk)
    append(log, [0])
    size = log.size
    log.append(batches([1, 2]), 0)
    found = disk.kill()
    written(found, log.segments[-1].name, size, bytes(72))
    log = open_log(found)
    assert bodies(log) == [record(0)]
    append(log, [3])
    assert bodies(log) == [record(0), record(3)]


@pytest.mark.damages
def test_a_hole_before_what_was_acknowledged_is_damage_without_a_mark_or_a_state() -> None:
    disk = FakeDisk()
    log = open_log(disk)
    append(log, [0])
    append(log, [1])
    for name in ("state", "none"):
        found = disk.kill()
        written(found, log.segments[-1].name, 48 + 72, b"x")
        if name in found.names():
            found.remove(name)
        with pytest.raises(LogDamaged, match="body is not what was appended") as damage:
            open_log(found)
        assert damage.value.offset == 0


@pytest.mark.damages
def test_a_closed_log_protects_also_what_is_no_record() -> None:
    """Of a note no offset tells that it is missing: the mark behind it does."""
    disk = FakeDisk()
    log = open_log(disk)
    append(log, [0])
    size = log.size
    log.append([batch([b"note"], count=0)], 0)
    log.sync()
    log.close()
    for seed in range(10):
        found = disk.crash(Random(seed))
        written(found, log.segments[-1].name, size + 72, b"x")
        with pytest.raises(LogDamaged):
            open_log(found)


@pytest.mark.damages
def test_a_mark_says_that_all_before_it_is_on_disk_and_sees_to_it() -> None:
    disk = FakeDisk()
    log = Log(disk, PARTITION, now_ns=0, shown_when_synced=False)
    log.append(batches([0]), 0)
    log.mark()
    for seed in range(10):
        assert open_log(disk.crash(Random(seed))).end == 1
    found = disk.kill()
    written(found, log.segments[-1].name, 48 + 72, b"x")
    with pytest.raises(LogDamaged):
        open_log(found)


@pytest.mark.damages
def test_segments_that_are_missing_at_the_end_are_missed_though_the_log_was_not_closed() -> None:
    disk = FakeDisk()
    log = open_log(disk, segment_bytes=300)
    for number in range(12):
        append(log, [number])
    assert len(log.segments) > 3
    found = disk.kill()
    for segment in log.segments[-2:]:
        found.remove(segment.name)
    with pytest.raises(LogDamaged, match=r"the file ends; there were \d records"):
        open_log(found)


def test_a_torn_tail_that_holds_what_was_read_from_this_log_is_still_torn() -> None:
    """Whoever appends what it has read, checks, synced and all, makes no damage with it."""
    disk = FakeDisk()
    log = open_log(disk, segment_bytes=1000)
    for number in range(20):
        append(log, [number])
    found = Cursor(log, 0).read(1 << 20)
    assert isinstance(found, list)
    assert len(log.segments) > 1
    copied = b"".join(encode(each.header, PARTITION) + each.body for each in found)
    size = log.segments[-1].size
    log.append([batch([b"copied", copied], count=1)], 0)
    assert len(log.segments) > 2 or log.segments[-1].size > size
    name, tail = log.segments[-1].name, disk.kill()
    file = tail.open(name)
    start = file.size() - len(copied)
    written(tail, name, start - 3, b"xxx")
    log = open_log(tail)
    assert (log.end, log.torn_bytes) == (20, len(copied) + 78)
    append(log, [20])
    assert sound(tail).end == 21


def test_a_sync_that_failed_before_a_kill_is_not_believed_after_it() -> None:
    """Memory has what the disk has not, and calls it clean: a sync of it would do nothing. What is
    acknowledged behind it would stand behind a hole."""
    for seed in range(20):
        disk = FakeDisk(seed)
        log = open_log(disk)
        append(log, [0])
        disk.faults.fail("sync")
        with pytest.raises(StorageFailed):
            append(log, [1])
        found = disk.kill()
        log = open_log(found)
        assert bodies(log) == [record(0)]
        append(log, [2])
        for crash in range(10):
            assert bodies(open_log(found.crash(Random(crash)))) == [record(0), record(2)]


def test_time_does_not_go_back_over_a_segment_whose_head_a_crash_has_torn() -> None:
    disk = FakeDisk()
    log = open_log(disk)
    for number in range(20):
        append(log, [number], now_s=100 + number)
    found = disk.kill()
    found.open(log.segments[-1].name).truncate(10)
    state = found.open_to_read("state")
    found.remove("state")
    assert state.size()
    log = open_log(found, now_s=50)
    append(log, [99], now_s=50)
    times = [segment.index(found).time_ns for segment in log.segments]
    assert times == sorted(times)
    assert log.offset_at(int(100.5 * SECOND_NS)) == 1


def test_the_head_of_a_segment_that_was_made_and_no_more_is_on_disk_when_a_log_is_opened() -> None:
    """Or the first sync that fails takes it, and what is acknowledged then stands behind a hole."""
    for size in (0, 10):
        disk = FakeDisk()
        log = open_log(disk)
        append(log, [0])
        sealed = log.segments[-1]
        log._roll(0)
        disk.open(log.segments[-1].name).truncate(size)
        log = open_log(disk.kill())
        assert log.segments[0].size == sealed.size
        found = log.storage
        assert isinstance(found, FakeDisk)
        found.faults.fail("sync", 2)  # behind that of the log's state
        with pytest.raises(StorageFailed):
            append(log, [1])
        log.mend()
        append(log, [2])
        assert bodies(open_log(found.kill())) == [record(0), record(2)]


# -- A disk that fails while it is used


def test_nothing_is_acknowledged_after_a_failed_sync_until_it_was_mended() -> None:
    """And the sync is not repeated: the second would succeed, and the data be gone."""
    disk = FakeDisk()
    log = open_log(disk)
    append(log, range(3))
    disk.faults.fail("sync")
    with pytest.raises(StorageFailed, match="Input/output error"):
        append(log, [3])
    for _ in range(2):
        with pytest.raises(StorageFailed):
            log.append(batches([3]), 0)
        with pytest.raises(StorageFailed):
            log.sync()
        with pytest.raises(StorageFailed):
            log.mark()
    assert bodies(log) == [record(number) for number in range(3)]
    log.mend()
    assert (log.end, log.unsynced_lost) == (3, 1)
    append(log, [3])
    for seed in range(20):
        assert bodies(open_log(disk.crash(Random(seed)))) == [record(n) for n in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["append", "create", "sync", "rename", "names"])
def test_a_failure_at_any_time_costs_no_acknowledged_record(operation: Operation) -> None:
    failed_every_time(operation)


@pytest.mark.parametrize("removal", ["works", "fails"])
@pytest.mark.parametrize("operation", ["append", "sync", "names"])
def test_a_segment_that_could_not_be_begun_hides_nothing(operation: str, removal: str) -> None:
    """It may come back with a crash, and must not be taken for the last one."""
    disk, journal = FakeDisk(), Journal()
    log = journal.open(disk)
    journal.append(log, 2)
    # The next append does not fit, and rolls: after a sync of the old segment, if need be.
    disk.faults.fail(operation)  # type: ignore[arg-type]
    if removal == "fails":
        disk.faults.fail("remove")
    with pytest.raises(StorageFailed):
        log.append(batches(range(10, 20)), 0)
    with contextlib.suppress(StorageFailed):
        log.mend()
    log.mend()
    journal.append(log, 1)  # which fits
    assert len(log.segments) == 1
    for seed in range(30):
        journal.holds(disk.crash(Random(seed)))
    journal.holds(disk.kill())


def test_a_sync_that_fails_in_mending_leaves_no_more_than_was_synced_before() -> None:
    disk = FakeDisk()
    log = open_log(disk)
    append(log, [0])
    log.append(batches([1]), 0)
    disk.faults.fail("append")
    with pytest.raises(StorageFailed):
        log.append(batches([2]), 0)
    disk.faults.fail("sync")
    with pytest.raises(StorageFailed):
        log.mend()
    log.mend()
    assert (log.end, log.unsynced_lost) == (1, 1)
    append(log, [3])
    for seed in range(20):
        assert bodies(open_log(disk.crash(Random(seed)))) == [record(0), record(3)]


def test_a_full_disk_refuses_appends_and_goes_on_when_there_is_room() -> None:
    disk = FakeDisk()
    log = open_log(disk)
    append(log, range(3))
    disk.faults.room_bytes = 100
    with pytest.raises(StorageFailed, match="No space left") as failure:
        append(log, range(3, 10))
    assert isinstance(failure.value.__cause__, OSError)
    assert failure.value.__cause__.errno == errno.ENOSPC
    assert bodies(log) == [record(number) for number in range(3)]
    log.mend()
    disk.faults.room_bytes = 0
    with pytest.raises(StorageFailed):
        append(log, [3])
    log.mend()
    assert sound(disk).end == 3
    disk.faults.room_bytes = None
    append(log, range(3, 10))
    assert bodies(log) == [record(number) for number in range(10)]
    assert sound(disk).end == 10


def test_a_log_opens_and_is_read_on_a_full_disk() -> None:
    disk = FakeDisk()
    log = open_log(disk)
    append(log, range(3))
    log.append(batches([3]), 0)
    found = disk.kill()
    found.open(log.segments[-1].name).truncate(log.size - 5)
    found.faults.room_bytes = 0
    log = open_log(found)
    assert bodies(log) == [record(number) for number in range(3)]
    log.close()


def test_what_was_cut_off_has_a_log_epoch_of_its_own() -> None:
    """So that whoever has seen it can tell what has the same offset now from it."""
    disk = FakeDisk()
    log = open_log(disk)
    append(log, [0])
    epoch = log.log_epoch
    log.append(batches([1]), 0)
    disk.faults.fail("sync")
    with pytest.raises(StorageFailed):
        log.sync()
    log.mend()
    (header,) = log.append(batches([2]), 0)
    assert epoch < header.log_epoch == log.log_epoch
    for seed in range(10):  # also if nothing is left of that
        assert open_log(disk.crash(Random(seed))).log_epoch > header.log_epoch


def test_a_segment_that_cannot_be_removed_keeps_those_behind_it() -> None:
    """Or there would be a hole."""
    disk = FakeDisk()
    log = open_log(disk)
    for number in range(60):
        append(log, [number])
    count = len(log.segments)
    for nth in (1, 3):  # an index first, and then its segment
        disk.faults.fail("remove", nth)
        removed = log.trim(60)
        assert removed < count - 1
        assert log.start == log.segments[0].base
        assert bodies(log, log.start) == [record(n) for n in range(log.start, 60)]
        assert sound(disk).start == log.start
    log.trim(60)
    assert len(log.segments) == 1


@pytest.mark.parametrize("nth", range(1, 5))
@pytest.mark.parametrize("done", [False, True])
def test_a_removal_that_is_interrupted_leaves_no_hole(
    monkeypatch: pytest.MonkeyPatch, nth: int, done: bool
) -> None:
    """Before the file has gone, or after it."""
    disk, left, remove = FakeDisk(), nth, FakeDisk.remove
    log = open_log(disk)
    for number in range(60):
        append(log, [number])

    def interrupted(disk: FakeDisk, name: str) -> None:
        nonlocal left
        left -= 1
        if left or done:
            remove(disk, name)
        if not left:
            raise KeyboardInterrupt

    monkeypatch.setattr(FakeDisk, "remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        log.trim(60)
    log.trim(log.segments[-2].base)
    for seed in range(10):
        sound(disk.crash(Random(seed)))
    log.trim(60)
    assert sound(disk).segments == len(log.segments) == 1


def test_of_a_segment_that_was_removed_nothing_stays() -> None:
    """Not even if the process was killed meanwhile; and what belongs to a segment is not taken for
    what belongs to another."""
    for stop_at in count(1):
        disk = FakeDisk(stop_at)
        log = open_log(disk, segment_bytes=300)
        for number in range(12):
            append(log, [number])
        disk.replace(f"{log.segments[0].name}.100.torn", b"torn")
        disk.replace(f"{log.segments[-1].name}.100.torn", b"torn")
        disk.faults.stop_at = disk.operations + stop_at
        with contextlib.suppress(Stopped):
            log.trim(12)
        stopped, found = disk.operations == disk.faults.stop_at, disk.kill()
        log = open_log(found, segment_bytes=300)
        log.trim(12)
        last = log.segments[-1].name
        assert found.names() == [last, f"{last}.100.torn", "state"]
        if not stopped:
            break
    assert stop_at > 5


@pytest.mark.parametrize("second", [1, 2])
@pytest.mark.parametrize("first", [1, 2])
def test_what_the_opening_before_removed_is_gone_before_more_is_removed(
    first: int, second: int
) -> None:
    """It was killed before its removal was on disk: where the power fails then, the segments behind
    it must not be gone alone."""
    disk = FakeDisk()
    log = open_log(disk, segment_bytes=300)
    for number in range(12):
        append(log, [number])
    log.close()
    disk.sync()
    disk.faults.fail("names", first)
    log.trim(log.segments[1].base)
    found = disk.kill()
    log = open_log(found, segment_bytes=300)
    found.faults.fail("names", second)
    log.trim(log.segments[1].base)
    for seed in range(50):
        sound(found.crash(Random(seed)))


def test_whatever_an_append_ends_in_nothing_follows_until_it_was_mended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when it is no error of the disk: what is in the file then, nobody has taken note of."""
    disk = FakeDisk()
    log = open_log(disk)
    append(log, [0])
    with monkeypatch.context() as patch:
        patch.setattr(Index, "note", fails_with(MemoryError))
        with pytest.raises(MemoryError):
            append(log, [1])
    with pytest.raises(StorageFailed):
        append(log, [2])
    log.mend()
    append(log, [3])
    assert bodies(log) == [record(0), record(3)]
    assert sound(disk).end == 2


def fails_with(error: type[BaseException]) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_sealed_segment_that_does_not_close_well_hides_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of it is on disk, and the next segment is in use."""
    disk = FakeDisk()
    log = open_log(disk, segment_bytes=300)
    append(log, range(2))
    with monkeypatch.context() as patch:
        patch.setattr(FakeFile, "close", fails_with(OSError))
        log.make_room(300, 0)
    with contextlib.suppress(StorageFailed):
        append(log, [2])
    log.mend()
    append(log, [3])
    assert bodies(open_log(disk.kill()))[:2] == [record(0), record(1)]
    assert record(3) in bodies(open_log(disk.kill()))


class LogMachine(RuleBasedStateMachine):
    """A log against a list, on a disk that does all it may."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = FakeDisk(1)
        self.log = open_log(self.disk, segment_bytes=600)
        self.records: list[int] = []
        """Those that must be there."""
        self.unsure: list[int] = []
        """Those that may be, behind them."""
        self.number = 0
        self.trimmed = 0
        self.now_ns = 0

    @rule(seconds=st.integers(-5, 10))
    def clock(self, seconds: int) -> None:
        """It is set back now and then."""
        self.now_ns = max(0, self.now_ns + seconds * SECOND_NS)

    def numbers(self, count: int) -> list[int]:
        self.number += count
        return list(range(self.number - count, self.number))

    @rule(count=st.integers(1, 5))
    def append(self, count: int) -> None:
        numbers = self.numbers(count)
        try:
            self.log.append(batches(numbers), self.now_ns)
        except StorageFailed:
            self.mend(numbers)
        else:
            self.unsure += numbers

    @rule(bytes_=st.integers(1, 600))
    def make_room(self, bytes_: int) -> None:
        """For what is refused then."""
        try:
            self.log.make_room(bytes_, self.now_ns)
        except StorageFailed:
            self.mend([])

    @rule()
    def sync(self) -> None:
        try:
            self.log.sync()
        except StorageFailed:
            self.mend([])
        else:
            self.settle(len(self.records) + len(self.unsure))

    @rule()
    def mark(self) -> None:
        try:
            self.log.mark()
        except StorageFailed:
            self.mend([])

    def mend(self, failed: list[int]) -> None:
        self.unsure += failed
        mended = False
        while not mended:
            with contextlib.suppress(StorageFailed):  # the next fault is its own
                self.log.mend()
                mended = True
        self.settle(self.log.end)

    def settle(self, end: int) -> None:
        """So many of them are there for sure, and no others may come back."""
        assert len(self.records) <= end, "lost"
        assert end <= len(self.records) + len(self.unsure), "invented"
        self.records += self.unsure[: end - len(self.records)]
        self.unsure.clear()

    @rule(offset=st.integers(0, 100))
    def trim(self, offset: int) -> None:
        offset = min(offset, len(self.records))
        self.trimmed = max(self.trimmed, offset)
        self.log.trim(offset)

    @rule(operation=st.sampled_from(["append", "sync", "create", "rename", "names", "remove"]))
    def fail(self, operation: str) -> None:
        self.disk.faults.fail(operation)  # type: ignore[arg-type]

    @rule(bytes_=st.integers(0, 300))
    def fill(self, bytes_: int) -> None:
        self.disk.faults.room_bytes = bytes_

    @rule()
    def empty(self) -> None:
        self.disk.faults.room_bytes = None

    @rule(seed=st.integers(0, 1 << 16))
    def crash(self, seed: int) -> None:
        self.reopen(self.disk.crash(Random(seed)))

    @rule()
    def kill(self) -> None:
        self.reopen(self.disk.kill())

    @rule(count=st.integers(1, 5), seed=st.integers(0, 1 << 16))
    def crash_after_a_failed_sync(self, count: int, seed: int) -> None:
        self.disk.faults.fail("sync")
        self.append(count)
        self.sync()
        self.crash(seed)

    @rule(count=st.integers(1, 3), missing=st.integers(1, 8))
    def crash_in_the_last_body(self, count: int, missing: int) -> None:
        """All is on the disk but its end, where there is room still: a check alone can tell."""
        self.append(count)
        if self.unsure:  # nothing has failed
            last = self.log.segments[-1]
            found = self.disk.kill()
            written(found, last.name, last.size - missing, bytes(missing))
            self.reopen(found)

    @precondition(lambda self: self.disk.faults.room_bytes is None)
    @rule()
    def close(self) -> None:
        self.disk.faults.mend()
        try:
            self.log.sync()
        except StorageFailed:
            self.mend([])
        self.log.close()
        self.reopen(self.disk.kill())

    def reopen(self, disk: FakeDisk) -> None:
        self.disk = disk
        self.log = open_log(disk, segment_bytes=600, now_s=self.now_ns / SECOND_NS)
        self.settle(self.log.end)

    @invariant()
    def is_what_it_has_to_be(self) -> None:
        log = self.log
        assert log.start <= self.trimmed
        shown = [record(number) for number in (self.records + self.unsure)[log.start :]]
        read = bodies(log, log.start)
        assert read == shown[: len(read)], "not what was appended"
        assert len(read) >= len(self.records) - log.start, "missing"

    def teardown(self) -> None:
        sound(self.disk)


TestLogMachine = LogMachine.TestCase


# -- Notes that are left out


def noted(disk: FakeDisk) -> Log:
    """One whose last segment has notes only, of which none is on disk for sure."""
    log = Log(disk, PARTITION, now_ns=0, segment_bytes=400, shown_when_synced=False)
    append(log, range(3))
    append(log, [13])
    log.make_room(1000, 0)
    for _ in range(30):
        log.append([batch([], count=0)], 3 * SECOND_NS)
    assert log.note_bytes
    return log


def test_who_looks_for_a_time_while_notes_are_left_out_finds_no_damage() -> None:
    disk = FakeDisk()
    log = noted(disk)
    disk.faults.fail("names")
    with pytest.raises(StorageFailed):
        log.condense(batch([b"all"], count=0))
    assert log.offset_at(9 * SECOND_NS) == 4
    log.mend()
    assert log.offset_at(9 * SECOND_NS) == 4
    append(log, [3], now_s=4)
    assert log.offset_at(4 * SECOND_NS) == 4
    sound(disk)


def test_notes_that_could_not_be_left_out_are_there_though_a_sync_fails_as_well() -> None:
    for seed in range(10):
        disk = FakeDisk(seed)
        log = noted(disk)
        size = log.note_bytes
        disk.faults.fail("rename")
        with pytest.raises(StorageFailed):
            log.condense(batch([b"all"], count=0))
        disk.faults.fail("sync")
        with pytest.raises(StorageFailed):
            log.mend()
        log.mend()
        assert log.note_bytes == size
        assert sound(disk.crash(Random(seed))).end == 4
