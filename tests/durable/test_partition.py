"""What a partition promises to those who append: a receipt is for ever, a repeat gets the first
one, and what was refused is not there."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from pathlib import Path
from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mesh.durable.batch import Batch
from mesh.durable.cursor import Cursor
from mesh.durable.outcomes import OFFSET_UNKNOWN, Appended, Opened, Refused
from mesh.durable.partition import Opening, Partition
from mesh.durable.records import Derived, batch_of
from mesh.durable.storage import Disk
from mesh.errors import LogDamaged
from mesh.options import Durability, StreamOptions
from tests.support.fake_disk import Content, FakeDisk, FakeFile, Operation, Stopped
from tests.support.logs import sound, written
from tests.support.partitions import (
    PARTITION,
    SECOND_NS,
    Writing,
    appended,
    numbered,
    only,
    open_partition,
    payloads,
    record,
)


@pytest.fixture
def disk() -> FakeDisk:
    return FakeDisk()


def again(partition: Partition, disk: FakeDisk, how: str) -> Partition:
    """The partition after a restart."""
    options = partition.options
    if how == "close":
        partition.close()
        return open_partition(disk.kill(), options)
    return open_partition(disk.kill() if how == "kill" else disk.crash(Random(1)), options)


# -- Producers


def test_records_get_dense_offsets_whoever_appends(disk: FakeDisk) -> None:
    partition = open_partition(disk)
    one, other = Writing(partition, 1), Writing(partition, 2)
    assert [one.append("a").offset, other.append("b", "c").offset, one.append("d").offset] == [
        0,
        1,
        3,
    ]
    assert payloads(partition) == ["a", "b", "c", "d"]
    sound(disk)


@pytest.mark.parametrize("how", ["", "close", "kill", "crash"])
def test_a_repeat_gets_the_original_receipt(disk: FakeDisk, how: str) -> None:
    partition = open_partition(disk)
    writing = Writing(partition, 1)
    batches = [writing.batch(record(n), record(-n)) for n in range(20)]
    first = partition.commit(batches, 5 * SECOND_NS)
    if how:
        partition = again(partition, disk, how)
    repeated = partition.commit(batches, 9 * SECOND_NS)
    assert repeated == [Appended(2 * n, 2, 5 * SECOND_NS, True) for n in range(20)]
    assert first == [Appended(2 * n, 2, 5 * SECOND_NS, False) for n in range(20)]
    assert len(payloads(partition)) == 40


def test_a_repeat_beside_its_original_gets_its_receipt(disk: FakeDisk) -> None:
    partition = open_partition(disk)
    batch = Writing(partition, 1).batch(record("a"))
    assert partition.commit([batch, batch], 0) == [
        Appended(0, 1, 0, False),
        Appended(0, 1, 0, True),
    ]
    assert payloads(partition) == ["a"]


def test_part_of_a_batch_is_recognised_as_well(disk: FakeDisk) -> None:
    partition = open_partition(disk)
    writing = Writing(partition, 1)
    writing.append("a", "b", "c")
    part = numbered(batch_of([record("b")]), 1, writing.epoch, 1)
    assert partition.commit([part], 0) == [Appended(1, 1, 0, True)]


def test_a_gap_is_refused_and_says_what_is_next(disk: FakeDisk) -> None:
    partition = open_partition(disk)
    writing = Writing(partition, 1)
    writing.append("a")
    writing.seq = 5
    outcome = only(partition.commit([writing.batch(record("b"))], 0))
    assert outcome == Refused("gap", "records 5 to 5 came where 1 is the next", 1)
    assert payloads(partition) == ["a"]


def test_an_earlier_run_is_fenced_once_a_later_one_began(disk: FakeDisk) -> None:
    partition = open_partition(disk)
    early, late = Writing(partition, 1), Writing(partition, 1)
    outcome = only(partition.commit([early.batch(record("a"))], 0))
    assert isinstance(outcome, Refused)
    assert outcome.code == "fenced"
    assert late.append("b").offset == 0


@pytest.mark.parametrize("how", ["close", "kill", "crash"])
def test_a_producer_goes_on_where_it_stood_after_a_restart(disk: FakeDisk, how: str) -> None:
    partition = open_partition(disk)
    early = Writing(partition, 1)
    early.append("a", "b")
    partition = again(partition, disk, how)
    late = Writing(partition, 1)
    assert (late.seq, late.epoch) == (2, early.epoch + 1)
    outcome = only(partition.commit([early.batch(record("c"))], 0))
    assert isinstance(outcome, Refused)
    assert outcome.code == "fenced"


def test_a_producer_that_is_not_known_is_refused(disk: FakeDisk) -> None:
    partition = open_partition(disk)
    outcome = only(partition.commit([numbered(batch_of([record("a")]), 9, 1, 0)], 0))
    assert isinstance(outcome, Refused)
    assert outcome.code == "unknown"


# -- What is there already


@pytest.mark.parametrize("how", ["", "close", "kill", "crash"])
def test_a_dedup_id_is_recognised_within_its_window(disk: FakeDisk, how: str) -> None:
    partition = open_partition(disk, StreamOptions(dedup_window_s=60))
    writing = Writing(partition, 1)
    first = writing.batch(record("a", dedup_id=b"x"))
    assert appended(partition.commit([first], 10 * SECOND_NS)).offset == 0
    if how:
        partition = again(partition, disk, how)
        writing = Writing(partition, 1, 11 * SECOND_NS)
    within = writing.batch(record("b", dedup_id=b"x"))
    after = writing.batch(record("c", dedup_id=b"x"))
    assert partition.commit([within], 60 * SECOND_NS) == [Appended(0, 1, 10 * SECOND_NS, True)]
    assert partition.commit([after], 70 * SECOND_NS) == [Appended(1, 1, 70 * SECOND_NS, False)]
    assert payloads(partition) == ["a", "c"]
    # What was turned away has used up its number: asked again, it gets the same answer.
    assert partition.commit([within], 71 * SECOND_NS) == [Appended(0, 1, 10 * SECOND_NS, True)]
    assert writing.append("d", now_ns=72 * SECOND_NS).offset == 2
    sound(disk)


def test_a_dedup_id_is_forgotten_though_the_clock_had_been_ahead(disk: FakeDisk) -> None:
    """For a year an append with an id that was used before would have been taken for a repeat."""
    partition = open_partition(disk, StreamOptions(dedup_window_s=60))
    writing = Writing(partition, 1)
    assert writing.append("a year ahead", now_ns=365 * 86_400 * SECOND_NS).offset == 0

    def at(now_s: int) -> Appended:
        new = writing.batch(record(now_s, dedup_id=b"report"))
        return appended(partition.commit([new], now_s * SECOND_NS))

    first = at(10)
    assert at(60) == Appended(first.offset, 1, first.time_ns, True)
    last = at(131)
    assert (last.offset, last.repeated) == (2, False)
    assert at(132) == Appended(2, 1, last.time_ns, True)
    assert last.time_ns > first.time_ns
    sound(disk)


@pytest.mark.parametrize("how", ["", "close", "kill", "crash"])
def test_what_was_derived_from_an_input_is_there_once_for_ever(disk: FakeDisk, how: str) -> None:
    partition = open_partition(disk)
    writing = Writing(partition, 1)
    derived = [Derived(7, n, 0) for n in range(30)]
    partition.commit([writing.batch(record(n, derived=derived[n])) for n in range(30)], 0)
    if how:
        partition = again(partition, disk, how)
        writing = Writing(partition, 1)
    later = 1 << 60
    outcome = appended(partition.commit([writing.batch(record(0, derived=derived[4]))], later))
    assert (outcome.offset, outcome.repeated) == (4, True)
    other = Derived(7, 4, 1)
    assert not appended(partition.commit([writing.batch(record(0, derived=other))], later)).repeated
    assert len(payloads(partition)) == 31


def test_where_it_is_may_be_forgotten_but_not_that_it_is_there(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.limits.DERIVED_LATEST_MAX", 1)
    partition = open_partition(disk)
    writing = Writing(partition, 1)
    for n in range(3):
        partition.commit([writing.batch(record(n, derived=Derived(7, n, 0)))], 0)
    repeat = writing.batch(record(0, derived=Derived(7, 0, 0)))
    assert appended(partition.commit([repeat], 0)) == Appended(OFFSET_UNKNOWN, 1, 0, True)
    partition = again(partition, disk, "kill")
    assert appended(partition.commit([repeat], 0)) == Appended(OFFSET_UNKNOWN, 1, 0, True)


def test_two_records_cannot_share_a_dedup_id(disk: FakeDisk) -> None:
    partition = open_partition(disk)
    writing = Writing(partition, 1)
    both = writing.batch(record("a", dedup_id=b"x"), record("b"))
    outcome = only(partition.commit([both], 0))
    assert isinstance(outcome, Refused)
    assert outcome.code == "malformed"


# -- No room


def test_at_its_bound_a_partition_refuses_and_goes_on_when_there_is_room(disk: FakeDisk) -> None:
    partition = open_partition(disk, StreamOptions(bytes_max=2000))
    writing = Writing(partition, 1)
    refused = None
    while refused is None:
        batch = writing.batch(record("x" * 100))
        outcome = only(partition.commit([batch], 0))
        if isinstance(outcome, Refused):
            refused = outcome
    assert refused.code == "full"
    assert "bytes_max" in refused.text
    before = payloads(partition)
    partition.trim(partition.log.segments[-1].base)
    assert appended(partition.commit([batch], 0)).offset == len(before)
    sound(disk)


def test_what_a_partition_can_never_have_room_for_is_told_so_with_the_limit(disk: FakeDisk) -> None:
    partition = open_partition(disk, StreamOptions(bytes_max=2000))
    batch = Writing(partition, 1).batch(record("x" * 3000))
    size = batch.header.size
    assert only(partition.commit([batch], 0)) == Refused(
        "large", f"a batch of {size:,} bytes over the log's limit of 2,000 (bytes_max)"
    )


def test_a_full_disk_refuses_and_nothing_is_half_written(disk: FakeDisk) -> None:
    partition = open_partition(disk)
    writing = Writing(partition, 1)
    writing.append("a")
    disk.faults.room_bytes = 50
    batch = writing.batch(record("b"))
    outcome = only(partition.commit([batch], 0))
    assert isinstance(outcome, Refused)
    assert outcome.code == "full"
    assert payloads(partition) == ["a"]
    disk.faults.room_bytes = None
    assert appended(partition.commit([batch], 0)) == Appended(1, 1, 0, False)
    assert payloads(partition) == ["a", "b"]
    sound(disk)


def test_what_a_failed_sync_refused_is_appended_once_when_it_is_asked_again(
    disk: FakeDisk,
) -> None:
    partition = open_partition(disk)
    writing = Writing(partition, 1)
    writing.append("a")
    disk.faults.fail("sync")
    batches = [writing.batch(record("b")), writing.batch(record("c", dedup_id=b"x"))]
    for outcome in partition.commit(batches, 0):
        assert isinstance(outcome, Refused)
        assert outcome.code == "storage"
    assert [appended([each]).offset for each in partition.commit(batches, 0)] == [1, 2]
    assert payloads(partition) == ["a", "b", "c"]


def test_while_a_disk_does_not_work_everything_is_refused(disk: FakeDisk) -> None:
    partition = open_partition(disk)
    writing = Writing(partition, 1)
    writing.append("a")
    for nth in range(1, 10):
        disk.faults.fail("sync", nth, errno.EIO)
    batch = writing.batch(record("b"))
    refused = 0
    while isinstance(only(partition.commit([batch], 0)), Refused):
        refused += 1
        assert payloads(partition) == ["a"]
    assert refused > 1
    assert payloads(partition) == ["a", "b"]
    sound(disk)


def test_retention_does_not_wait_for_an_append_to_mend_what_has_failed() -> None:
    """Maybe there is none: of a queue, say, that is worked off."""
    left_undone = 0
    for nth in range(1, 8):
        disk = FakeDisk()
        partition = open_partition(disk, segment_bytes=500)
        writing = Writing(partition, 1)
        writing.append("x" * 500)
        for later in range(4):
            disk.faults.fail("sync", nth + later)
        if isinstance(only(partition.commit([writing.batch(record("y"))], 0)), Refused):
            disk.faults.mend()
            left_undone += partition._ahead and len(partition.log.segments) > 1
            partition.trim(partition.log.end)
            assert len(partition.log.segments) == 1
            sound(disk)
    assert left_undone


def test_a_run_whose_opening_a_failed_sync_took_shares_its_epoch_with_no_other(
    disk: FakeDisk,
) -> None:
    """Both are of the same second, and the log knows of the first one no more."""
    now_ns = 1_800_000_000 * SECOND_NS
    partition = open_partition(disk, StreamOptions(durability="interval"))
    Writing(partition, 1, now_ns).append("first", now_ns=now_ns)
    assert partition.sync()
    lost = Writing(partition, 1, now_ns + 5 * SECOND_NS)
    disk.faults.fail("sync")
    assert not partition.sync()
    later = Writing(partition, 1, now_ns + 5 * SECOND_NS + 1)
    assert later.epoch > lost.epoch
    refused = only(partition.commit([lost.batch(record("of nobody"))], now_ns))
    assert isinstance(refused, Refused)
    assert refused.code == "fenced"
    assert not later.append("second", now_ns=now_ns).repeated
    assert payloads(partition) == ["first", "second"]
    sound(disk)


def test_what_a_disk_does_not_let_go_of_is_not_said_to_be_refused(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there when the log is opened, and whatever had its number would be taken for it."""
    partition = open_partition(disk)
    writing = Writing(partition, 1)
    writing.append("a")
    disk.faults.fail("append", 1)
    disk.faults.fail("truncate", 1)
    monkeypatch.setattr(disk.faults.random, "randint", lambda low, high: high)  # all of it came
    b = writing.batch(record("b"))
    refused = only(partition.commit([b], 0))
    assert isinstance(refused, Refused)
    assert refused.code == "unsure"
    assert open_partition(disk.kill()).log.end == 2
    disk.faults.fail("truncate", 1)
    refused = only(partition.commit([writing.batch(record("c"))], 0))
    assert isinstance(refused, Refused)
    assert refused.code == "storage", "nothing of it was written"
    assert appended(partition.commit([b], 0)).offset == 1, "it was cut off"
    sound(disk)


