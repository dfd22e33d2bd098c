"""What the groups of a partition promise, on a disk that fails: nothing is settled that nobody
acknowledged, and nothing that was remembered is forgotten."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mesh.durable.deliveries import AskedOptions, Delivery, Settlements
from mesh.durable.group import GroupOptions
from mesh.durable.groups import Groups, file_name_of
from mesh.durable.log import Log
from mesh.durable.protocol import read_batch
from mesh.durable.records import NewRecord, batch_of, payloads_of
from mesh.errors import LogDamaged, OptionsDiffer
from mesh.sockets import codec
from tests.support.fake_disk import FakeDisk
from tests.support.logs import PARTITION, open_log

SECOND_NS = 1_000_000_000


def fill(log: Log, *records: NewRecord | str, per_batch: int = 1) -> None:
    """Append them, synced."""
    made = [
        record if isinstance(record, NewRecord) else NewRecord(codec.pack(record))
        for record in records
    ]
    for at in range(0, len(made), per_batch):
        log.append([batch_of(made[at : at + per_batch])], 0)
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
        self.groups.grant("g", now, now_ns)
        return [payload for _, payload in contents(self.groups.fetch("g", member))]

    def ack(self, *offsets: int, member: str = "a") -> None:
        acks = tuple((offset, offset + 1) for offset in offsets)
        self.groups.settle("g", member, Settlements(acks=acks), 0.0)

    def again(self, how: str) -> Setting:
        """After a restart."""
        if how == "kill":
            return Setting(self.disk.kill())
        self.groups.sync()
        return Setting(self.disk.crash(Random(5)))


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
    monkeypatch.setattr("mesh.durable.groups._DELIVERY_BYTES", 300)
    setting = Setting()
    fill(setting.log, *numbered(20))
    got: list[str] = []
    while some := setting.deliver():
        assert len(some) < 8
        got += some
    assert got == numbered(20)


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
    setting.groups.grant("g", 0.0, 0)
    assert setting.groups.fetch("g", "a").grants == ((0, 1, 2), (1, 2, 2))
    setting.groups.write()
    setting = setting.again("kill")
    assert setting.deliver() == []
    assert [letter.dead.offset for letter in setting.groups.letters("g")] == [0, 1]


def test_a_dead_letter_brings_its_record() -> None:
    setting = Setting()
    fill(setting.log, "bad", "good")
    setting.deliver()
    setting.groups.settle("g", "a", Settlements(rejects=((0, "no customer"),)), 0.0)
    (letter,) = setting.groups.letters("g")
    assert (letter.group, letter.dead.offset, letter.dead.reason) == ("g", 0, "no customer")
    assert payloads_of(letter.found.header, letter.found.body) == ["bad"]
    assert setting.groups.stats()["g"].committed == 0
    setting.groups.buried("g", 0)
    assert setting.groups.stats()["g"].committed == 1


def test_keys_are_kept_in_order_across_members() -> None:
    setting = Setting(order="key")
    setting.groups.join("g", "b", 100)
    fill(
        setting.log,
        *(NewRecord(codec.pack(f"{key}{n}"), key.encode()) for n in range(3) for key in "xy"),
        per_batch=4,
    )
    setting.groups.grant("g", 0.0, 0)
    for member in "ab":
        got = [payload for _, payload in contents(setting.groups.fetch("g", member))]
        for key in "xy":
            mine = [payload for payload in got if payload[0] == key]
            assert mine in ([], [f"{key}{n}" for n in range(3)])


def test_a_delayed_record_waits_for_its_time() -> None:
    setting = Setting()
    fill(setting.log, NewRecord(codec.pack("later"), due_ns=5 * SECOND_NS), "now")
    assert setting.deliver(now=100.0, now_ns=2 * SECOND_NS) == ["now"]
    assert setting.groups.next_at() == pytest.approx(103.0)
    assert setting.deliver(now=102.9, now_ns=0) == []
    assert setting.deliver(now=103.0, now_ns=0) == ["later"]


def test_what_has_fallen_out_of_memory_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.durable.groups._KEPT_BYTES", 500)
    monkeypatch.setattr("mesh.durable.groups._AGAIN_BYTES", 300)
    setting = Setting()
    fill(setting.log, *numbered(60), per_batch=2)
    assert setting.deliver() == numbered(60)
    setting.groups.leave("g", "a")
    setting.groups.join("g", "b", 100)
    assert setting.deliver("b") == numbered(60)
    assert len(setting.groups._groups["g"].kept) < 8


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
    assert setting.groups.grant("g", 0.0, 0) == ["a"]
    assert setting.groups.gaps("g", "a") == [(0, start - 1, start)]
    assert setting.groups.gaps("g", "a") == []
    assert setting.deliver() == numbered(2, start)


def test_retention_may_take_what_every_group_has_settled() -> None:
    setting = Setting()
    assert Groups(FakeDisk().folder("groups"), setting.log).acked_to() is None
    setting.groups.open("other", AskedOptions(), 0)
    setting.groups.join("other", "z", 10)
    fill(setting.log, *numbered(5))
    setting.deliver()
    setting.ack(0, 1, 2)
    assert setting.groups.acked_to() == 0
    setting.groups.grant("other", 0.0, 0)
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
    setting.groups.settle("g", "a", Settlements(resume=7), 0.0)
    assert setting.deliver() == numbered(3, 7)
    setting.groups.settle("g", "a", Settlements(resume=9), 0.0)
    assert setting.groups.stats()["g"].committed == 9


def test_a_damaged_journal_stops_its_group_alone() -> None:
    setting = Setting()
    setting.groups.open("other", AskedOptions(), 0)
    fill(setting.log, "a")
    disk = setting.disk.kill()
    disk.folder("groups").replace("g", b"garbage")
    groups = Groups(disk.folder("groups"), setting.log)
    with pytest.raises(LogDamaged):
        groups.open("g", AskedOptions(), 0)
    groups.open("other", AskedOptions(), 0)
    assert groups.acked_to() is None, "or retention would take what it may not have settled"


def test_a_group_whose_log_is_damaged_says_so_to_its_members() -> None:
    setting = Setting()
    fill(setting.log, *numbered(3))
    file = setting.disk.open(setting.log.segments[0].name)
    file._content.shown[150] ^= 1
    assert setting.groups.grant("g", 0.0, 0) == ["a"]
    assert contents(setting.groups.fetch("g", "a")) == [(0, "record 0")]
    assert setting.groups.grant("g", 0.0, 0) == ["a"]
    with pytest.raises(LogDamaged):
        setting.groups.fetch("g", "a")


def test_names_of_groups_may_be_anything_that_channels_may() -> None:
    disk = FakeDisk()
    log = open_log(disk)
    names = ["a/b", "a.b", ".", "..", "größe", "%2F"]
    groups = Groups(disk.folder("groups"), log)
    for name in names:
        groups.open(name, AskedOptions(), 0)
    assert sorted(Groups(disk.kill().folder("groups"), log).stats()) == sorted(names)
    assert len({file_name_of(name) for name in names}) == len(names)


def test_a_group_begins_again_where_a_log_has_lost_its_tail() -> None:
    """Only where losing it was allowed: other records get those offsets."""
    disk = FakeDisk()
    log = Log(disk, PARTITION, now_ns=0, shown_when_synced=False)
    fill(log, *numbered(3))
    groups = Groups(disk.folder("groups"), log)
    groups.open("g", AskedOptions(), 0)
    groups.join("g", "a", 10)
    log.append([batch_of([NewRecord(codec.pack("lost"))])], 0)
    groups.grant("g", 0.0, 0)
    assert len(contents(groups.fetch("g", "a"))) == 4
    groups.settle("g", "a", Settlements(acks=((0, 4),)), 0.0)
    disk.faults.fail("sync")
    with pytest.raises(Exception, match="Input/output"):
        log.sync()
    log.mend()
    assert log.end == 3
    assert groups.rewind()
    assert not groups.has("g", "a")
    fill(log, "other")
    groups.join("g", "a", 10)
    groups.grant("g", 0.0, 0)
    assert contents(groups.fetch("g", "a")) == [(3, "other")]


class GroupsMachine(RuleBasedStateMachine):
    """Groups of a log that grows and is trimmed, on a disk that fails, with members that come and
    go, against what was said to them."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = FakeDisk(1)
        self.log = open_log(self.disk, segment_bytes=900)
        self.groups = Groups(self.disk.folder("groups"), self.log)
        self.groups.open("g", AskedOptions(ack_wait_s=10), 0)
        self.now = 0.0
        self.number = 0
        self.holding: dict[str, list[int]] = {}
        self.acked: set[int] = set()
        """Whose acknowledgement was written down, or is about to be."""
        self.synced: set[int] = set()
        self.committed = 0

    @rule(count=st.integers(1, 6), per_batch=st.integers(1, 3))
    def append(self, count: int, per_batch: int) -> None:
        fill(self.log, *numbered(count, self.number), per_batch=per_batch)
        self.number += count

    @rule(member=st.sampled_from("abc"), prefetch=st.integers(1, 8))
    def join(self, member: str, prefetch: int) -> None:
        self.groups.join("g", member, prefetch)
        self.holding.setdefault(member, [])

    @rule(member=st.sampled_from("abc"))
    def leave(self, member: str) -> None:
        self.groups.leave("g", member)
        self.holding.pop(member, None)

    @rule(member=st.sampled_from("abc"))
    def deliver(self, member: str) -> None:
        self.groups.grant("g", self.now, 0)
        if member in self.holding:
            for offset, payload in contents(self.groups.fetch("g", member)):
                assert payload == f"record {offset}"
                assert offset not in self.acked, "again, after it was done"
                self.holding[member].append(offset)

    @rule(member=st.sampled_from("abc"), data=st.data())
    def settle(self, member: str, data: st.DataObject) -> None:
        held = self.holding.get(member)
        if held:
            offset = data.draw(st.sampled_from(held))
            held.remove(offset)
            how = data.draw(st.sampled_from(["ack", "ack", "nak"]))
            if how == "ack":
                said = Settlements(acks=((offset, offset + 1),))
                self.acked.add(offset)
            else:
                said = Settlements(naks=((offset, 0.0),))
            self.groups.settle("g", member, said, self.now)
            self.groups.write()

    @rule(seconds=st.sampled_from([1.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def sync(self) -> None:
        self.groups.sync()
        if not self.groups.stats()["g"].counters.get("journal failed"):
            self.synced = set(self.acked)

    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        acked_to = self.groups.acked_to() or 0
        self.log.trim(acked_to)
        self.groups.trimmed()
        self.synced = set(self.acked)

    @rule(how=st.sampled_from(["kill", "crash"]), seed=st.integers(0, 1 << 16))
    def restart(self, how: str, seed: int) -> None:
        if how == "kill":
            self.disk = self.disk.kill()
        else:
            self.disk = self.disk.crash(Random(seed))
            self.acked = set(self.synced)  # more may be; they are found out as they come
            self.committed = 0
        self.log = open_log(self.disk, segment_bytes=900)
        self.groups = Groups(self.disk.folder("groups"), self.log)
        self.holding.clear()
        if how == "crash":
            tally = self.groups._groups["g"].group._tally
            self.acked |= {n for n in range(self.number) if n in tally.settled}

    @invariant()
    def what_is_committed_does_not_go_back(self) -> None:
        committed = self.groups.stats()["g"].committed
        assert committed >= self.committed
        assert set(range(committed)) <= self.acked, "settled, and nobody said so"
        self.committed = committed

    def teardown(self) -> None:
        for member in list(self.holding):
            self.groups.leave("g", member)
        self.groups.join("g", "last", 1000)
        self.groups.grant("g", self.now + 100, 0)
        rest = [offset for offset, _ in contents(self.groups.fetch("g", "last"))]
        assert sorted(rest) == sorted(set(range(self.number)) - self.acked)


TestGroupsMachine = GroupsMachine.TestCase
