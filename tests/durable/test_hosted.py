"""What a sidecar does about a stream that it opens, before anybody asks for it."""

from __future__ import annotations

import errno
import threading
from queue import SimpleQueue
from random import Random

import pytest

from mesh.durable.clerk import Clerk
from mesh.durable.deliveries import AskedOptions, Settlements
from mesh.durable.groups import Groups
from mesh.durable.hosted import Hosted
from mesh.durable.outcomes import Appended, Refused
from mesh.durable.partition import Partition
from mesh.durable.protocol import Fetch, Join, Joined, Open, Reply
from mesh.durable.sidecar import Sidecar
from mesh.options import StreamOptions
from tests.durable.test_groups import contents, deliver, fill, numbered
from tests.support.fake_disk import FakeDisk
from tests.support.logs import PARTITION, sound
from tests.support.one_thread import in_one_thread
from tests.support.partitions import Writing, payloads, record
from tests.support.waiting import until


def test_what_is_appended_in_place_of_a_lost_record_is_delivered() -> None:
    """Where losing it was allowed, and a group had settled it: the group has to forget that before
    another record has its offset."""
    options = StreamOptions(durability="interval")
    disk = FakeDisk()
    log = Partition(disk, PARTITION, options, now_ns=0).log
    fill(log, *numbered(3))
    groups = Groups(disk.folder("groups"), log)
    groups.open("g", AskedOptions(), 0)
    groups.join("g", "a", 10)
    fill(log, "lost", synced=False)
    assert len(contents(deliver(groups, "a"))) == 4
    groups.settle("g", "a", Settlements(acks=((0, 4),)), 0.0)
    groups.sync()

    lost = 0
    clerk = Clerk("test")
    for seed in range(8):
        partition = Partition(disk.crash(Random(seed)), PARTITION, options, now_ns=0)
        if partition.log.end == 3:
            lost += 1
            hosted = Hosted("s", options, partition, clerk, lambda *_: None, 1 << 26)
            fill(partition.log, "other")
            groups = hosted._with_members()._groups
            groups.join("g", "a", 10)
            assert contents(deliver(groups, "a")) == [(3, "other")]
    clerk.close()
    assert lost


def test_who_waits_of_a_group_that_cannot_begin_again_is_told_why() -> None:
    """The log has lost something, and the disk takes no new journal."""
    disk = FakeDisk()
    replies: list[Reply] = []
    with in_one_thread(1e6) as turns:
        sidecar = Sidecar(disk)
        sidecar.ask(Open("s", 1, StreamOptions(durability="interval")), replies.append)
        sidecar.ask(Join("s", "g", "0123456789abcdef-a", 1), replies.append)
        sidecar.ask(Fetch("s", "g", "0123456789abcdef-a", 1, 5000), replies.append)
        turns.go()
        for nth in range(1, 100):
            disk.faults.fail("sync", nth)
        turns.wait(6)
        assert isinstance(replies[-1], Refused)
        assert replies[-1].code == "storage"
        disk.faults.mend()
        sidecar.ask(Join("s", "g", "0123456789abcdef-a", 1), replies.append)
        turns.go()
        assert isinstance(replies[-1], Joined)
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
