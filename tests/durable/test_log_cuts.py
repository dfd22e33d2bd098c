"""What readers are told where a log has lost what they had read: which records, once each, and what
stands there then. Only where records are shown before they are on disk."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from mesh.durable import index
from mesh.durable.batch import batch
from mesh.durable.cursor import Cursor, Cut, Gap
from mesh.durable.deliveries import AskedOptions, Settlements
from mesh.durable.group import GroupOptions
from mesh.durable.log import Log
from mesh.durable.outcomes import Appended, Opened
from mesh.durable.protocol import Joined, Open
from mesh.durable.reader import PartitionReader, read
from mesh.durable.route import LocalRoute, answer
from mesh.durable.seat import Seat, Taken
from mesh.durable.sidecar import Sidecar
from mesh.errors import StorageFailed
from mesh.options import StreamOptions
from tests.durable.test_log_readers import Meddled
from tests.durable.test_sidecar import Asking
from tests.support.fake_disk import FakeDisk
from tests.support.logs import PARTITION, append, batches, open_log, record
from tests.support.waiting import until


def opened(disk: FakeDisk, segment_bytes: int = 1000) -> Log:
    return Log(disk, PARTITION, now_ns=0, segment_bytes=segment_bytes, shown_when_synced=False)


class Reader:
    """Reads on in whatever the log has become, and keeps what it read, by offset."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.cuts: list[Cut] = []
        self.start = 0
        self._log_epoch: int | None = None
        self._cursor: Cursor | None = None

    def goes_to(self, log: Log) -> None:
        """As a reader in another process does, when the sidecar has been started again."""
        self._cursor = Cursor(log, self.start + len(self.bodies), self._log_epoch)

    def read(self, bytes_max: int = 1 << 20, times: int = 1000) -> None:
        assert self._cursor is not None
        while (times := times - 1) >= 0 and (found := self._cursor.read(bytes_max)):
            self._log_epoch = self._cursor.log_epoch
            if isinstance(found, Gap):
                self.start, self.bodies = found.last + 1, []
            elif isinstance(found, Cut):
                self.cuts.append(found)
                assert found.last == self.start + len(self.bodies) - 1
                del self.bodies[max(0, found.first - self.start) :]
                self.start = min(self.start, found.first)
            else:
                for each in found:
                    if each.header.count:
                        assert each.header.offset == self.start + len(self.bodies)
                        self.bodies.append(bytes(each.body))
        self._log_epoch = self._cursor.log_epoch


def contents(log: Log) -> list[bytes]:
    reader = Reader()
    reader.start = log.start
    reader.goes_to(log)
    reader.read()
    return reader.bodies


def test_a_reader_of_an_earlier_opening_is_told_what_was_lost() -> None:
    lost = 0
    for seed in range(20):
        disk = FakeDisk(seed)
        log = opened(disk)
        log.append(batches(range(4)), 0)
        log.sync()
        reader = Reader()
        reader.goes_to(log)
        log.append(batches(range(4, 7)), 0)
        reader.read()
        assert len(reader.bodies) == 7
        found = disk.crash(Random(seed))
        log = opened(found)
        end = log.end
        log.append([batch([b"other"], count=1) for _ in range(5)], 0)
        log = opened(found.kill())  # and it has been started again since, twice
        log.append(batches([99]), 0)
        reader.goes_to(log)
        reader.read()
        assert reader.cuts == ([] if end == 7 else [Cut(end, 6)])
        assert reader.bodies == contents(log)
        lost += end < 7
    assert lost > 5


def test_who_waits_beyond_the_end_has_read_nothing_that_could_be_cut_off() -> None:
    disk = FakeDisk()
    log = opened(disk)
    log.append(batches(range(4)), 0)
    cursor = Cursor(log, 6)
    assert cursor.read(100) == []
    log = opened(disk.kill())
    cursor = Cursor(log, 6, cursor.log_epoch)
    assert cursor.read(100) == []
    log.append(batches(range(4, 8)), 0)
    (found, *_) = cursor.read(1)  # type: ignore[misc]
    assert found.header.offset == 6


