"""Logs on a disk in memory: appended to, read back, and compared with what was acknowledged."""

from __future__ import annotations

from collections.abc import Iterable

from mesh.durable.batch import Batch, batch
from mesh.durable.check import Report, check
from mesh.durable.cursor import Cursor
from mesh.durable.log import Log
from mesh.durable.storage import Storage
from tests.support.fake_disk import Content, FakeDisk

PARTITION = 0x0123456789ABCDEF
SECOND_NS = 1_000_000_000


def record(number: int) -> bytes:
    """The body of a batch of one record, which no other has; some lie in several sectors."""
    return f"record {number} ".encode() * (50 if number % 16 == 13 else 1)


def batches(numbers: Iterable[int]) -> list[Batch]:
    """A batch of one record for each."""
    return [batch([record(number)], count=1, seq=number) for number in numbers]


def open_log(storage: Storage, *, segment_bytes: int = 1000, now_s: float = 0) -> Log:
    """One whose segments hold some ten records."""
    return Log(storage, PARTITION, now_ns=int(now_s * SECOND_NS), segment_bytes=segment_bytes)


def written(disk: FakeDisk, name: str, at: int, data: bytes) -> None:
    """Put that there, as a disk would that fails in silence."""
    file = disk.open(name)
    whole = bytearray(file.read(0, file.size()))
    whole[at : at + len(data)] = data
    disk._directory.put(name, Content(bytes(whole)))


def append(log: Log, numbers: Iterable[int], now_s: float = 0) -> None:
    """Append and sync: acknowledged, once this returns."""
    log.append(batches(numbers), int(now_s * SECOND_NS))
    log.sync()


def bodies(log: Log, offset: int = 0, bytes_max: int = 1 << 20) -> list[bytes]:
    """Of all records from there on, as a reader gets them."""
    cursor, read = Cursor(log, offset), []
    while found := cursor.read(bytes_max):
        assert isinstance(found, list), found
        read += [bytes(each.body) for each in found if each.header.count]
    cursor.close()
    return read


def sound(storage: Storage, partition: int = PARTITION) -> Report:
    """What a check of the whole log reports, which is nothing amiss."""
    report = check(storage, partition)
    assert not report.findings, report.findings
    return report
