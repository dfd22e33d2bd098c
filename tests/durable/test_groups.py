"""What the groups of a partition promise, on a disk that fails: nothing is settled that nobody
acknowledged, and nothing that was remembered is forgotten."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest

from mesh import limits
from mesh.durable.batch import batch
from mesh.durable.cursor import Cursor, Cut, Gap
from mesh.durable.deliveries import AskedOptions, Delivery, Settlements
from mesh.durable.group import GroupOptions
from mesh.durable.groups import Groups, file_name_of
from mesh.durable.intervals import Intervals
from mesh.durable.journal import Journal
from mesh.durable.log import Log
from mesh.durable.protocol import Delivered, encode_message, read_batch
from mesh.durable.records import NewRecord, batch_of, payloads_of
from mesh.durable.scan import Found
from mesh.durable.storage import Disk
from mesh.durable.supply import Letter
from mesh.errors import InvalidName, LogDamaged, LogFull, MeshError, OptionsDiffer, PayloadTooLarge
from mesh.sockets import codec
from tests.support.fake_disk import FakeDisk, Operation
from tests.support.logs import PARTITION, open_log

SECOND_NS = 1_000_000_000


def fill(log: Log, *records: NewRecord | str, per_batch: int = 1, synced: bool = True) -> None:
    """Append them."""
    made = [
        record if isinstance(record, NewRecord) else NewRecord(codec.pack(record))
        for record in records
    ]
    for at in range(0, len(made), per_batch):
        log.append([batch_of(made[at : at + per_batch])], 0)
    if synced:
        log.sync()


def numbered(count: int, first: int = 0) -> list[str]:
    return [f"record {number}" for number in range(first, first + count)]


class Setting:
    """A log and its groups on a disk in memory, and one member `a` of a group `g`."""

    def __init__(self, disk: FakeDisk | None = None, **asked: object) -> None:
        self.disk = disk or FakeDisk()
        self.log = open_log(self.disk, segment_bytes=2000)
        self.groups = Groups(self.disk.folder("groups"), self.log)
        self.groups.open("g", AskedOptions(**asked), 0)  # type: ignore[arg-type]
        self.groups.join("g", "a", 100)

    def deliver(self, member: str = "a", now: float = 0.0, now_ns: int = 0) -> list[str]:
        """The payloads that `member` gets now."""
        return [payload for _, payload in contents(self.delivery(member, now, now_ns))]

    def delivery(self, member: str = "a", now: float = 0.0, now_ns: int = 0) -> Delivery:
        """Likewise, as it goes out."""
        return deliver(self.groups, member, now, now_ns)

    def ack(self, *offsets: int, member: str = "a") -> None:
        acks = tuple((offset, offset + 1) for offset in offsets)
        self.groups.settle("g", member, Settlements(acks=acks), 0.0)

    def again(self, how: str) -> Setting:
        """After a restart."""
        if how == "kill":
            return Setting(self.disk.kill())
        self.groups.sync()
        return Setting(self.disk.crash(Random(5)))


def deliver(
    groups: Groups, member: str, now: float = 0.0, now_ns: int = 0, *, group: str = "g"
) -> Delivery:
    """What `member` gets, which asks alone."""
    outcome = groups.deliver(group, [member], now, now_ns).get(member, Delivery((), ()))
    if isinstance(outcome, MeshError):
        raise outcome
    return outcome


def letters(groups: Groups) -> list[Letter]:
    """All that can be read now."""
    return list(iter(partial(groups.letter, "g"), None))


def contents(delivery: Delivery) -> list[tuple[int, str]]:
    """Offset and payload of each record that is granted."""
    records = {}
    for data in delivery.batches:
        header, body = read_batch(memoryview(data), PARTITION)
        for n, payload in enumerate(payloads_of(header, body)):
            records[header.offset + n] = payload
    return [
        (offset, records[offset])
        for first, end, _ in delivery.grants
        for offset in range(first, end)
    ]


def test_a_member_gets_the_records_of_the_log() -> None:
    setting = Setting()
    fill(setting.log, *numbered(10), per_batch=4)
    assert setting.deliver() == numbered(10)
    assert setting.deliver() == []
    fill(setting.log, *numbered(2, 10))
    assert setting.deliver() == numbered(2, 10)


def test_a_member_gets_no_more_than_it_may_hold() -> None:
    setting = Setting()
    setting.groups.join("g", "a", 3)
    fill(setting.log, *numbered(10), per_batch=10)
    assert setting.deliver() == numbered(3)
    setting.ack(1)
    assert setting.deliver() == numbered(1, 3)


def test_a_delivery_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.limits.DELIVERY_BYTES", 300)
    setting = Setting()
    fill(setting.log, *numbered(20))
    got: list[str] = []
    while some := setting.deliver():
        assert len(some) < 8
        got += some
    assert got == numbered(20)


def test_a_delivery_in_many_pieces_is_bounded_in_bytes() -> None:
    """Each piece takes some bytes, and there may be one for each record."""
    setting = Setting()
    setting.groups.join("g", "a", 3000)
    fill(setting.log, *(f"{n}" for n in range(3000)), per_batch=1000)
    while setting.deliver():
        pass
    setting.ack(*range(0, 3000, 2))
    setting.groups.leave("g", "a")
    bytes_max, got = 10_000, 0
    setting.groups.join("g", "b", 3000, bytes_max)
    while (delivery := setting.delivery("b")).grants:
        size = len(encode_message(Delivered(delivery, ((0, 0, 0),), 1 << 63)))
        assert size <= bytes_max
        got += len(delivery.grants)
    assert got == 1500


def test_what_a_member_cannot_be_sent_goes_to_another_and_it_is_told_why() -> None:
    setting = Setting()
    fill(setting.log, "small", "x" * 5000)
    setting.groups.join("g", "a", 100, 4096)
    assert setting.deliver() == ["small"]
    setting.ack(0)
    with pytest.raises(PayloadTooLarge) as raised:
        setting.deliver()
    text = "a batch of 5,076 bytes, with records 1 to 1, has no room within the limit of 4,096"
    assert str(raised.value) == f"{text} of who reads it (option message_bytes_max)"
    setting.groups.join("g", "b", 100)
    outcomes = setting.groups.deliver("g", ["a", "b"], 0.0, 0)
    assert isinstance(outcomes["a"], PayloadTooLarge)
    assert isinstance(outcomes["b"], Delivery)
    assert outcomes["b"].grants == ((1, 2, 1),), "it was never delivered before"


def test_large_records_lower_what_a_member_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.limits.PREFETCH_BYTES_MAX", 3000)
    setting = Setting()
    fill(setting.log, *(f"{n}" + "x" * 900 for n in range(100)))
    setting.deliver()
    setting.groups.leave("g", "a")
    setting.groups.join("g", "b", 100)
    assert len(setting.deliver("b")) == 3


@pytest.mark.parametrize("how", ["kill", "crash"])
def test_what_was_acknowledged_is_not_delivered_after_a_restart(how: str) -> None:
    setting = Setting()
    fill(setting.log, *numbered(10))
    setting.deliver()
    setting.ack(0, 1, 2, 5)
    setting.groups.write()
    setting = setting.again(how)
    assert setting.groups.stats()["g"].committed == 3
    assert setting.deliver() == [f"record {n}" for n in (3, 4, 6, 7, 8, 9)]


def test_deliveries_are_counted_across_restarts() -> None:
    setting = Setting(max_deliver=2)
    fill(setting.log, "poison", "good")
    setting.deliver()
    setting.groups.write()
    setting = setting.again("kill")
    assert setting.delivery().grants == ((0, 1, 2), (1, 2, 2))
    setting.groups.write()
    setting = setting.again("kill")
    assert setting.deliver() == []
    assert [letter.dead.offset for letter in letters(setting.groups)] == [0, 1]


def test_a_dead_letter_brings_its_record() -> None:
    setting = Setting()
    fill(setting.log, "bad", "good")
    setting.deliver()
    setting.groups.settle("g", "a", Settlements(rejects=((0, "no customer"),)), 0.0)
    (letter,) = letters(setting.groups)
    assert (letter.group, letter.dead.offset, letter.dead.reason) == ("g", 0, "no customer")
    assert payloads_of(letter.found.header, letter.found.body) == ["bad"]
    assert setting.groups.stats()["g"].committed == 0
    setting.groups.buried("g", 0)
    assert setting.groups.stats()["g"].committed == 1


def lines_of(call: Callable[[], object]) -> int:
    """How many lines of Python run in it: what it costs, on any machine."""
    lines, tracing = 0, sys.gettrace()

    def count(_: FrameType, event: str, __: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    sys.settrace(count)
    try:
        call()
    finally:
        sys.settrace(tracing)
    return lines


def test_acks_of_what_nobody_was_given_cost_no_more_than_what_was() -> None:
    """A few KB of them stopped the clerk, and with it all streams of its sidecar, for minutes."""
    setting = Setting()
    fill(setting.log, *numbered(3))
    setting.deliver()
    said = Settlements(acks=((0, 1 << 40), (1, 1 << 41), (2, 1 << 42)))
    assert lines_of(lambda: setting.groups.settle("g", "a", said, 0.0)) < 500
    stats = setting.groups.stats()["g"]
    assert stats.committed == 3
    assert stats.counters == {"undelivered ack": (1 << 16) - 3}, "each is counted once"


def test_acks_of_one_message_are_done_with_once_each() -> None:
    setting = Setting()
    setting.groups.join("g", "a", 1000)
    fill(setting.log, *numbered(1000), per_batch=100)
    setting.deliver()
    fill(setting.log, *numbered(1000), per_batch=100)
    once = Settlements(acks=((1000, 1 << 40),))
    often = Settlements(acks=once.acks * 4)
    cost = lines_of(lambda: setting.groups.settle("g", "a", once, 0.0))
    assert lines_of(lambda: setting.groups.settle("g", "a", often, 0.0)) < 2 * cost


def test_ranges_that_descend_cost_no_more_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them would move all those behind it in a list."""
    setting = Setting()
    fill(setting.log, *numbered(100))
    setting.deliver()
    add, moved = Intervals.add, []

    def watched(intervals: Intervals, first: int, end: int) -> None:
        if any(low >= end for low, _ in intervals):
            moved.append(first)
        add(intervals, first, end)

    monkeypatch.setattr(Intervals, "add", watched)
    ranges = tuple((n, n + 1) for n in range(98, 0, -2))
    setting.groups.settle("g", "a", Settlements(acks=ranges[::2]), 0.0)
    setting.groups.recall("g", "a", ranges[1::2])
    assert not moved


