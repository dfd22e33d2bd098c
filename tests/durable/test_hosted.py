"""What a sidecar does for a stream by itself, whether or not anybody asks for it."""

from __future__ import annotations

import errno
import threading
from itertools import count
from queue import SimpleQueue

import pytest

from mesh.durable.clerk import Clerk
from mesh.durable.deliveries import AskedOptions
from mesh.durable.hosted import Hosted
from mesh.durable.index import Index
from mesh.durable.log import Log
from mesh.durable.outcomes import Appended, Opened, Refused
from mesh.durable.partition import Partition
from mesh.durable.protocol import (
    Batches,
    Fetch,
    Inspect,
    Inspected,
    Join,
    Joined,
    Open,
    Query,
    Read,
    Reply,
    read_batch,
)
from mesh.durable.records import batch_of, payloads_of
from mesh.durable.segment import Segment
from mesh.durable.sidecar import Sidecar
from mesh.durable.storage import Storage
from mesh.message import GroupStats
from mesh.options import Durability, StreamOptions
from tests.support.fake_disk import FakeDisk
from tests.support.logs import PARTITION, sound, written
from tests.support.one_thread import in_one_thread
from tests.support.partitions import Writing, numbered, payloads, record
from tests.support.waiting import until

MEMBER = "0123456789abcdef-a"
REASON = "[Errno 5] the disk's own"


def test_who_waits_of_groups_that_cannot_go_on_is_told_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has lost something, and does not read: how much, nobody knows. It is said once."""
    disk = FakeDisk()
    replies: list[Reply] = []
    number = count(1)

    def wait() -> None:
        sidecar.ask(Fetch("s", "g", MEMBER, next(number), 5000), replies.append)
        turns.go()

    def unreadable(log: Log, log_epoch: int) -> int:
        raise OSError(errno.EIO, "the disk's own")

    with in_one_thread(1e6) as turns:
        sidecar = Sidecar(disk)
        sidecar.ask(Open("s", 1, StreamOptions(durability="interval")), replies.append)
        sidecar.ask(Join("s", "g", MEMBER, 1), replies.append)
        wait()
        monkeypatch.setattr(Log, "kept_since", unreadable)
        disk.faults.fail("sync")
        for _ in range(6):
            turns.tick()
        assert isinstance(replies[-1], Refused)
        assert replies[-1].code == "storage"
        assert replies[-1].text == f"groups of stream 's' cannot go on: {REASON}"
        assert caplog.text.count("cannot go on") == 1
        monkeypatch.undo()
        sidecar.ask(Join("s", "g", MEMBER, 1), replies.append)
        turns.go()
        assert isinstance(replies[-1], Joined)
        sidecar.close()


def test_who_follows_leaves_nothing_behind_for_each_of_its_questions() -> None:
    """The clerk kept one thing to do for each, for as long as that might have waited."""
    replies: list[Reply] = []
    with in_one_thread(1e6) as turns:
        sidecar = Sidecar(FakeDisk())
        sidecar.ask(Open("s", 7), replies.append)
        turns.go()
        opened = replies[-1]
        assert isinstance(opened, Opened)
        for n in range(100):
            sidecar.ask(Read("s", n, wait_ms=20_000), replies.append)
            turns.go()
            sidecar.append("s", numbered(batch_of([record(n)]), 7, opened.epoch, n), lambda _: None)
            turns.go()
            answered = replies[-1]
            assert isinstance(answered, Batches)
            assert len(answered.batches) == 1
            turns.wait(0.01)
        assert len(turns._due) < 5
        sidecar.close()


def test_each_who_waits_for_records_is_told_in_time_that_there_are_none() -> None:
    waits = [30, 10, 20, 20, 5, 40, 1]
    told: list[float] = []
    with in_one_thread(1e6) as turns:
        sidecar = Sidecar(FakeDisk())
        sidecar.ask(Open("s", 7), lambda _: None)
        turns.go()
        for each in waits:
            read = Read("s", 0, wait_ms=each * 1000)
            sidecar.ask(read, lambda _: told.append(turns.now_s - 1e6))
        turns.go()
        for second in range(1, 50):
            turns.wait(1.0)
            assert told == sorted(each for each in waits if each <= second)
        sidecar.close()


def test_who_appends_first_does_so_when_what_is_to_go_has_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One thread at a time changes a log: also while there is none that writes it."""
    options = StreamOptions(keep_count=1)
    disk = FakeDisk()
    partition = Partition(disk, PARTITION, options, now_ns=0, segment_bytes=500)
    writing = Writing(partition, 7)
    for n in range(20):
        writing.append(n)
    clerk = Clerk("test")
    hosted = Hosted("s", options, partition, clerk, lambda *_: None, 1 << 26)
    replies: SimpleQueue[Reply] = SimpleQueue()
    trimming, appended = threading.Event(), threading.Event()

    def remove(disk: FakeDisk, name: str) -> None:
        trimming.set()
        appended.wait(0.2)
        raise OSError(errno.EIO, "the disk's own")

    def submit() -> None:
        for n in range(20, 30):
            hosted.submit(writing.batch(record(n)), replies.put)
        for _ in range(10):
            assert isinstance(replies.get(timeout=10), Appended)
        appended.set()

    with monkeypatch.context() as patch:
        patch.setattr(FakeDisk, "remove", remove)
        clerk.run(hosted.tick)
        assert trimming.wait(10)
        submit()
        clerk.run(trimming.clear)
        until(lambda: not trimming.is_set())
        assert payloads(partition) == list(range(30))
    clerk.close()
    assert hosted.close(10)
    sound(disk)