# -- Opening


@pytest.mark.damages
def test_a_snapshot_spares_reading_all_segments(disk: FakeDisk) -> None:
    partition = open_partition(disk)
    writing = Writing(partition, 1)
    batches = [writing.batch(record(n)) for n in range(100)]
    for batch in batches:
        partition.commit([batch], 0)
    assert len(partition.log.segments) > 5
    found = disk.kill()
    for segment in partition.log.segments[:-1]:
        found._directory.put(segment.name, Content(b"nobody reads this"))
    partition = open_partition(found)
    assert [each.offset for each in map(appended, ([o] for o in partition.commit(batches, 0)))] == [
        *range(100)
    ]


@pytest.mark.parametrize("snapshot", [None, b"", b"12345678", b"\0" * 100])
def test_without_a_good_snapshot_the_log_tells(disk: FakeDisk, snapshot: bytes | None) -> None:
    partition = open_partition(disk)
    writing = Writing(partition, 1)
    batches = [writing.batch(record(n)) for n in range(100)]
    for batch in batches:
        partition.commit([batch], 0)
    found = disk.kill()
    found._directory.put("producers", None if snapshot is None else Content(snapshot))
    partition = open_partition(found)
    assert all(appended([each]).repeated for each in partition.commit(batches, 0))


@pytest.mark.parametrize("fault", ["kill", "fail"])
def test_what_retention_takes_is_remembered_though_no_snapshot_was_written(
    disk: FakeDisk, fault: str
) -> None:
    """A new segment has been begun, and there it ended, or the disk was full. What comes then
    takes the segments that alone could tell who appended what."""
    partition = open_partition(disk)
    writing = Writing(partition, 1)
    batches = [writing.batch(record(n, dedup_id=b"%d" % n)) for n in range(3)]
    receipts = [appended(partition.commit([each], 0)) for each in batches]
    large = Writing(partition, 2)
    disk.faults.fail("rename", 3, errno.ENOSPC)  # the state, the index, the snapshot
    large.append("x" * 900)
    assert "producers" not in disk.names()
    if fault == "kill":
        partition = open_partition(disk := disk.kill())
        assert partition.trim(partition.log.end) == 1
    else:
        disk.faults.fail("create", 1, errno.ENOSPC)
        disk.faults.fail("create", 2, errno.ENOSPC)
        assert partition.trim(partition.log.end) == 0, "nobody else could tell"
        assert partition.trim(partition.log.end) == 1
    partition = open_partition(disk.kill())
    assert partition.log.start == 3
    for each, receipt in zip(batches, receipts, strict=True):
        again = appended(partition.commit([each], 0))
        assert (again.offset, again.repeated) == (receipt.offset, True)
    other = Writing(partition, 3).batch(record(1, dedup_id=b"1"))
    assert appended(partition.commit([other], 0)).repeated