@pytest.mark.parametrize("how", ["begun anew", "brought back"])
def test_a_log_in_the_place_of_another_has_none_of_its_epochs(how: str) -> None:
    """Or what was derived from a record of that one would be taken for derived from its successor,
    and who had read that one would read on in this one."""
    disk = FakeDisk()
    log = open_log(disk, now_s=1000)
    append(log, range(4))
    backup = disk.kill() if how == "brought back" else FakeDisk()
    log.close()
    log = open_log(disk, now_s=1010)
    append(log, range(4, 8))
    cursor = Cursor(log, 0)
    while cursor.read(1 << 20):
        pass
    log.close()
    anew = open_log(backup, now_s=1020)
    first = anew.end
    append(anew, range(10, 20))
    assert anew.log_epoch > log.log_epoch
    follower = Cursor(anew, 8, cursor.log_epoch)
    assert follower.read(1 << 20) == Cut(first, 7)
    assert follower.offset == first
    cursor.close()
    follower.close()


@pytest.mark.parametrize("now_s", [0, 10**10])
def test_a_clock_that_is_far_off_leaves_room_for_epochs(now_s: int) -> None:
    disk = FakeDisk()
    epochs = []
    for _ in range(3):
        log = open_log(disk, now_s=now_s)
        log.append(batches([0]), 0)
        epochs.append(log.log_epoch)
        log.close()
    assert epochs == sorted(set(epochs))
    assert epochs[-1] < (3 << 30) + 3


def steps(luck: Random) -> Iterator[str]:
    for _ in range(60):
        yield luck.choice(("append", "append", "read", "read", "sync", "fail", "crash", "trim"))