@pytest.mark.parametrize("options", [StreamOptions(keep_count=3), StreamOptions(keep_bytes=900)])
def test_what_a_failed_sync_leaves_to_be_cut_off_pushes_out_nothing_that_was_acknowledged(
    options: StreamOptions,
) -> None:
    disk = FakeDisk()
    partition = Partition(disk, PARTITION, options, now_ns=0, segment_bytes=600)
    writing = Writing(partition, 7)
    for n in range(3):
        writing.append(f"{n:100}")
    lost = writing.batch(*[record(f"{n:20}") for n in range(10)])
    for nth in (1, 2):  # of the batch, and of what would cut it off
        disk.faults.fail("sync", nth)
    (outcome,) = partition.commit([lost], 0)
    assert isinstance(outcome, Refused)
    assert outcome.code == "unsure"
    with in_one_thread(1e6) as turns:
        hosted = Hosted("s", options, partition, turns, lambda *_: None, 1 << 26)  # type: ignore[arg-type]
        for _ in range(2):
            hosted.tick()
            turns.go()
        assert payloads(partition) == [f"{n:100}" for n in range(3)]
        assert hosted.close(None)
    sound(disk)


@pytest.mark.parametrize("durability", ["interval", "os"])
@pytest.mark.parametrize("mended", ["as room is made", "later"])
def test_who_waits_is_told_of_what_was_cut_off_as_something_was_to_be_given_up(
    durability: Durability, mended: str
) -> None:
    """There was no room for what tells repeats, and none could be made: that syncs what was shown
    already. Or that had failed before, and could not be cut off at once."""
    disk = FakeDisk()
    options = StreamOptions(durability=durability, keep_count=1)
    partition = Partition(disk, PARTITION, options, now_ns=0, segment_bytes=600)
    writing = Writing(partition, 7)
    disk.faults.fail("rename", 3, errno.ENOSPC)  # the state, the index, the snapshot
    while len(partition.log.segments) == 1:
        writing.append("x" * 100)
    partition.sync()
    kept = partition.log.end
    replies: list[Reply] = []
    with in_one_thread(1e6) as turns:
        hosted = Hosted("s", options, partition, turns, lambda *_: None, 1 << 26)  # type: ignore[arg-type]
        writing.append("seen")
        log_epoch = partition.log.log_epoch
        hosted.read(Read("s", kept + 1, wait_ms=20_000, log_epoch=log_epoch), replies.append)
        for nth in (1, 2):
            disk.faults.fail("create", nth, errno.ENOSPC)
        disk.faults.fail("sync")
        if mended == "later":
            disk.faults.fail("truncate")
            assert not partition.sync()
            hosted._appended()
        turns.go()
        assert not replies
        hosted.tick()
        turns.go()
        (reply,) = replies
        assert isinstance(reply, Batches)
        assert reply.cut_at == kept
        assert hosted.close(None)
    sound(disk)