def test_keys_are_kept_in_order_across_members() -> None:
    setting = Setting(order="key")
    setting.groups.join("g", "b", 100)
    fill(
        setting.log,
        *(NewRecord(codec.pack(f"{key}{n}"), key.encode()) for n in range(3) for key in "xy"),
        per_batch=4,
    )
    deliveries = setting.groups.deliver("g", "ab", 0.0, 0)
    assert sorted(deliveries) == ["a", "b"]
    for delivery in deliveries.values():
        assert isinstance(delivery, Delivery)
        got = [payload for _, payload in contents(delivery)]
        for key in "xy":
            mine = [payload for payload in got if payload[0] == key]
            assert mine in ([], [f"{key}{n}" for n in range(3)])


def test_a_record_is_delayed_by_no_more_than_a_year_whatever_its_producers_clock_says() -> None:
    year_ns = round(limits.DELAY_S_MAX * SECOND_NS)
    for due_ns in (10 * year_ns, (1 << 64) - 1):
        setting = Setting()
        fill(setting.log, NewRecord(codec.pack("later"), due_ns=due_ns), "now")
        assert setting.deliver(now_ns=year_ns - 5 * SECOND_NS) == ["now"]
        assert setting.groups.next_at() == 5
        assert setting.deliver(now=5) == ["later"]
        again = Setting(setting.disk.kill())
        assert "later" in again.deliver(now_ns=year_ns), "nor does a restart begin anew with it"