@pytest.mark.slow
def test_whatever_is_lost_readers_end_with_what_is_there_and_are_told_no_more_than_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Readers that read at any time, also across failures of the machine."""
    monkeypatch.setattr(index, "_EVERY_BYTES", 100)
    told = 0
    for seed in range(150):
        luck = Random(seed)
        disk = FakeDisk(seed)
        log = opened(disk, 500)
        readers = [Reader() for _ in range(3)]
        for reader in readers:
            reader.goes_to(log)
        number = 0
        for step in steps(luck):
            if step == "append":
                count = luck.randint(1, 4)
                log.append(batches(range(number, number + count)), 0)
                number += count
            elif step == "read":
                luck.choice(readers).read(luck.choice((1, 200, 1 << 20)), luck.randint(1, 5))
            elif step == "sync":
                log.sync()
            elif step == "trim":
                log.trim(luck.randint(log.start, log.end))
            elif step == "fail" and log.synced_end < log.end:
                disk.faults.fail("sync")
                with pytest.raises(StorageFailed):
                    log.sync()
                if luck.random() < 0.5:
                    readers[0].read()
                log.mend()
            elif step == "crash":
                disk = disk.crash(luck)
                log = opened(disk, 500)
                for reader in readers:
                    reader.goes_to(log)
        there = contents(log)
        for reader in readers:
            reader.goes_to(log)
            before, start, cuts = list(reader.bodies), reader.start, len(reader.cuts)
            reader.read()
            for cut in reader.cuts[cuts:]:
                at = cut.first - reader.start
                if at >= 0 and cut.first >= start:
                    assert before[cut.first - start] not in reader.bodies[at : at + 1], seed
            first = max(log.start, reader.start)  # a crash may bring back what was given up
            assert reader.bodies[first - reader.start :] == there[first - log.start :], seed
            told += len(reader.cuts)
        log.close()
    assert told > 100


def test_a_reader_beside_a_cut_mixes_nothing_of_before_with_what_came_after() -> None:
    """What takes the place of a record may have its length, so that all seems to fit."""
    for first in (0, 7):
        disk = Meddled()
        log = opened(disk)
        log.append(batches(range(5)), 0)
        log.sync()
        for number in range(5, 10):
            log.append(batches([number]), 0)

        def cut_and_go_on(log: Log = log, disk: FakeDisk = disk) -> None:
            disk.faults.fail("sync")
            with pytest.raises(StorageFailed):
                log.sync()
            log.mend()
            for number in range(1, 6):
                log.append(batches([number]), 0)

        disk.before_read = cut_and_go_on
        cursor = Cursor(log, first)
        if first:
            assert cursor.read(1 << 20) == Cut(5, 6)
        else:
            assert bodies_of(cursor) == [record(n) for n in range(5)]
        assert bodies_of(cursor) == [record(n) for n in range(1, 6)]


def bodies_of(cursor: Cursor) -> list[bytes]:
    found = cursor.read(1 << 20)
    assert isinstance(found, list)
    return [bytes(each.body) for each in found]


# -- Within a process


def appended(sidecar: Sidecar, asking: Asking, *payloads: object) -> None:
    for payload in payloads:
        outcome = asking.append(payload)
        assert isinstance(outcome, Appended), outcome


def next_of(reader: PartitionReader) -> list[object] | Gap | Cut:
    chunk = read(reader, 10)
    return (
        [payload for run in chunk for payload in run.payloads] if isinstance(chunk, list) else chunk
    )


@pytest.mark.slow
def test_who_reads_a_log_in_its_process_is_told_what_a_failed_sync_has_cost() -> None:
    disk = FakeDisk()
    sidecar = Sidecar(disk)
    asking = Asking(sidecar)
    options = StreamOptions(durability="interval")
    assert isinstance(asking.told(Open("orders", 7, options)), Opened)
    appended(sidecar, asking, "a", "b")
    hosted = sidecar.hosted("orders")
    assert hosted is not None
    until(lambda: hosted.log.synced_end == 2)
    reader = PartitionReader(LocalRoute(sidecar), "orders", 1 << 26)
    reader.follow = True
    assert next_of(reader) == ["a", "b"]
    disk.faults.fail("sync")
    appended(sidecar, asking, "lost")
    assert next_of(reader) == ["lost"]
    until(lambda: hosted.log.unsynced_lost == 1)
    asking.epoch, asking.seq = 0, 2
    appended(sidecar, asking, "c", "d")
    assert next_of(reader) == Cut(2, 2)
    assert next_of(reader) in (["c"], ["c", "d"])
    reader.close()
    sidecar.close()


def test_who_reads_on_in_its_process_after_a_pause_reads_nothing_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mesh.limits.READ_WAIT_MS", 1)
    monkeypatch.setattr("mesh.limits.READ_BYTES", 1)
    sidecar = Sidecar(FakeDisk())
    asking = Asking(sidecar)
    appended(sidecar, asking, 0)
    reader = PartitionReader(LocalRoute(sidecar), "orders", 1 << 26)
    reader.follow = True
    assert next_of(reader) == [0]
    ask = reader.asking()  # as if there were nothing for now
    appended(sidecar, asking, *range(1, 5))
    answer(reader.route, ask, 10, "an answer")
    found: list[object] = []
    while len(found) < 4:
        more = next_of(reader)
        assert isinstance(more, list)
        found += more
    assert found == [1, 2, 3, 4]
    until(lambda: reader.route.reply(reader.asking()))
    appended(sidecar, asking, 5)
    assert next_of(reader) == [5]
    reader.close()
    sidecar.close()


def test_what_was_not_said_yet_of_a_lost_record_is_not_said_any_more() -> None:
    sidecar = Sidecar(FakeDisk())
    handed: list[Taken] = []

    def hand_over(_: Seat, taken: Taken) -> None:
        handed.append(taken)

    seat = Seat(
        LocalRoute(sidecar),
        "orders",
        "billing",
        "member",
        prefetch=1000,
        options=AskedOptions(),
        from_ns=None,
        resume=None,
        message_bytes_max=1 << 26,
        hand_over=hand_over,
    )
    said: list[Settlements] = []
    seat.route.begin = lambda query: said.append(query.said)  # type: ignore[method-assign,assignment,return-value,union-attr,arg-type]
    seat._joined(Joined(GroupOptions(), 0, log_epoch=4))
    seat._end = 10
    with seat._lock:
        seat._unsaid.nak(1, 0.0)
        seat._unsaid.nak(8, 0.0)
        seat._unsaid.reject(9, "")
        seat._unsaid.extend([9])
    for offset in (2, 3, 7, 8, 5):
        seat.ack(offset, 4)
    seat._joined(Joined(GroupOptions(), 0, log_epoch=5, cut_at=6))
    assert handed == [Cut(6, 9)]
    seat.ack(6, 4)
    seat.ack(6, 5)
    seat._joined(Joined(GroupOptions(), 0, log_epoch=6, cut_at=10))
    seat.ack(7, 4)
    seat.route.link.run(seat._say)
    assert said == [Settlements(((2, 4), (5, 7)), ((1, 0.0),), (), ())]
    assert handed == [Cut(6, 9)]
    sidecar.close()
