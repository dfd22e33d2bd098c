"""What a sidecar does about a stream that it opens, before anybody asks for it."""

from __future__ import annotations

from random import Random

from mesh.durable.clerk import Clerk
from mesh.durable.deliveries import AskedOptions, Settlements
from mesh.durable.groups import Groups
from mesh.durable.hosted import Hosted
from mesh.durable.partition import Partition
from mesh.options import StreamOptions
from tests.durable.test_groups import contents, deliver, fill, numbered
from tests.support.fake_disk import FakeDisk
from tests.support.logs import PARTITION


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