def test_a_delayed_record_waits_for_its_time() -> None:
    setting = Setting()
    fill(setting.log, NewRecord(codec.pack("later"), due_ns=5 * SECOND_NS), "now")
    assert setting.deliver(now=100.0, now_ns=2 * SECOND_NS) == ["now"]
    assert setting.groups.next_at() == pytest.approx(103.0)
    assert setting.deliver(now=102.9, now_ns=0) == []
    assert setting.deliver(now=103.0, now_ns=0) == ["later"]


def test_what_a_member_held_goes_to_others_when_it_leaves() -> None:
    setting = Setting()
    fill(setting.log, *numbered(4))
    assert setting.deliver() == numbered(4)
    setting.groups.join("g", "b", 100)
    setting.groups.leave("g", "a")
    assert setting.deliver("b") == numbered(4)
    assert not setting.groups.has("g", "a")


def test_what_retention_took_is_told_as_a_gap() -> None:
    setting = Setting()
    fill(setting.log, *numbered(60))
    setting.groups.join("g", "a", 2)
    assert setting.deliver() == numbered(2)
    setting.log.trim(setting.log.segments[2].base)
    start = setting.log.start
    assert start > 2
    setting.groups.trimmed()
    assert setting.deliver() == numbered(2, start)
    assert setting.groups.gaps("g", "a") == [(0, start - 1, start)]
    assert setting.groups.gaps("g", "a") == []


