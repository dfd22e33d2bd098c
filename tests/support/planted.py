"""Faults of a sidecar, planted on purpose: the trials of `tests.support.sidecar_trials` have to
find each of them, or `tests.support.sidecar_machine`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final
from unittest.mock import patch

from mesh.durable.batch import Batch
from mesh.durable.cursor import Cursor
from mesh.durable.dedup_ids import NS_PER_S
from mesh.durable.group import Group
from mesh.durable.groups import Groups
from mesh.durable.hosted import Hosted
from mesh.durable.journal import MAGIC, Beginning, Journal, _encode
from mesh.durable.log import Log
from mesh.durable.members import Members
from mesh.durable.outcomes import Outcome
from mesh.durable.partition import Partition, Request
from mesh.durable.producers import NewRun, Producers
from mesh.durable.progress import Progress
from mesh.durable.snapshot import SnapshotFile
from mesh.durable.storage import Disk
from mesh.durable.supply import Letter
from tests.support.planted_parts import PLANTED as PLANTED_PARTS
from tests.support.planted_parts import Planted, Planting


@contextlib.contextmanager
def settled_before_it_is_written() -> Iterator[None]:
    """What a member said is written with what comes next."""
    settle = Members.settle

    def hasty(*arguments: Any) -> None:
        with patch.object(Groups, "write", lambda groups: None):
            settle(*arguments)

    with patch.object(Members, "settle", hasty):
        yield


@contextlib.contextmanager
def delivered_before_it_is_written() -> Iterator[None]:
    serve = Members.serve

    def hasty(*arguments: Any) -> None:
        with patch.object(Groups, "write", lambda groups: None):
            serve(*arguments)

    with patch.object(Members, "serve", hasty):
        yield


def settled_with_its_neighbour() -> contextlib.AbstractContextManager[object]:
    """What nobody acknowledged."""
    ack = Group.ack

    def more(group: Group, member: str, first: int, end: int) -> int:
        return ack(group, member, first, end + 1)

    return patch.object(Group, "ack", more)


def receipt_before_the_sync() -> contextlib.AbstractContextManager[object]:
    return patch.object(Log, "sync", Log._show)


@contextlib.contextmanager
def journal_anew_in_place() -> Iterator[None]:
    """Instead of beside it, and renamed."""
    original = Journal.begin

    def begin(journal: Journal, beginning: Beginning, snapshot: Progress) -> None:
        if journal._name not in journal._storage.names():
            original(journal, beginning, snapshot)
            return
        journal.close()
        data = MAGIC + journal._entry(_encode(beginning)) + journal._entry(_encode(snapshot))
        journal._file = file = journal._storage.open(journal._name)
        file.truncate(0)
        file.append([data])
        file.sync()
        journal._size = journal._snapshot_bytes = len(data)
        journal._unsynced = False

    with patch.object(Journal, "begin", begin):
        yield


@contextlib.contextmanager
def journal_anew_without_its_directory() -> Iterator[None]:
    """The name may be that of the old file again."""
    original = Journal.begin

    def begin(*arguments: Any) -> None:
        with patch.object(Disk, "sync", lambda disk: None):
            original(*arguments)

    with patch.object(Journal, "begin", begin):
        yield


@contextlib.contextmanager
def trim_before_the_snapshot() -> Iterator[None]:
    """Of a segment that was begun just before the process was killed."""
    remembered = Partition._remembered

    def lazy(*arguments: Any) -> Producers:
        with patch.object(SnapshotFile, "write", lambda *_: None):
            return remembered(*arguments)

    def trim(partition: Partition, offset: int) -> int:
        return partition.log.trim(offset)

    with patch.object(Partition, "_remembered", lazy), patch.object(Partition, "trim", trim):
        yield


def dedup_in_memory_only() -> Planted:
    original = Partition._remembered

    def remembered(*arguments: Any) -> Producers:
        original(*arguments)
        return Producers()

    return patch.object(Partition, "_remembered", remembered)


def no_notes_of_repeats() -> contextlib.AbstractContextManager[object]:
    """Nor of openings: they are there, and nobody reads them."""
    original = Partition._observe

    def observe(partition: Partition, *batch: Any) -> None:
        if batch[0].count:
            original(partition, *batch)

    return patch.object(Partition, "_observe", observe)


def snapshot_not_read() -> contextlib.AbstractContextManager[object]:
    return patch.object(SnapshotFile, "read", lambda file: None)


@contextlib.contextmanager
def snapshot_ahead_of_the_log() -> Iterator[None]:
    """It has what is about to be appended, and is believed, although the log ends before that."""
    decide = Partition._decide

    def ahead(
        partition: Partition, requests: Sequence[Request], now_ns: int
    ) -> tuple[list[Outcome], list[Batch]]:
        decided = decide(partition, requests, now_ns)
        partition._snapshot.write(partition.log.segments[-1].base, partition._producers.snapshot())
        return decided

    with (
        patch.object(Partition, "_decide", ahead),
        patch.object(Partition, "_observe", lambda *_: None),
    ):
        yield


# -- What the machine sees, and no trial: what is told, what may go, and whether there is room


def quota_not_kept() -> Planted:
    return patch.object(Partition, "_record_bytes", 0)


def retention_takes_what_is_not_settled() -> Planted:
    return patch.object(Groups, "acked_to", lambda groups: groups._log.tip.offset)


def readers_left_waiting() -> Planted:
    return patch.object(Hosted, "_give_up", lambda *_: None)


def cuts_not_told() -> Planted:
    """To whoever had read what a log lost."""

    def cursor(log: Log, offset: int, log_epoch: int | None) -> Cursor:
        return Cursor(log, offset)

    return patch("mesh.durable.hosted.Cursor", cursor)


def letters_not_appended() -> Planted:
    def send(members: Members, letter: Letter, *, then_all: bool = False) -> None:
        members._groups.buried(letter.group, letter.dead.offset)

    return patch.object(Members, "_send", send)


def epochs_by_the_clock() -> Planted:
    def open_run(producers: Producers, producer_id: int, now_ns: int) -> NewRun:
        known = producers._producers.get(producer_id)
        return NewRun(now_ns // NS_PER_S, known.next_seq if known else 0)

    return patch.object(Producers, "open", open_run)


PLANTED: Final[dict[str, Planting]] = PLANTED_PARTS | {
    planting.__name__: planting
    for planting in (
        settled_before_it_is_written,
        delivered_before_it_is_written,
        settled_with_its_neighbour,
        receipt_before_the_sync,
        journal_anew_in_place,
        journal_anew_without_its_directory,
        trim_before_the_snapshot,
        dedup_in_memory_only,
        no_notes_of_repeats,
        snapshot_not_read,
        snapshot_ahead_of_the_log,
    )
}