class Filled(FakeDisk):
    """A disk whose files all take from the same room, and give it back."""

    def remove(self, name: str) -> None:
        size = len(self._find(name).shown)
        super().remove(name)
        if self.faults.room_bytes is not None:
            self.faults.room_bytes += size

    def _create(self, name: str) -> FakeFile:
        made = super()._create(name)
        return FilledFile(made._content, name, self.faults, writable=True)


class FilledFile(FakeFile):
    def truncate(self, size: int) -> None:
        gained = self.size() - size
        super().truncate(size)
        if self._faults.room_bytes is not None:
            self._faults.room_bytes += gained


@pytest.mark.parametrize("gives", ["reserve", "index", "torn"])
def test_what_can_be_done_without_makes_room_for_what_tells_repeats(gives: str) -> None:
    """Or a disk that was full as a segment was begun would have no room for ever: what is
    acknowledged stays until it is on disk what tells its repeats."""
    disk = Filled()
    partition = open_partition(disk, segment_bytes=3000)
    writing = Writing(partition, 1)
    receipt = writing.append("first")
    disk.faults.fail("rename", 3, errno.ENOSPC)  # the state, the index, the snapshot
    while len(partition.log.segments) == 1:
        writing.append("x" * 200)
    assert "producers" not in disk.names()
    first = partition.log.segments[0]
    disk.remove(first.index_name)
    partition.log.free_reserve()
    size = 1 << 10
    if gives == "reserve":
        partition.log._reserve(partition.log._index.size, 1)
    elif gives == "torn":
        disk.replace(f"{first.name}.100.torn", bytes(size))
    elif gives == "index":
        disk.replace(first.index_name, bytes(size))
    disk.faults.room_bytes = 0  # but for what is given up from here on
    assert partition.trim(partition.log.end) == 1
    assert writing.append("y").offset == partition.log.end - 1
    disk.faults.room_bytes = None
    partition = open_partition(disk.kill())
    repeated = numbered(batch_of([record("first")]), 1, writing.epoch, 0)
    again = appended(partition.commit([repeated], 0))
    assert (again.offset, again.repeated) == (receipt.offset, True)


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [each.getMessage() for each in caplog.records]
    caplog.clear()
    return said