def test_retention_may_take_what_every_group_has_settled() -> None:
    setting = Setting()
    assert Groups(FakeDisk().folder("groups"), setting.log).acked_to() is None
    setting.groups.open("other", AskedOptions(), 0)
    setting.groups.join("other", "z", 10)
    fill(setting.log, *numbered(5))
    setting.deliver()
    setting.ack(0, 1, 2)
    assert setting.groups.acked_to() == 0
    setting.groups.deliver("other", "z", 0.0, 0)
    setting.groups.settle("other", "z", Settlements(acks=((0, 2),)), 0.0)
    assert setting.groups.acked_to() == 2
    crashed = Groups(setting.disk.crash(Random(1)).folder("groups"), setting.log)
    assert min(each.committed for each in crashed.stats().values()) == 2, "it was synced"


def test_a_group_has_the_options_it_was_made_with() -> None:
    setting = Setting(order="key")
    setting.groups.open("g", AskedOptions(), 0)
    setting.groups.open("g", AskedOptions(order="key"), 0)
    with pytest.raises(OptionsDiffer, match="created with order='key', not 'any'"):
        setting.groups.open("g", AskedOptions(order="any"), 0)
    setting = setting.again("kill")
    assert setting.groups.options("g") == GroupOptions(order="key")


def test_positions_in_the_users_own_database_settle_all_before_them() -> None:
    setting = Setting()
    fill(setting.log, *numbered(10))
    setting.groups.resume("g", 7)
    assert setting.deliver() == numbered(3, 7)
    setting.groups.resume("g", 9)
    assert setting.groups.stats()["g"].committed == 9


def test_a_damaged_journal_stops_its_group_alone() -> None:
    setting = Setting()
    setting.groups.open("other", AskedOptions(), 0)
    fill(setting.log, "a")
    disk = setting.disk.kill()
    disk.folder("groups").replace("g", b"garbage")
    groups = Groups(disk.folder("groups"), setting.log)
    errors = []
    for _ in range(2):
        with pytest.raises(LogDamaged) as caught:
            groups.open("g", AskedOptions(), 0)
        errors.append(caught.value)
    assert errors[0] is not errors[1], "or it holds on to all that it was raised through"
    assert groups.unread == {"g": str(errors[0])}
    groups.open("other", AskedOptions(), 0)
    assert groups.acked_to() is None, "or retention would take what it may not have settled"
    disk.folder("groups").replace("g", setting.disk.folder("groups").open_to_read("g").read(0, 999))
    groups.open("g", AskedOptions(), 0)
    assert not groups.unread, "somebody has brought it back"


