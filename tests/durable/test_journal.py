"""The journal of a group, on a disk that fails: what was written survives the process, what was
synced the machine; what does not read is left out, and nothing is read that nobody wrote."""

from __future__ import annotations

from itertools import count
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.durable.group import GroupOptions
from mesh.durable.journal import MAGIC, Beginning, Journal
from mesh.durable.progress import Progress
from mesh.errors import LogDamaged
from tests.support.fake_disk import FakeDisk, Operation, Stopped

PARTITION = 0x1234_5678_9ABC_DEF0
BEGINNING = Beginning("orders", GroupOptions(), 3, 7)
REPLACE: list[Operation] = ["create", "append", "sync", "rename", "names"]


def nth(number: int) -> Progress:
    """Each says something else."""
    return Progress(((number * 10, number * 10 + 5),), ((number * 10 + 5, number * 10 + 9, 1),))


def joined(*progress: Progress) -> Progress:
    """What a snapshot says of all of it."""
    settled = [each for some in progress for each in some.settled]
    deliveries = [each for some in progress for each in some.deliveries]
    return Progress(tuple(settled), tuple(deliveries))


def begun(disk: FakeDisk, *said: Progress, partition: int = PARTITION) -> Journal:
    """With an empty snapshot, and then what was said."""
    journal = Journal(disk, "g", partition)
    journal.begin(BEGINNING, Progress())
    for each in said:
        assert journal.append(each)
    return journal


def read(disk: FakeDisk, partition: int = PARTITION) -> list[Progress]:
    """All that it says. Raises `LogDamaged`."""
    beginning, progress = Journal(disk, "g", partition).read()
    assert beginning == BEGINNING
    return progress


def whole(partition: int = PARTITION) -> tuple[bytes, list[int]]:
    """A small journal, and where each of its entries ends; the first is the beginning."""
    disk = FakeDisk()
    journal = Journal(disk, "g", partition)
    journal.begin(BEGINNING, Progress())
    entry_bytes = len(journal._entry(b""))
    data = disk.open("g").read(0, 1 << 20)
    ends = [len(MAGIC) + entry_bytes + int.from_bytes(data[4:8], "little"), len(data)]
    for number in range(4):
        journal.append(nth(number))
        ends.append(disk.open("g").size())
    return disk.open("g").read(0, 1 << 20), ends


def expect(data: bytes, said: int, partition: int = PARTITION) -> None:
    """Of a journal that holds `data`: it says as much as `said` of `whole`'s entries, or, with
    none, that it is damaged."""
    disk = FakeDisk()
    disk.replace("g", data)
    if said == 0:
        with pytest.raises(LogDamaged, match="does not say which group"):
            read(disk, partition)
    else:
        assert read(disk, partition) == [Progress(), *map(nth, range(4))][: said - 1]


# -- What is read -----------------------------------------------------------------------------


def test_a_journal_says_what_it_was_told() -> None:
    disk = FakeDisk()
    begun(disk, nth(0), nth(1))
    journal = Journal(disk, "g", PARTITION)
    assert journal.read() == (BEGINNING, [Progress(), nth(0), nth(1)])
    assert journal.left_out_bytes == 0


def test_a_journal_begun_anew_says_its_snapshot_alone() -> None:
    disk = FakeDisk()
    journal = begun(disk, nth(0), nth(1))
    journal.begin(BEGINNING, joined(nth(0), nth(1)))
    journal.append(nth(2))
    assert read(disk) == [joined(nth(0), nth(1)), nth(2)]


@pytest.mark.parametrize("partition", [PARTITION, 0])
def test_whichever_bit_is_flipped_what_is_before_it_is_read_and_nothing_else(
    partition: int,
) -> None:
    data, ends = whole(partition)
    for at in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            said = sum(end <= at for end in ends)
            expect(bytes(damaged), said, partition)


@pytest.mark.parametrize("partition", [PARTITION, 0])
def test_wherever_it_is_cut_off_what_is_before_it_is_read(partition: int) -> None:
    data, ends = whole(partition)
    for size in range(len(data) + 1):
        expect(data[:size], sum(end <= size for end in ends), partition)


@pytest.mark.parametrize("partition", [PARTITION, 0])
@pytest.mark.parametrize("length", [1, 8, 1000])
def test_whatever_is_zeros_what_is_before_it_is_read(partition: int, length: int) -> None:
    data, ends = whole(partition)
    for at in range(len(data)):
        zeros = bytes(min(length, len(data) - at))
        damaged = data[:at] + zeros + data[at + len(zeros) :]
        first = next((n for n in range(len(data)) if damaged[n] != data[n]), len(data))
        expect(damaged, sum(end <= first for end in ends), partition)
    expect(data + bytes(length), len(ends), partition)


@given(st.binary(max_size=60), st.integers(0, 6))
def test_whatever_follows_what_was_written_says_nothing(noise: bytes, entries: int) -> None:
    data, ends = whole()
    expect(data[: [len(MAGIC), *ends][entries]] + noise, entries)
    expect(noise, 0)


def test_what_is_left_out_is_counted() -> None:
    data, ends = whole()
    disk = FakeDisk()
    disk.replace("g", data[: ends[3] + 7])
    journal = Journal(disk, "g", PARTITION)
    journal.read()
    assert journal.left_out_bytes == 7


