"""Reading a whole log, to see that it is what it should be.

``mesh log check`` does it, and every test of storage in the end. Changes nothing, and may run
beside whoever appends.
"""

from __future__ import annotations

import contextlib

import msgspec

from mesh.durable import aside
from mesh.durable.batch import HEAD_BYTES
from mesh.durable.recovery import read_state
from mesh.durable.scan import end_of_use, torn
from mesh.durable.segment import Segment, bases, name_of, read_head
from mesh.durable.storage import Storage
from mesh.errors import LogDamaged


class Finding(msgspec.Struct, frozen=True):
    """Something that is not as it should be."""

    file: str
    position: int
    offset: int
    """Of the first record that it concerns."""
    reason: str


class Report(msgspec.Struct, kw_only=True):
    """What a log holds."""

    start: int = 0
    end: int = 0
    batches: int = 0
    bytes: int = 0
    segments: int = 0
    torn_bytes: int = 0
    """At the end: left of an append that was under way, or is now."""
    aside: int = 0
    """Torn tails that were cut off, and are there to be looked at."""
    aside_bytes: int = 0
    findings: list[Finding] = []


def check(storage: Storage, partition: int) -> Report:
    """Read every batch of the log in that folder. Raises `LogFormat`, `OSError`."""
    report = _look(storage, partition)
    if report.findings:
        # What is cut off and appended anew while it is read does not fit together: but not twice.
        report = _look(storage, partition)
    return report


def _look(storage: Storage, partition: int) -> Report:
    state = read_state(storage)  # first: whoever appends gets further meanwhile
    all_bases = bases(storage.names())
    torn_tails = aside.kept(storage)
    report = Report(
        segments=len(all_bases), aside=len(torn_tails), aside_bytes=sum(torn_tails.values())
    )
    if all_bases:
        report.start = report.end = all_bases[0]
    for base in all_bases:
        if base != report.end:
            _find(report, name_of(base), 0, report.end, f"it begins with offset {base:,}")
        try:
            _check_segment(storage, partition, base, report, last=base == all_bases[-1])
        except FileNotFoundError:  # given up meanwhile
            return _look(storage, partition)
    if state is not None and report.end < state.end:
        name = name_of(all_bases[-1]) if all_bases else name_of(0)
        _find(report, name, report.bytes, report.end, f"there were {state.end:,} records")
    return report


def _check_segment(
    storage: Storage, partition: int, base: int, report: Report, *, last: bool
) -> None:
    name = name_of(base)
    with contextlib.closing(storage.open_to_read(name)) as file:
        size = file.size()
        report.bytes += size
        report.end = base
        try:
            head = read_head(file, name, partition)
        except LogDamaged as damage:
            _find(report, name, damage.position, base, damage.reason)
            return
        segment = Segment(partition, base, size)
        walk = segment.walk(file, HEAD_BYTES, base, 0 if head is None else head.time_ns)
        if head is None:
            walk.position, walk.fault = 0, "the head of the segment is damaged"
        else:
            for _ in walk:
                report.batches += 1
        report.end = walk.offset
        if walk.fault:
            damaged = torn(walk, file.read, size, partition)
            if last and damaged is None:
                report.torn_bytes = end_of_use(file.read, walk.position, size) - walk.position
            else:
                _find(report, name, walk.position, walk.offset, walk.fault)


def _find(report: Report, file: str, position: int, offset: int, reason: str) -> None:
    report.findings.append(Finding(file, position, offset, reason))