def test_a_journal_that_cannot_be_read_now_keeps_no_other_group_and_is_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or a bad sector, or a folder beside the journals, would stop all groups of its stream."""
    setting = Setting()
    fill(setting.log, *numbered(3))
    setting.deliver()
    setting.ack(0, 1)
    setting.groups.open("other", AskedOptions(), 3)
    setting.groups.close()
    read, failing = Journal.read, [True]

    def fails(journal: Journal) -> object:
        if failing[0] and journal._name == "g":
            raise OSError(errno.EIO, "Input/output error")
        return read(journal)

    monkeypatch.setattr(Journal, "read", fails)
    groups = Groups(setting.disk.kill().folder("groups"), setting.log)
    groups.open("other", AskedOptions(), 0)
    assert groups.committed("other") == 3
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            groups.open("g", AskedOptions(), 0)
        assert groups.acked_to() is None, "or retention would take what it may not have settled"
    failing[0] = False
    assert groups.acked_to() == 2, "it need not be asked for"
    groups.open("g", AskedOptions(), 0)
    assert groups.committed("g") == 2


@pytest.mark.damages
def test_a_group_whose_log_is_damaged_says_so_to_its_members() -> None:
    setting = Setting()
    fill(setting.log, *numbered(60))
    setting.groups.open("other", AskedOptions(), setting.log.segments[1].base)
    setting.groups.join("other", "z", 1)
    file = setting.disk.open(setting.log.segments[0].name)
    file._content.shown[150] ^= 1
    assert contents(setting.delivery()) == [(0, "record 0")]
    with pytest.raises(LogDamaged) as damage:
        setting.deliver()
    assert (damage.value.file, damage.value.offset) == (setting.log.segments[0].name, 1)
    assert deliver(setting.groups, "z", group="other").grants, "others go on"


def test_names_of_groups_may_be_anything_that_channels_may() -> None:
    disk = FakeDisk()
    log = open_log(disk)
    names = ["a/b", "a.b", ".", "..", "größe", "%2F"]
    groups = Groups(disk.folder("groups"), log)
    for name in names:
        groups.open(name, AskedOptions(), 0)
    assert sorted(Groups(disk.kill().folder("groups"), log).stats()) == sorted(names)
    assert len({file_name_of(name) for name in names}) == len(names)


def test_what_nobody_asks_for_is_granted_to_nobody() -> None:
    """Leased and unsent, it would run out time and again, and be a dead letter in the end."""
    setting = Setting(max_deliver=2)
    fill(setting.log, *numbered(3))
    setting.groups.join("g", "b", 100)
    for now in (0.0, 100.0, 200.0, 300.0):
        assert setting.groups.deliver("g", [], now, 0) == {}
    assert letters(setting.groups) == []
    assert setting.delivery("b", 400.0).grants == ((0, 1, 1), (1, 2, 1), (2, 3, 1))


def test_what_does_not_fit_is_for_whoever_asks_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.limits.DELIVERY_BYTES", 300)
    setting = Setting()
    fill(setting.log, *numbered(10))
    first = setting.deliver()
    assert setting.groups.stats()["g"].in_flight == len(first) < 10
    setting.groups.join("g", "b", 100)
    delivery = setting.delivery("b")
    assert [payload for _, payload in contents(delivery)][:1] == numbered(1, len(first))
    assert {deliveries for _, _, deliveries in delivery.grants} == {1}, "it is its first"


@pytest.mark.parametrize("order", ["any", "key", "exclusive"])
def test_the_order_holds_where_not_all_fits(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.limits.DELIVERY_BYTES", 300)
    setting = Setting(order=order)
    fill(setting.log, *(NewRecord(codec.pack(f"record {n}"), b"key") for n in range(20)))
    got: list[str] = []
    while some := setting.deliver():
        got += some
    assert got == numbered(20)


def test_a_disk_that_did_not_read_once_is_asked_again() -> None:
    setting = Setting()
    fill(setting.log, *numbered(3))
    read = Cursor.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cursor, "read", out_of_files)
        assert setting.deliver() == []
    assert Cursor.read is read
    assert setting.groups.stats()["g"].counters["unreadable"] == 1
    assert setting.deliver() == numbered(3)


def out_of_files(*_: Any) -> list[Found]:
    raise OSError(errno.EMFILE, "Too many open files")


def test_what_was_kept_no_more_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.durable.batch_cache._KEPT_BYTES", 200)
    monkeypatch.setattr("mesh.durable.batch_cache._AGAIN_BYTES", 200)
    setting = Setting()
    fill(setting.log, *numbered(60), per_batch=2)
    assert setting.deliver() == numbered(60)
    setting.ack(*range(0, 60, 7))
    setting.groups.leave("g", "a")
    setting.groups.join("g", "a", 100)
    assert setting.deliver() == [f"record {n}" for n in range(60) if n % 7]


def test_nothing_is_kept_of_what_is_settled() -> None:
    setting = Setting()
    fill(setting.log, *numbered(10))
    setting.deliver()
    cache = setting.groups._groups["g"].supply._cache
    assert cache._told
    setting.ack(*range(10))
    setting.deliver()
    assert not cache._told
    assert cache._bytes == 0


@pytest.mark.damages
def test_a_dead_letter_that_cannot_be_read_keeps_no_other() -> None:
    setting = Setting()
    fill(setting.log, *numbered(60))
    setting.deliver()
    last = setting.log.segments[-1].base
    setting.groups._groups["g"].supply._cache.forget(60)
    file = setting.disk.open(setting.log.segments[0].name)
    file._content.shown[70] ^= 1
    rejects = ((0, "unreadable"), (last, "good"))
    setting.groups.settle("g", "a", Settlements(rejects=rejects), 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cursor, "read", out_of_files)
        assert letters(setting.groups) == []
    assert [letter.dead.offset for letter in letters(setting.groups)] == [last]
    assert letters(setting.groups) == []
    assert setting.groups.stats()["g"].counters["dead and damaged"] == 1


def test_whoever_comes_after_retention_is_told_of_the_gap() -> None:
    setting = Setting()
    fill(setting.log, *numbered(60))
    setting.deliver()
    setting.groups.leave("g", "a")
    for segment in (1, 1):
        setting.log.trim(setting.log.segments[segment].base)
        setting.groups.trimmed()
    start = setting.log.start
    setting.groups.join("g", "b", 2)
    assert setting.groups.gaps("g", "b") == [(0, start - 1, start)]
    assert setting.deliver("b") == numbered(2, start)


def test_a_member_is_told_of_gaps_as_one() -> None:
    setting = Setting()
    fill(setting.log, *numbered(60))
    for _ in range(2):
        setting.log.trim(setting.log.segments[1].base)
        setting.groups.trimmed()
    assert setting.delivery() != Delivery((), ())
    start = setting.log.start
    assert setting.groups.gaps("g", "a") == [(0, start - 1, start)]


def test_nothing_is_due_where_nobody_would_get_it() -> None:
    """Or who waits for that moment, would never wait."""
    setting = Setting()
    fill(setting.log, NewRecord(codec.pack("later"), due_ns=5 * SECOND_NS))
    assert setting.deliver() == []
    assert setting.groups.next_at() == pytest.approx(5.0)
    setting.groups.deliver("g", [], 6.0, 0)
    assert setting.groups.next_at() is None, "it waits for somebody who asks"
    setting.groups.leave("g", "a")
    assert setting.groups.next_at() is None


def test_retention_takes_nothing_of_which_no_disk_knows_that_it_is_settled() -> None:
    setting = Setting()
    fill(setting.log, *numbered(5))
    setting.deliver()
    setting.groups.sync()
    setting.ack(0, 1, 2)
    setting.disk.faults.fail("append")
    for nth in (1, 2):
        setting.disk.faults.fail("create", nth)
    assert setting.groups.acked_to() == 0
    assert setting.groups.stats()["g"].committed == 3
    assert setting.groups.stats()["g"].counters["journal failed"] > 0
    assert setting.groups.acked_to() == 3
    assert setting.again("crash").groups.stats()["g"].committed == 3


@pytest.mark.parametrize("how", ["kill", "crash"])
def test_where_a_disk_has_no_room_for_what_is_settled_that_goes_and_makes_some(how: str) -> None:
    """Else the disk would be full for ever. That it was settled, its absence says."""
    setting = Setting()
    fill(setting.log, *numbered(40))
    setting.deliver()
    setting.groups.sync()
    setting.ack(*range(35))
    setting.disk.faults.room_bytes = 0
    assert setting.groups.acked_to() == 35
    setting.log.trim(35)
    start = setting.log.start
    assert 0 < start <= 35
    disk = setting.disk.kill() if how == "kill" else setting.disk.crash(Random(5))
    disk.faults.room_bytes = None
    log = open_log(disk, segment_bytes=2000)
    groups = Groups(disk.folder("groups"), log, trims_unsettled=False)
    assert groups.committed("g") == log.start
    groups.join("g", "a", 100)
    assert [offset for offset, _ in contents(deliver(groups, "a"))] == [*range(log.start, 40)]
    assert groups.gaps("g", "a") == []
    assert "trimmed" not in groups.stats()["g"].counters


@pytest.mark.parametrize("operation", ["append", "sync"])
def test_a_journal_that_failed_is_begun_anew(operation: Operation) -> None:
    setting = Setting()
    fill(setting.log, *numbered(5))
    setting.deliver()
    setting.groups.sync()
    setting.ack(0, 1)
    setting.disk.faults.fail(operation)
    setting.groups.sync()
    setting = Setting(setting.disk.crash(Random(3)))
    assert setting.deliver() == numbered(3, 2)


def test_a_journal_that_grows_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.durable.journal._GROWN_BYTES", 500)
    setting = Setting()
    fill(setting.log, *numbered(100))
    setting.deliver()
    sizes = []
    for offset in range(100):
        setting.ack(offset)
        setting.groups.write()
        sizes.append(setting.disk.folder("groups").open("g").size())
    assert max(sizes) < 1000
    assert setting.again("kill").groups.stats()["g"].committed == 100


def test_a_journal_is_read_up_to_where_it_is_damaged() -> None:
    """What comes after that is lost, and delivered again."""
    setting = Setting()
    fill(setting.log, *numbered(6))
    setting.deliver()
    for offset in range(6):
        setting.ack(offset)
        setting.groups.write()
    disk = setting.disk.kill()
    whole = disk.folder("groups").open("g")._content.shown
    seen = set()
    for at in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        disk.folder("groups").replace("g", bytes(damaged))
        groups = Groups(disk.folder("groups"), setting.log)
        if "g" in groups:
            groups.join("g", "a", 100)
            committed = groups.stats()["g"].committed
            assert contents(deliver(groups, "a")) == [
                (n, f"record {n}") for n in range(committed, 6)
            ]
            assert groups.stats()["g"].counters["journal bytes left out"] > 0
            seen.add(committed)
    assert seen == set(range(6))


def test_an_entry_that_means_nothing_ends_a_journal() -> None:
    setting = Setting()
    fill(setting.log, *numbered(3))
    setting.deliver()
    setting.ack(0)
    setting.groups.write()
    disk = setting.disk.kill()
    journal = Journal(disk.folder("groups"), "g", PARTITION)
    disk.folder("groups").open("g").append([journal._entry(b"\xc1")])
    assert Setting(disk).groups.stats()["g"].committed == 1


def test_positions_far_away_cost_nothing() -> None:
    setting = Setting()
    setting.log.append([batch([b"x"], count=4_000_000_000)], 0)
    setting.log.sync()
    setting.groups.resume("g", 5_000_000_000)
    assert setting.groups.stats()["g"].committed == 4_000_000_000
    setting.groups.write()
    assert setting.again("kill").groups.stats()["g"].committed == 4_000_000_000


def test_groups_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.limits.GROUPS_MAX", 2)
    setting = Setting()
    with pytest.raises(InvalidName, match="300 bytes as a file, over the limit of 250"):
        setting.groups.open("ü" * 50, AskedOptions(), 0)
    setting.groups.open("h", AskedOptions(), 0)
    with pytest.raises(LogFull, match="there are 2 groups already"):
        setting.groups.open("i", AskedOptions(), 0)


def test_a_group_is_removed_for_good() -> None:
    setting = Setting()
    fill(setting.log, *numbered(3))
    setting.deliver()
    setting.ack(0, 1)
    setting.disk.faults.fail("remove")
    with pytest.raises(OSError, match="Input/output"):
        setting.groups.remove("g")
    assert setting.groups.stats()["g"].committed == 2, "it is there still"
    setting.groups.remove("g")
    assert "g" not in setting.groups
    setting = Setting(setting.disk.crash(Random(1)))
    assert setting.deliver() == numbered(3), "it is another"


def test_a_group_with_a_damaged_journal_can_be_removed() -> None:
    setting = Setting()
    fill(setting.log, *numbered(3))
    setting.disk.folder("groups").replace("g", b"garbage")
    groups = Groups(setting.disk.folder("groups"), setting.log)
    groups.remove("g")
    groups.open("g", AskedOptions(), 2)
    assert groups.acked_to() == 2


def test_what_is_not_settled_in_time_goes_to_another() -> None:
    setting = Setting(ack_wait_s=10)
    fill(setting.log, *numbered(2))
    setting.deliver()
    setting.ack(0)
    setting.groups.join("g", "b", 100)
    assert setting.deliver("b", now=9.9) == []
    assert setting.groups.next_at() == 10.0
    assert setting.delivery("b", now=10.0).grants == ((1, 2, 2),)


def test_nothing_is_due_in_a_group_without_members_or_that_is_stopped() -> None:
    """There is nobody to be served at that moment."""
    setting = Setting()
    fill(setting.log, NewRecord(codec.pack("later"), due_ns=5 * SECOND_NS), *numbered(60))
    setting.groups.join("g", "a", 3)
    setting.deliver()
    setting.groups.leave("g", "a")
    assert setting.groups.next_at() is None
    setting.groups.join("g", "a", 100)
    assert setting.groups.next_at() == pytest.approx(5.0)
    file = setting.disk.open(setting.log.segments[-1].name)
    file._content.shown[70] ^= 1
    setting.deliver()
    assert setting.groups._groups["g"].supply.stopped
    assert setting.groups.next_at() is None


@pytest.mark.parametrize("order", ["any", "key"])
def test_a_group_that_looked_as_far_as_it_may_goes_on_from_there(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.limits.GROUP_WINDOW", 5)
    setting = Setting(order=order)
    fill(setting.log, *(NewRecord(codec.pack(f"record {n}"), b"k") for n in range(20)), per_batch=4)
    assert setting.deliver() == numbered(5)
    setting.ack(1, 2)
    assert setting.deliver() == []
    setting.ack(0)
    assert setting.deliver() == numbered(3, 5)


def test_of_what_retention_took_a_part_the_rest_is_delivered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if it took it just now, and has not said so."""
    monkeypatch.setattr("mesh.durable.batch_cache._KEPT_BYTES", 200)
    setting = Setting()
    fill(setting.log, *numbered(60))
    assert setting.deliver() == numbered(60)
    setting.groups.leave("g", "a")
    setting.groups.join("g", "a", 100)
    setting.log.trim(setting.log.segments[1].base)
    start = setting.log.start
    assert setting.deliver() == numbered(60 - start, start)