def test_the_journal_of_another_partition_says_nothing() -> None:
    disk = FakeDisk()
    begun(disk, nth(0))
    with pytest.raises(LogDamaged, match="does not say which group"):
        read(disk, PARTITION + 1)


def test_an_entry_that_means_nothing_ends_it() -> None:
    disk = FakeDisk()
    journal = begun(disk, nth(0))
    assert journal._file is not None
    journal._file.append([journal._entry(b"\x93\x01"), journal._entry(b"\xc0")])
    journal.append(nth(1))
    assert read(disk) == [Progress(), nth(0)]
    disk.replace("g", MAGIC + journal._entry(b"\xc0"))
    with pytest.raises(LogDamaged):
        read(disk)


# -- What survives ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "crash"])
def test_what_was_written_survives_a_kill_and_what_was_synced_a_crash_at_every_operation(
    how: str,
) -> None:
    for seed in range(8):
        for stop_at in count(1):
            disk = FakeDisk(seed)
            disk.faults.stop_at = stop_at
            begun_yet, written, synced = False, 0, 0
            try:
                journal = Journal(disk, "g", PARTITION)
                journal.begin(BEGINNING, Progress())
                begun_yet = True
                for number in range(6):
                    assert journal.append(nth(number))
                    written = number + 1
                    if number % 2:
                        assert journal.sync()
                        synced = written
                    if number == 3:
                        journal.begin(BEGINNING, joined(*map(nth, range(4))))
            except Stopped:
                ended = False
            else:
                ended = True
            after = disk.kill() if how == "kill" else disk.crash(Random(seed))
            if begun_yet or "g" in after.names():
                said = joined(*read(after))
                all_of_them = [joined(*map(nth, range(n))) for n in range(7)]
                safe = written if how == "kill" else synced
                assert said in all_of_them[safe : written + 2]
            if ended:
                break


@pytest.mark.parametrize("operation", ["append", "sync"])
def test_what_failed_is_not_written_to_until_it_is_begun_anew(operation: Operation) -> None:
    disk = FakeDisk()
    journal = begun(disk, nth(0))
    assert journal.sync()
    disk.faults.fail(operation)
    outcomes = [journal.append(nth(1)), journal.sync()]
    assert outcomes == [operation != "append", False]
    assert not journal.append(nth(2))
    assert not journal.sync()
    assert nth(2) not in read(disk)
    assert read(disk.crash(Random(1)))[:2] == [Progress(), nth(0)]
    journal.begin(BEGINNING, joined(nth(0), nth(1), nth(2)))
    assert journal.append(nth(3))
    assert journal.sync()
    assert read(disk.crash(Random(1))) == [joined(nth(0), nth(1), nth(2)), nth(3)]


def test_where_the_disk_is_full_a_part_of_an_entry_says_nothing() -> None:
    for room in range(20):
        disk = FakeDisk()
        journal = begun(disk, nth(0))
        disk.faults.room_bytes = room
        assert not journal.append(nth(1))
        assert read(disk.kill()) == [Progress(), nth(0)]


@pytest.mark.parametrize("operation", REPLACE)
def test_what_cannot_be_begun_anew_loses_nothing(operation: Operation) -> None:
    for seed in range(8):
        disk = FakeDisk(seed)
        journal = begun(disk, nth(0))
        assert journal.sync()
        disk.faults.fail(operation)
        with pytest.raises(OSError, match="Input/output error"):
            journal.begin(BEGINNING, joined(nth(0), nth(1)))
        assert not journal.append(nth(2))
        for after in disk.kill(), disk.crash(Random(seed)):
            assert joined(*read(after)) in (joined(nth(0)), joined(nth(0), nth(1)))
        journal.begin(BEGINNING, joined(nth(0), nth(1)))
        assert journal.append(nth(2))
        assert read(disk.kill()) == [joined(nth(0), nth(1)), nth(2)]


def test_nothing_is_synced_twice() -> None:
    disk = FakeDisk()
    journal = begun(disk)
    before = disk.faults.done["sync"]
    assert journal.sync()
    assert journal.append(nth(0))
    assert journal.sync()
    assert journal.sync()
    assert disk.faults.done["sync"] == before + 1


def test_what_has_grown_is_to_be_begun_anew_and_is_written_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mesh.durable.journal._GROWN_BYTES", 1000)
    disk = FakeDisk()
    journal = begun(disk)
    written = 1
    while journal.append(nth(written)):
        written += 1
        assert disk.open("g").size() < 1000
    assert disk.open("g").size() >= 1000
    assert len(read(disk.kill())) == written + 1
    large = joined(*map(nth, range(100)))
    journal.begin(BEGINNING, large)
    snapshot_bytes = disk.open("g").size()
    assert snapshot_bytes > 1000
    while journal.append(nth(0)):
        assert disk.open("g").size() < 4 * snapshot_bytes
    assert disk.open("g").size() >= 4 * snapshot_bytes


def test_what_is_removed_is_gone_after_a_crash() -> None:
    for seed in range(8):
        disk = FakeDisk(seed)
        begun(disk, nth(0)).remove()
        assert "g" not in disk.names()
        assert "g" not in disk.crash(Random(seed)).names()
        Journal(disk, "g", PARTITION).remove()
