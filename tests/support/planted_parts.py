"""Faults of what a sidecar is made of, planted on purpose: of its files, its logs and its groups.
The machines and trials of these have to find them; those of a whole sidecar are in
`tests.support.planted`.

What is done wrong with files is done wrong with those of a `FakeDisk` and of a `Disk`.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Final
from unittest.mock import patch
from weakref import WeakKeyDictionary

from mesh.durable import batch, index, journal, recovery, scan, storage
from mesh.durable.journal import Journal
from mesh.durable.log import Log
from mesh.durable.progress import Progress, Tally
from mesh.durable.storage import Bytes, DiskFile, Poison
from tests.support.fake_disk import FakeDisk, FakeFile

Planted = contextlib.AbstractContextManager[object]
Planting = Callable[[], Planted]


# -- Files and directories


@contextlib.contextmanager
def sync_repeated_after_it_failed() -> Iterator[None]:
    """The second one succeeds."""

    def hopeful(sync: Callable[[Any], None]) -> Callable[[Any], None]:
        def repeated(file: Any) -> None:
            try:
                sync(file)
            except OSError:
                file._poison = Poison("as if anew")
                sync(file)

        return repeated

    with (
        patch.object(FakeFile, "sync", hopeful(FakeFile.sync)),
        patch.object(DiskFile, "sync", hopeful(DiskFile.sync)),
    ):
        yield


@contextlib.contextmanager
def directory_not_synced() -> Iterator[None]:
    with (
        patch.object(FakeDisk, "sync", lambda disk: disk.faults.alive()),
        patch.object(storage, "_sync_directory", lambda _: None),
    ):
        yield


@contextlib.contextmanager
def memory_believed_after_a_failed_sync() -> Iterator[None]:
    """As after a SIGKILL, by whoever opens the log next."""
    with (
        patch.object(FakeFile, "forget", lambda _: None),
        patch.object(DiskFile, "forget", lambda _: None),
    ):
        yield


@contextlib.contextmanager
def written_with_what_comes_next() -> Iterator[None]:
    """As into a buffered file, of which a sync is no flush: what is appended waits in the process.
    For files that nobody else reads meanwhile."""
    append, waiting = DiskFile.append, WeakKeyDictionary[DiskFile, Sequence[Bytes]]()

    def flush(file: DiskFile) -> None:
        if parts := waiting.pop(file, ()):
            append(file, parts)

    def later(file: DiskFile, parts: Sequence[Bytes]) -> None:
        flush(file)
        waiting[file] = parts

    def flushed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: DiskFile, *arguments: Any) -> Any:
            flush(file)
            return method(file, *arguments)

        return call

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(DiskFile, "append", later))
        for name in ("size", "reserve", "read", "truncate", "close"):
            method = flushed(getattr(DiskFile, name))
            stack.enter_context(patch.object(DiskFile, name, method))
        yield


def failed_writes_taken_for_written() -> Planted:
    append = DiskFile.append

    def believing(file: DiskFile, parts: Sequence[Bytes]) -> None:
        with contextlib.suppress(OSError):
            append(file, parts)
        file._poison = Poison("as if it had not failed")

    return patch.object(DiskFile, "append", believing)


def gone_on_with_after_a_failure() -> Planted:
    """Whatever could not be written, or synced, is taken to be so by what comes next."""

    def mend(log: Log) -> None:
        log._failed = None
        log._file._poison = Poison("as if anew")  # type: ignore[attr-defined]

    return patch.object(Log, "mend", mend)


def _like(_: object, other: object) -> bool:
    return True


def _unlike(_: object, other: object) -> bool:
    return False


class _Bytes(bytes):
    __eq__ = _like
    __ne__ = _unlike
    __hash__ = bytes.__hash__


class _Check(int):
    """A checksum that is as good as any other."""

    __eq__ = _like
    __ne__ = _unlike
    __hash__ = int.__hash__

    def to_bytes(self, *how: Any, **more: Any) -> bytes:
        return _Bytes(super().to_bytes(*how, **more))


def _unchecked(module: ModuleType) -> Planted:
    return patch.object(module, "crc32", lambda *data: _Check(zlib.crc32(*data)))


def bodies_not_checked() -> Planted:
    return _unchecked(scan)


def headers_not_checked() -> Planted:
    return _unchecked(batch)


def indexes_not_checked() -> Planted:
    return _unchecked(index)


def state_not_checked() -> Planted:
    return _unchecked(recovery)


def entries_not_checked() -> Planted:
    """Of the journals of groups."""
    return _unchecked(journal)


# -- Groups


def journal_not_synced() -> Planted:
    """It is said to be."""
    return patch.object(Journal, "sync", lambda journal: journal._file is not None)


def settled_in_memory_only() -> Planted:
    return _changes(lambda new: Progress((), new.deliveries))


def deliveries_counted_in_memory_only() -> Planted:
    return _changes(lambda new: Progress(new.settled, ()))


def _changes(kept: Callable[[Progress], Progress]) -> Planted:
    """What is written of what is new."""
    original = Tally.changes

    def changes(tally: Tally) -> Progress | None:
        new = original(tally)
        return None if new is None else kept(new)

    return patch.object(Tally, "changes", changes)


PLANTED: Final[dict[str, Planting]] = {
    planting.__name__: planting
    for planting in (
        written_with_what_comes_next,
        failed_writes_taken_for_written,
        settled_in_memory_only,
    )
}
"""Those that are planted in other processes."""