def test_why_nothing_can_be_given_up_is_said_once_until_that_changes_or_has_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is tried again every second, and some disks are full for weeks."""
    disk = Filled()
    partition = open_partition(disk, segment_bytes=3000)
    writing = Writing(partition, 1)

    def roll() -> None:
        disk.faults.fail("rename", 3, errno.ENOSPC)  # the state, the index, the snapshot
        before = len(partition.log.segments)
        while len(partition.log.segments) == before:
            writing.append("x" * 200)

    def trims(count: int, *failing: Operation, code: int = errno.ENOSPC) -> list[str]:
        for _ in range(count):
            for each in failing:
                disk.faults.fail(each, 1, code)
                disk.faults.fail(each, 2, code)
            partition.trim(partition.log.end)
            disk.faults.mend()
        return [each.partition("[")[2][:8] for each in complaints(caplog)]

    roll()
    assert len(complaints(caplog)) == 1
    assert trims(3, "create") == []
    assert trims(3, "create", code=errno.EROFS) == ["Errno 30"], "it is another reason"
    assert trims(3, "create") == ["Errno 28"]
    assert trims(1) == []
    for _ in range(2):
        roll()
        assert len(complaints(caplog)) == 1, "it had ended"
        disk.replace(partition.log.segments[0].index_name, b"")
        assert trims(3, "create", "remove") == ["Errno 28"], "what makes room cannot be removed"
        assert trims(3, "remove", code=errno.EROFS) == ["Errno 30"], "nor what is to go"
        assert trims(1) == []


def test_why_a_log_cannot_be_mended_is_said_once_until_that_changes_or_has_ended(
    disk: FakeDisk, caplog: pytest.LogCaptureFixture
) -> None:
    """Each append tries to, and each second retention does."""
    partition = open_partition(disk)
    writing = Writing(partition, 1)
    for _ in range(2):
        for nth in range(1, 8):
            disk.faults.fail("sync", nth)
        for _ in range(3):
            partition.commit([writing.batch(record("a"))], 0)
            partition.trim(partition.log.end)
        assert len(complaints(caplog)) == 1
        disk.faults.mend()
        assert partition.mend()


@pytest.mark.damages
def test_a_partition_that_cannot_be_opened_keeps_no_file_open(tmp_path: Path) -> None:
    partition = open_partition(Disk(tmp_path))
    writing = Writing(partition, 1)
    for n in range(30):
        writing.append(n)
    partition.close()
    assert len(partition.log.segments) > 2
    os.unlink(tmp_path / "producers")
    os.truncate(tmp_path / partition.log.segments[0].name, 100)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(LogDamaged):
        open_partition(Disk(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("durability", ["interval", "os"])
def test_an_unsynced_durability_answers_before_the_disk_has_it(
    disk: FakeDisk, durability: Durability
) -> None:
    options = StreamOptions(durability=durability)
    partition = open_partition(disk, options)
    writing = Writing(partition, 1)
    syncs = disk.faults.done["sync"]
    writing.append("a")
    assert disk.faults.done["sync"] == syncs
    assert payloads(partition) == ["a"]
    assert payloads(open_partition(disk.kill(), options)) == ["a"], "a killed process loses nothing"
    assert partition.sync()
    assert disk.faults.done["sync"] == syncs + 1


# -- All of it


class PartitionMachine(RuleBasedStateMachine):
    """Producers that repeat what they are not sure of, on a disk that does all it may."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = FakeDisk(1)
        self.now_ns = 0
        self.partition = self.opened()
        self.runs: dict[int, Writing] = {}
        self.receipts: dict[tuple[int, int], int] = {}
        """Offsets that were acknowledged, by producer and number."""
        self.bodies: dict[tuple[int, int], bytes] = {}
        """All that were sent, acknowledged or not."""
        self.batches: dict[tuple[int, int], Batch] = {}
        self.owed: dict[int, list[Batch]] = {}
        """What each producer has not got an answer for."""

    def opened(self) -> Partition:
        return Partition(
            self.disk, PARTITION, StreamOptions(), now_ns=self.now_ns, segment_bytes=700
        )

    @rule(producer=st.integers(1, 3))
    def begin(self, producer: int) -> None:
        outcome = only(self.partition.commit([Opening(producer)], self.now_ns))
        if isinstance(outcome, Refused):
            return
        self.owed[producer] = []
        run = Writing.__new__(Writing)
        run.partition, run.producer = self.partition, producer
        run.epoch, run.seq = outcome.epoch, outcome.seq  # type: ignore[union-attr]
        acknowledged = [seq for p, seq in self.receipts if p == producer]
        assert run.seq >= max(acknowledged, default=-1) + 1, "forgotten"
        self.runs[producer] = run

    @rule(producer=st.integers(1, 3), counts=st.lists(st.integers(1, 3), max_size=4))
    def append(self, producer: int, counts: list[int]) -> None:
        if producer not in self.runs:
            self.begin(producer)
        if producer not in self.runs:
            return
        run, owed = self.runs[producer], self.owed[producer]
        for count in counts:
            first = run.seq
            new = run.batch(*(record([producer, first + n]) for n in range(count)))
            self.bodies[producer, first] = b"".join(new.body)
            owed.append(new)
        self.now_ns += SECOND_NS
        for batch, outcome in zip(
            list(owed), self.partition.commit(owed, self.now_ns), strict=True
        ):
            if isinstance(outcome, Appended):
                self.acknowledged(batch, outcome)
                owed.remove(batch)
            else:
                assert isinstance(outcome, Refused)
                assert outcome.code != "unknown", "forgotten"

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        if self.batches:
            key = data.draw(st.sampled_from(sorted(self.batches)))
            batch = self.batches[key]
            outcome = only(self.partition.commit([batch], self.now_ns))
            if isinstance(outcome, Appended):
                assert outcome.repeated, "anew"
                self.acknowledged(batch, outcome)
            else:
                assert isinstance(outcome, Refused)
                assert outcome.code != "unknown", "forgotten"

    def acknowledged(self, batch: Batch, outcome: Appended) -> None:
        header = batch.header
        self.batches[header.producer, header.seq] = batch
        for n in range(header.count):
            key = header.producer, header.seq + n
            offset = outcome.offset + n
            assert self.receipts.setdefault(key, offset) == offset, "another receipt"

    @rule(seconds=st.integers(-5, 5))
    def clock(self, seconds: int) -> None:
        """It is set back now and then."""
        self.now_ns = max(0, self.now_ns + seconds * SECOND_NS)

    @rule()
    def rest(self) -> None:
        self.partition.rest()

    @rule(producer=st.integers(1, 3), size=st.integers(1, 900))
    def refused(self, producer: int, size: int) -> None:
        """An append out of turn, for which there is room made all the same."""
        run = self.runs.get(producer)
        if run is not None:
            new = batch_of([record("x" * size)])
            early = numbered(new, producer, run.epoch, 1 << 40)
            assert isinstance(only(self.partition.commit([early], self.now_ns)), Refused)

    @rule(operation=st.sampled_from(["append", "sync", "create", "rename", "names"]))
    def fail(self, operation: str) -> None:
        self.disk.faults.fail(operation)  # type: ignore[arg-type]

    @rule(seed=st.integers(0, 1 << 16))
    def crash(self, seed: int) -> None:
        self.disk = self.disk.crash(Random(seed))
        self.partition = self.opened()

    @rule()
    def kill(self) -> None:
        self.disk = self.disk.kill()
        self.partition = self.opened()

    @rule(
        producer=st.integers(1, 3),
        counts=st.lists(st.integers(1, 3), min_size=1, max_size=2),
        stop=st.integers(1, 4),
        missing=st.integers(0, 8),
        seed=st.integers(0, 1 << 16),
    )
    def crash_while_it_appends(
        self, producer: int, counts: list[int], stop: int, missing: int, seed: int
    ) -> None:
        """Of what it writes all may be there but its end: a check alone can tell."""
        self.disk.faults.stop_at = self.disk.operations + stop
        with contextlib.suppress(Stopped):
            self.append(producer, counts)
        log = self.partition.log
        if log.synced_end == log.end:
            self.crash(seed)
        else:
            last, self.disk = log.segments[-1], self.disk.kill()
            written(self.disk, last.name, last.size - missing, bytes(missing))
            self.partition = self.opened()

    @rule(producer=st.integers(1, 3), count=st.integers(1, 3), seed=st.integers(0, 1 << 16))
    def crash_after_a_failed_sync(self, producer: int, count: int, seed: int) -> None:
        self.disk.faults.fail("sync")
        self.append(producer, [count])
        self.crash(seed)

    @invariant()
    def each_is_there_once(self) -> None:
        log, found = self.partition.log, list[tuple[int, int]]()
        cursor = Cursor(log, log.start)
        while read := cursor.read(1 << 20):
            assert isinstance(read, list), read
            for header, body in ((each.header, each.body) for each in read if each.header.count):
                sent = self.bodies[header.producer, header.seq]
                assert body == sent, "not what was appended"
                found += [(header.producer, header.seq + n) for n in range(header.count)]
        cursor.close()
        assert len(set(found)) == len(found), "twice"
        for key, offset in self.receipts.items():
            assert found[offset : offset + 1] == [key], "lost"

    def teardown(self) -> None:
        sound(self.disk)