def test_a_dead_letter_that_nobody_could_be_sent_waits_until_its_sidecar_lets_in_as_much(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It would be in the way of all letters behind it."""
    disk = FakeDisk()
    options = AskedOptions(ack_wait_s=5.0, max_deliver=1)

    def asked(sidecar: Sidecar, *queries: Query) -> Reply | None:
        replies: list[Reply] = []
        for query in queries:
            sidecar.ask(query, replies.append)
            turns.go()
        return replies[-1] if replies else None

    def wait_in(sidecar: Sidecar) -> None:
        """Until what its member was given is dead."""
        asked(sidecar, Join("s", "g", MEMBER, 100, options), Fetch("s", "g", MEMBER, 1))
        for _ in range(10):
            turns.tick()

    def group_of(sidecar: Sidecar) -> GroupStats:
        told = asked(sidecar, Inspect("s"))
        assert isinstance(told, Inspected)
        return told.stats.groups["g"]

    def letters_of(sidecar: Sidecar) -> list[object]:
        letters: list[object] = []
        while True:
            told = asked(sidecar, Read("s.dead", len(letters)))
            assert isinstance(told, Batches), told
            if not told.batches:
                return letters
            for each in told.batches:
                letters += payloads_of(*read_batch(memoryview(each), sidecar.number))

    with in_one_thread(1e6) as turns:
        sidecar = Sidecar(disk)
        opened = asked(sidecar, Open("s", 7))
        assert isinstance(opened, Opened)
        for n, payload in enumerate(("x" * 5000, "small")):
            batch = numbered(batch_of([record(payload)]), 7, opened.epoch, n)
            sidecar.append("s", batch, lambda _: None)
        turns.go()
        asked(sidecar, Join("s", "g", MEMBER, 100, options), Fetch("s", "g", MEMBER, 1))
        assert group_of(sidecar).in_flight == 1
        sidecar = Sidecar(disk := disk.kill(), message_bytes_max=4096)
        wait_in(sidecar)
        assert letters_of(sidecar) == ["small"]
        group = group_of(sidecar)
        assert (group.committed, group.counters["dead and too large"]) == (0, 1), "it is kept"
        limit = "limit of 4,012 (what the sidecar's message_bytes_max leaves)"
        text = f"group 'g' of stream 's': dead letter 0 has 5,195 bytes over the {limit}"
        assert [each.getMessage() for each in caplog.records] == [text]
        sidecar.close()
        sidecar = Sidecar(disk.again())
        wait_in(sidecar)
        assert letters_of(sidecar) == ["small", "x" * 5000]
        assert group_of(sidecar).committed == 2
        sidecar.close()


@pytest.mark.damages
@pytest.mark.parametrize(("options", "reads"), [(StreamOptions(keep_count=1), 1), (None, 0)])
def test_a_damaged_segment_is_not_read_again_each_second(
    options: StreamOptions | None,
    reads: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk, options = FakeDisk(), options or StreamOptions()
    partition = Partition(disk, PARTITION, options, now_ns=0, segment_bytes=500)
    writing = Writing(partition, 7)
    for n in range(20):
        writing.append(n)
    first = partition.log.segments[0]
    partition.close()
    disk.remove(first.index_name)
    written(disk, first.name, 200, b"\xff")
    partition = Partition(disk, PARTITION, options, now_ns=0, segment_bytes=500)
    read = []
    remade = Segment.remade

    def noting(segment: Segment, storage: Storage) -> Index:
        read.append(segment.base)
        return remade(segment, storage)

    monkeypatch.setattr(Segment, "remade", noting)
    with in_one_thread(1e6) as turns:
        hosted = Hosted("s", options, partition, turns, lambda *_: None, 1 << 26)  # type: ignore[arg-type]
        for _ in range(5):
            hosted.tick()
            turns.go()
        assert hosted.close(None)
    assert read == [0] * reads
    assert len([each for each in caplog.records if "given up" in each.message]) == reads