def test_what_is_kept_is_bounded_and_what_is_not_is_read_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mesh.durable.batch_cache._KEPT_BYTES", 3000)
    setting = Setting()
    fill(setting.log, *numbered(100))
    assert setting.deliver() == numbered(100)
    cache = setting.groups._groups["g"].supply._cache
    assert 2500 < cache._bytes == sum(each.header.size for each in cache._told) <= 3000
    reads = 0
    read = Cursor.read

    def counted(cursor: Cursor, bytes_max: int) -> list[Found] | Gap | Cut:
        nonlocal reads
        reads += 1
        return read(cursor, bytes_max)

    setting.groups.leave("g", "a")
    setting.groups.join("g", "a", 100)
    with monkeypatch.context() as patch:
        patch.setattr(Cursor, "read", counted)
        assert setting.deliver() == numbered(100)
    assert 0 < reads <= 20


def test_what_follows_a_torn_journal_is_not_lost() -> None:
    setting = Setting()
    fill(setting.log, *numbered(5))
    setting.deliver()
    setting.ack(0)
    setting.groups.write()
    setting.disk.folder("groups").open("g").append([b"torn"])
    setting = setting.again("kill")
    assert setting.groups.stats()["g"].counters["journal bytes left out"] == 4
    setting.deliver()
    setting.ack(1)
    setting.groups.write()
    assert setting.again("kill").groups.stats()["g"].committed == 2


