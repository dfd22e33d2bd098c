"""What a log promises while nothing fails."""

from __future__ import annotations

import pytest

from mesh.durable.batch import HEAD_BYTES, batch
from mesh.durable.check import check
from mesh.durable.cursor import Cursor, Gap
from mesh.durable.log import Log
from mesh.errors import LogDamaged, LogFormat, StorageFailed
from tests.support.fake_disk import FakeDisk, FakeFile
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


@pytest.fixture
def disk() -> FakeDisk:
    return FakeDisk()


def test_records_are_read_as_they_were_appended_across_segments(disk: FakeDisk) -> None:
    log = open_log(disk)
    for number in range(100):
        append(log, [number])
    assert len(log.segments) > 5
    assert (log.start, log.end) == (0, 100)
    assert bodies(log) == [record(number) for number in range(100)]
    for offset in (0, 1, 50, 99, 100):
        assert bodies(log, offset) == [record(number) for number in range(offset, 100)]
    assert bodies(log, 0, 1) == bodies(log), "however little is read at a time"
    assert sound(disk).end == 100


def test_a_log_goes_on_where_it_stood(disk: FakeDisk) -> None:
    log = open_log(disk)
    append(log, range(25))
    log.close()
    for _ in range(3):
        log = open_log(disk)
        assert (log.end, log.torn_bytes) == (25, 0)
        log.close()
    log = open_log(disk)
    append(log, range(25, 30))
    assert bodies(log) == [record(number) for number in range(30)]
    assert sound(disk).end == 30


def test_only_what_is_on_disk_is_shown_where_that_was_asked_for(disk: FakeDisk) -> None:
    log = open_log(disk)
    cursor = Cursor(log, 0)
    log.append(batches([0]), 0)
    assert cursor.read(100) == []
    log.sync()
    assert bodies(log) == [record(0)]
    assert cursor.read(100) != []


def test_what_is_written_is_shown_at_once_where_that_is_enough(disk: FakeDisk) -> None:
    log = Log(disk, PARTITION, now_ns=0, shown_when_synced=False)
    log.append(batches([0]), 0)
    assert (bodies(log), log.synced_end) == ([record(0)], 0)


def test_a_reader_follows_across_segments(disk: FakeDisk) -> None:
    log = open_log(disk)
    cursor, read = Cursor(log, 0), []
    for number in range(60):
        append(log, [number])
        found = cursor.read(1 << 20)
        assert isinstance(found, list)
        read += [bytes(each.body) for each in found]
    assert read == [record(number) for number in range(60)]


def test_a_batch_that_begins_before_an_offset_is_read_whole(disk: FakeDisk) -> None:
    log = open_log(disk)
    for _ in range(3):
        log.append([batch([b"ten"], count=10)], 0)
    log.sync()
    cursor = Cursor(log, 15)
    (found, last) = cursor.read(1 << 20)  # type: ignore[misc]
    assert (found.header.offset, last.header.offset, cursor.offset) == (10, 20, 30)
    cursor.move(3)
    assert cursor.read(1)[0].header.offset == 0  # type: ignore[index]


def test_offsets_are_found_by_time(disk: FakeDisk) -> None:
    log = open_log(disk)
    for number in range(50):
        append(log, [2 * number, 2 * number + 1], now_s=10 + number)
    for number in range(50):
        for at_s in (9.5 + number, 10 + number):
            assert log.offset_at(int(at_s * SECOND_NS)) == 2 * number
    assert log.offset_at(0) == 0
    assert log.offset_at(1000 * SECOND_NS) == 100
    log.close()
    assert open_log(disk).offset_at(30 * SECOND_NS) == 40


def test_the_first_of_many_records_of_one_time_is_found_however_far_back_it_is(
    disk: FakeDisk,
) -> None:
    log = open_log(disk, segment_bytes=1 << 20)
    for number in range(20):
        log.append([batch([bytes(30_000)], count=1)], (number > 2) * SECOND_NS)
    log.sync()
    assert (log.offset_at(1), log.offset_at(SECOND_NS), log.offset_at(0)) == (3, 3, 0)
    entry = log.segments[-1].index(disk).at_offset(19)
    assert entry is not None
    assert entry[0] > log.size - 130_000, "reading begins near it"
    for offset in range(20):
        (found, *_) = Cursor(log, offset).read(1)  # type: ignore[misc]
        assert found.header.offset == offset