TestPartitionMachine = PartitionMachine.TestCase


# -- Notes


def opened(partition: Partition, producer: int) -> Opened:
    outcome = only(partition.commit([Opening(producer)], 0))
    assert isinstance(outcome, Opened), outcome
    return outcome


def test_whoever_opens_producers_in_a_loop_fills_no_disk(disk: FakeDisk) -> None:
    partition = open_partition(disk, segment_bytes=1000)
    epochs = [opened(partition, 7).epoch for _ in range(300)]
    assert epochs == list(range(epochs[0], epochs[0] + 300))
    assert partition.log.size < 2000
    writing = Writing(partition, 1)
    offsets = [writing.append(n).offset for n in range(50)]
    assert offsets == list(range(50))
    for _ in range(300):
        opened(partition, 7)
    repeat = partition.commit([writing.batch(record("x", dedup_id=b"x")) for _ in range(2)], 0)
    for _ in range(300):
        repeat += partition.commit([writing.batch(record("x", dedup_id=b"x"))], 0)
    assert {each.offset for each in repeat if isinstance(each, Appended)} == {50}
    assert partition.log.size - sum(s.size for s in partition.log.segments[:-1]) < 25_000
    assert payloads(partition) == [*range(50), "x"]
    sound(disk)


@pytest.mark.parametrize("how", ["close", "kill", "crash"])
def test_what_notes_said_is_known_when_they_were_left_out(disk: FakeDisk, how: str) -> None:
    partition = open_partition(disk)
    writing = Writing(partition, 1)
    first = [writing.batch(record(n)) for n in range(20)]
    receipts = partition.commit(first, 0)
    last = [opened(partition, 2 + n % 5).epoch for n in range(300)][-5:]
    assert partition.log.note_bytes
    writing.partition = partition = again(partition, disk, how)
    size = partition.log.note_bytes
    assert [opened(partition, 2 + n).epoch for n in range(5)] == [epoch + 1 for epoch in last]
    assert partition.log.note_bytes == size + 5 * 72, "nothing is left out again so soon"
    repeated = partition.commit(first, 0)
    assert [each.offset for each in repeated if isinstance(each, Appended)] == list(range(20))
    assert len(receipts) == len(repeated)
    assert writing.append("next").offset == 20