def test_groups_that_cannot_be_opened_leave_no_file_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks next tries again."""
    setting = Setting()
    setting.groups.open("h", AskedOptions(), 0)
    disk = setting.disk.kill()
    begin, journals = Journal.begin, []

    def noted(journal: Journal, *what: Any) -> None:
        begin(journal, *what)
        journals.append(journal)
        monkeypatch.setattr(Groups, "_kept_since", out_of_files)

    monkeypatch.setattr(Journal, "begin", noted)
    with pytest.raises(OSError, match="Too many open files"):
        Groups(disk.folder("groups"), setting.log)
    assert [journal._file for journal in journals] == [None]


def test_a_group_without_members_keeps_no_segment_open(tmp_path: Path) -> None:
    """Nor on the disk, once retention has removed it."""
    disk = Disk(tmp_path / "log")
    with contextlib.closing(open_log(disk)) as log:
        groups = Groups(disk.folder("groups"), log)
        groups.open("g", AskedOptions(), 0)
        fill(log, *numbered(3))
        before = descriptors()
        for records in (numbered(3), numbered(2, 3)):
            groups.join("g", "a", 100)
            groups.join("g", "b", 100)
            assert [payload for _, payload in contents(deliver(groups, "a"))] == records
            groups.settle("g", "a", Settlements(acks=((0, 100),)), 0.0)
            groups.leave("g", "a")
            assert descriptors() == before + 1
            groups.leave("g", "b")
            assert descriptors() == before
            fill(log, *numbered(2, 3))
        groups.close()
    disk.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
