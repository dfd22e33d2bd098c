"""The walk through all logs that a test leaves, on disks in memory and below its `tmp_path`: what
``mesh log check`` does, at the end of every test. One that damages a log on purpose is marked with
`damages`.

Of disks in memory the latest are looked at: a test that makes many looks at each itself, as does
one whose logs lie elsewhere (`sound_sidecar`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.durable.batch import HEAD_BYTES, Head, decode_head
from mesh.durable.check import Finding, check
from mesh.durable.segment import bases, name_of
from mesh.durable.storage import Disk, Storage
from tests.support.fake_disk import MADE, FakeDisk
from tests.support.logs import sound


@pytest.fixture(autouse=True)
def sound_logs(request: pytest.FixtureRequest) -> Iterator[None]:
    """What every test gets. It is set up first, so that all programs have ended when it looks."""
    with_files = "tmp_path" in request.fixturenames
    directory: Path | None = request.getfixturevalue("tmp_path") if with_files else None
    MADE.clear()
    yield
    disks = [*MADE]
    MADE.clear()
    if request.node.get_closest_marker("damages") is None:
        look(disks, directory)


def look(disks: list[FakeDisk], directory: Path | None) -> None:
    """Fail if a log in any of them is not what it should be."""
    logs: list[Storage] = []
    for disk in disks:
        if not disk.faults.stopped:  # else it has been looked at as it was found then
            disk.faults.mend()
            disk.faults.stop_at = 0
            logs += _logs_in(disk)
    if directory is not None:
        logs += [Disk(folder) for folder in {file.parent for file in directory.rglob("*.log")}]
    findings = [finding for log in logs for finding in _findings(log)]
    assert not findings, findings


def sound_sidecar(storage: Storage) -> None:
    """Each stream in the directory of a sidecar."""
    with contextlib.closing(storage.open_to_read("identity")) as file:
        partition = int(file.read(0, 64), 16)
    streams = storage.folder("streams")
    for name in streams.names():
        sound(streams.folder(name), partition)


def _logs_in(disk: FakeDisk) -> Iterator[FakeDisk]:
    yield disk
    for name in disk.names():
        with contextlib.suppress(FileExistsError):  # it is a file
            yield from _logs_in(disk.folder(name))


def _findings(storage: Storage) -> list[Finding]:
    """With whosever log it is, as its segments say: nobody's, if none of them can be read."""
    names = storage.names()
    if not bases(names):
        return []
    heads = (_head_of(storage, name_of(base)) for base in bases(names))
    partition = next((head.partition for head in heads if head is not None), 0)
    return check(storage, partition).findings


def _head_of(storage: Storage, name: str) -> Head | None:
    with contextlib.closing(storage.open_to_read(name)) as file:
        return decode_head(file.read(0, HEAD_BYTES))
