"""What a log is put through on a disk in memory: ended at each operation of it, let down by each.
Whatever that leaves has to hold what was acknowledged, and the log has to go on.

A log that does it wrong has to be found out here: `tests.support.planted_parts` has such ones.
"""

from __future__ import annotations

from itertools import count
from random import Random
from typing import Literal

from mesh.durable.log import Log
from mesh.durable.storage import Storage
from mesh.errors import StorageFailed
from tests.support.fake_disk import FakeDisk, Operation, Stopped
from tests.support.logs import PARTITION, append, bodies, record, sound

End = Literal["crash", "kill"]


class Journal:
    """What was asked of a log, and what it said."""

    def __init__(self) -> None:
        self.attempted = 0
        """Records whose append was begun."""
        self.acknowledged = 0
        self.trimmed = 0
        """Below this offset records may be gone."""

    def open(self, storage: Storage) -> Log:
        """With segments of some four records."""
        return Log(storage, PARTITION, now_ns=0, segment_bytes=400)

    def begins(self, log: Log) -> None:
        """That is what there is now, and has to be there from here on."""
        self.may_be(log.start, log.end)
        self.trimmed, self.acknowledged, self.attempted = log.start, log.end, log.end

    def may_be(self, start: int, end: int) -> None:
        assert start <= self.trimmed, "gone"
        assert self.acknowledged <= end, "lost"
        assert end <= self.attempted, "invented"

    def append(self, log: Log, count: int) -> None:
        numbers = range(self.attempted, self.attempted + count)
        self.attempted += count
        append(log, numbers)
        self.acknowledged = self.attempted

    def mended(self, log: Log) -> None:
        """What was not acknowledged may be gone, and its numbers are used again."""
        self.may_be(0, log.end)
        self.attempted = log.end

    def trim(self, log: Log, offset: int) -> None:
        self.trimmed = max(self.trimmed, offset)  # there may be less in the log
        log.trim(offset)

    def reads(self, log: Log) -> None:
        appended = [record(number) for number in range(log.start, log.end)]
        assert bodies(log, log.start) == appended, "not what was appended"

    def holds(self, storage: Storage) -> Log:
        """What is found there is what it has to be, and the log can be appended to."""
        log = self.open(storage)
        self.may_be(log.start, log.end)
        self.reads(log)
        assert sound(storage).end == log.end
        return log

    def holds_and_goes_on(self, storage: Storage) -> None:
        log = self.holds(storage)
        numbers = range(log.end, log.end + 5)
        append(log, numbers)
        log.close()
        log = self.open(storage)
        assert bodies(log, numbers[0]) == [record(number) for number in numbers]
        log.close()
        sound(storage)


def work(storage: Storage, journal: Journal) -> None:
    """All that a log does, a few times each."""
    log = journal.open(storage)
    journal.begins(log)
    for number in range(6):
        journal.append(log, number % 3 + 1)
    log.mark()
    journal.append(log, 1)
    log.close()
    log = journal.open(storage)
    journal.begins(log)
    journal.append(log, 2)
    journal.trim(log, log.end - 8)
    log.mark()
    journal.append(log, 2)
    log.close()


def ended_at_every_operation(end: End) -> int:
    """The power fails in the middle of each of them in turn, or SIGKILL comes. How many it were."""
    for stop_at in count(1):
        disk, journal = FakeDisk(stop_at), Journal()
        disk.faults.stop_at = stop_at
        try:
            work(disk, journal)
        except Stopped:
            pass
        else:
            return stop_at - 1
        for seed in range(20):
            journal.holds_and_goes_on(disk.crash(Random(seed)) if end == "crash" else disk.kill())
    raise AssertionError


def failed_every_time(operation: Operation) -> None:
    """The first of these operations fails, and the power some time after it, or SIGKILL comes, and
    then the power fails; then likewise the second, and so on."""
    for nth in range(1, 30):
        disk, journal = FakeDisk(nth), Journal()
        log = journal.open(disk)
        disk.faults.fail(operation, nth)
        for number in range(12):
            journal.holds(disk.crash(Random(number)))
            try:
                journal.append(log, 2)
            except StorageFailed:
                after_a_kill(journal, disk)
                log.mend()
                journal.mended(log)
        for seed in range(5):
            journal.holds(disk.crash(Random(seed)))
        log.close()
        journal.holds(disk.kill())


def after_a_kill(journal: Journal, disk: FakeDisk) -> None:
    """Nothing was mended yet: what is appended by the next process is as safe."""
    for seed in range(5):
        found = disk.kill()
        after = Journal()
        after.trimmed, after.attempted = journal.trimmed, journal.attempted
        log = after.open(found)
        assert log.end >= journal.acknowledged, "lost"
        after.attempted = log.end
        after.append(log, 2)
        after.holds(found.crash(Random(seed)))