def test_a_stream_is_not_full_of_notes(disk: FakeDisk) -> None:
    partition = open_partition(disk, StreamOptions(bytes_max=2000), segment_bytes=100_000)
    for _ in range(200):
        opened(partition, 7)
    assert Writing(partition, 1).append("x").offset == 0


def test_readers_see_nothing_of_notes_that_are_left_out(disk: FakeDisk) -> None:
    partition = open_partition(disk)
    writing = Writing(partition, 1)
    cursor = Cursor(partition.log, 0)
    read: list[int] = []
    for number in range(40):
        writing.append(number)
        for _ in range(number % 7 * 10):
            opened(partition, 7)
            assert partition.log.offset_at(SECOND_NS) == number + 1
        found = cursor.read(1 << 20)
        assert isinstance(found, list)
        read += [each.header.offset for each in found]
    assert read == list(range(40))


class Opens:
    """Opens producers until notes are left out several times, and keeps what it was told."""

    def __init__(self, disk: FakeDisk, durability: Durability = "fsync") -> None:
        self.disk = disk
        self.options = StreamOptions(durability=durability)
        self.promised: dict[int, int] = {}
        self.refused = 0
        partition = open_partition(disk, self.options, segment_bytes=400)
        for producer in range(50, 150):  # so that the note is longer than what it stands for
            opened(partition, producer)
        writing = Writing(partition, 1)
        for number in range(3):
            writing.append(number)
        partition.sync()
        self.partition = partition

    def open(self, times: int = 30) -> None:
        for n in range(times):
            producer = 2 + n % 3
            outcome = only(self.partition.commit([Opening(producer)], 0))
            if isinstance(outcome, Opened):
                assert outcome.epoch > self.promised.get(producer, 0)
                self.promised[producer] = outcome.epoch
            else:
                self.refused += 1
                if not self.partition.log.keeps_all:
                    self.promised.clear()
            last = self.partition.log.segments[-1]
            file = self.disk.open_to_read(last.name)
            assert len(file.read(0, last.size)) == last.size
            assert not file.read(last.size, file.size()).strip(b"\0")

    def kept(self, found: FakeDisk) -> None:
        partition = open_partition(found, self.options, segment_bytes=400)
        assert payloads(partition) == [0, 1, 2]
        for producer, epoch in self.promised.items():
            assert opened(partition, producer).epoch > epoch
        sound(found)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["crash", "kill"])