def test_time_never_goes_back_in_a_log(disk: FakeDisk) -> None:
    log = open_log(disk)
    append(log, [0], now_s=100)
    append(log, [1], now_s=50)
    log.close()
    log = open_log(disk)
    append(log, [2], now_s=0)
    append(log, [3], now_s=20)  # see `mesh.durable.clock`
    found = Cursor(log, 0).read(1 << 20)
    assert isinstance(found, list)
    assert [each.header.time_ns // SECOND_NS for each in found] == [100, 100, 100, 110]


def test_a_log_that_is_given_up_from_the_front_goes_on(disk: FakeDisk) -> None:
    log = open_log(disk)
    append(log, range(10))
    behind, within = Cursor(log, 3), Cursor(log, 3)
    assert within.read(1)
    for number in range(10, 60):
        append(log, [number])
    second = log.segments[1].base
    assert log.trim(second - 1) == 0
    assert log.trim(second) == 1
    assert (log.start, log.end) == (second, 60)
    assert behind.read(1) == Gap(3, second - 1)
    assert bytes(behind.read(1)[0].body) == record(second)  # type: ignore[index]
    assert bytes(within.read(1)[0].body) == record(4), "it had the file open"  # type: ignore[index]
    assert log.trim(1000) == len(disk.names()) - 2 or log.segments
    assert len(log.segments) == 1
    log.close()
    log = open_log(disk)
    assert bodies(log, log.start) == [record(number) for number in range(log.start, 60)]
    assert sound(disk).start == log.start


def test_an_index_that_is_missing_old_or_damaged_is_made_again(disk: FakeDisk) -> None:
    log = open_log(disk)
    for number in range(60):
        append(log, [number])
    log.close()
    names = [name for name in disk.names() if name.endswith(".index")]
    disk.remove(names[0])
    disk.replace(names[1], b"")
    disk.replace(names[2], b"nonsense")
    with_other = disk.open_to_read(names[4])
    disk.replace(names[3], with_other.read(0, with_other.size()))
    log = open_log(disk)
    for offset in range(60):
        assert bodies(log, offset)[0] == record(offset)


def test_a_mark_protects_the_last_records_and_is_never_delivered(disk: FakeDisk) -> None:
    log = open_log(disk)
    append(log, [0])
    size = log.size
    log.mark()
    log.mark()
    assert log.size == size + 72, "once"
    append(log, [1])
    log.mark()
    assert bodies(log) == [record(0), record(1)]
    assert (log.end, sound(disk).end) == (2, 2)


@pytest.mark.parametrize("more", [[], [5]])
def test_a_mark_in_a_segment_that_has_no_record_yet_is_sound(
    disk: FakeDisk, more: list[int]
) -> None:
    """There was to be room for an append, which was refused then: as long as it takes."""
    log = open_log(disk)
    append(log, range(5), now_s=1)
    assert log.make_room(1000, 2 * SECOND_NS)
    log.mark()
    append(log, more, now_s=3)
    log.close()
    assert sound(disk).torn_bytes == 0
    log = open_log(disk)
    assert (log.end, log.torn_bytes) == (5 + len(more), 0)
    assert bodies(log) == [record(number) for number in range(log.end)]


def test_opening_does_not_write_where_nothing_is_appended(disk: FakeDisk) -> None:
    log = open_log(disk)
    append(log, [0])
    log.close()
    names, operations = disk.names(), disk.faults.done.copy()
    log = open_log(disk)
    assert bodies(log) == [record(0)]
    log.close()
    assert disk.names() == names
    assert (disk.faults.done - operations).keys() <= {"sync"}


def test_opening_reads_the_last_segment_and_no_other(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(disk)
    append(log, range(200))
    for number in range(200, 300):
        append(log, [number])
    log.close()
    read: list[int] = []
    original = FakeFile.read

    def counted(file: FakeFile, at: int, length: int) -> bytes:
        data = original(file, at, length)
        read.append(len(data))
        return data

    monkeypatch.setattr(FakeFile, "read", counted)
    log = open_log(disk)
    assert len(log.segments) > 5
    assert sum(read) < log.segments[-1].size + 200 < log.size // 5


def test_a_record_may_be_larger_than_a_segment(disk: FakeDisk) -> None:
    log = open_log(disk)
    large = [batch([bytes([number]) * 3000], count=1) for number in range(5)]
    for each in large[:3]:
        log.append([each], 0)
        log.sync()
    log.append(large[3:], 0)
    log.sync()
    log.close()
    log = open_log(disk)
    assert bodies(log) == [bytes([number]) * 3000 for number in range(5)]
    assert [segment.base for segment in log.segments] == [0, 1, 2, 3]
    assert log.trim(5) == 3


def test_a_segment_of_more_than_4_gib_is_appended_to(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(disk)
    append(log, [0])
    monkeypatch.setattr(log, "_synced", 1 << 33)
    (header,) = log.append(batches([1]), 0)
    assert header.synced == (1 << 32) - 1


@pytest.mark.damages
def test_a_log_of_another_format_is_refused(disk: FakeDisk) -> None:
    open_log(disk).close()
    (name,) = [name for name in disk.names() if name.endswith(".log")]
    with_format(disk, name, 2)
    with pytest.raises(LogFormat, match=r"has format 2; this version reads format 1"):
        open_log(disk)
    with pytest.raises(LogFormat):
        check(disk, PARTITION)


def with_format(disk: FakeDisk, name: str, format: int) -> None:
    import msgspec

    from mesh.durable.batch import decode_head, encode_head

    file = disk.open(name)
    head = decode_head(file.read(0, HEAD_BYTES))
    assert head is not None
    disk.replace(name, encode_head(msgspec.structs.replace(head, format=format)))


def test_a_log_of_another_partition_is_refused(disk: FakeDisk) -> None:
    open_log(disk).close()
    with pytest.raises(LogDamaged, match="of partition 0123456789abcdef"):
        Log(disk, PARTITION + 1, now_ns=0)


def test_a_log_says_what_is_there_still_of_what_was() -> None:
    disk = FakeDisk()
    log = Log(disk, PARTITION, now_ns=0, shown_when_synced=False)
    append(log, range(3))
    epochs = [log.log_epoch]
    for _ in range(3):
        assert log.kept_since(log.log_epoch) == log.end
        log.append(batches([99]), 0)
        disk.faults.fail("sync")
        with pytest.raises(StorageFailed):
            log.sync()
        log.mend()
        epochs.append(log.log_epoch)
        append(log, [98])
    assert [log.kept_since(epoch) for epoch in epochs] == [3, 4, 5, 6]