def test_notes_are_left_out_whole_or_not_at_all(end: str) -> None:
    for stop_at in itertools.count(1):
        opens = Opens(FakeDisk(stop_at))
        disk = opens.disk
        disk.faults.stop_at = disk.operations + stop_at
        try:
            opens.open()
        except Stopped:
            pass
        else:
            assert disk.faults.done["rename"] > 5
            break
        for seed in range(5):
            opens.kept(disk.crash(Random(seed)) if end == "crash" else disk.kill())


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["fsync", "os"])
@pytest.mark.parametrize("operation", ["create", "append", "sync", "rename", "names", "truncate"])
def test_a_disk_that_fails_while_notes_are_left_out_costs_none_that_were_promised(
    operation: Operation, durability: Durability
) -> None:
    for nth in range(1, 60):
        opens = Opens(FakeDisk(nth), durability)
        opens.disk.faults.fail(operation, nth)
        if operation == "truncate":  # which comes when another failure is mended
            opens.disk.faults.fail("rename", nth)
        opens.open()
        assert opens.refused <= 2
        opens.kept(opens.disk.kill())
        if durability == "os":
            opens.promised.clear()
        for seed in range(3):
            opens.kept(opens.disk.crash(Random(seed)))


def test_what_is_forgotten_for_its_bounds_is_counted_since_it_was_opened(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.limits.PRODUCERS_MAX", 2)
    partition = open_partition(disk)
    for producer in (1, 2, 3, 4):
        Writing(partition, producer).append(producer)
    assert partition.forgotten == {"producer": 2}
    partition.close()
    assert open_partition(disk.again()).forgotten == {}
