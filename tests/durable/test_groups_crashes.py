"""A group of random orders, members and deaths, on a disk that fails, against what was said to it:

- what was settled and synced is, after a crash; what was settled and written, after a kill;
- nothing is settled that nobody settled; what is committed does not go back;
- what is not settled is delivered again, as it stands in the log, and what is settled is not.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from random import Random
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mesh.durable.deliveries import AskedOptions, Delivery, Settlements
from mesh.durable.groups import Groups
from mesh.durable.journal import Journal
from mesh.durable.progress import Tally
from mesh.durable.records import NewRecord, payloads_of
from mesh.durable.waiting import Order
from mesh.errors import LogDamaged
from mesh.sockets import codec
from tests.durable.test_groups import contents, fill
from tests.support.fake_disk import FakeDisk, Operation, Stopped
from tests.support.logs import PARTITION, open_log, sound

SMALL = {
    "mesh.limits.GROUP_WINDOW": 16,
    "mesh.durable.supply._TELL_BYTES": 300,
    "mesh.limits.DELIVERY_BYTES": 500,
    "mesh.durable.batch_cache._KEPT_BYTES": 400,
    "mesh.durable.batch_cache._AGAIN_BYTES": 200,
    "mesh.durable.journal._GROWN_BYTES": 300,
}
"""So that the bounds are met."""
MEMBERS = st.sampled_from("abc")
Failing = tuple[tuple[Operation, int], ...]
FAILING: st.SearchStrategy[Failing] = st.sampled_from(
    [
        (),
        (("append", 1),),
        (("append", 1), ("append", 2)),
        (("append", 1), ("rename", 1)),
        (("append", 1), ("names", 1)),
        (("sync", 1),),
        (("sync", 1), ("sync", 2)),
    ]
)
"""Of what comes next on the disk: the journal's own, and what is begun anew in its place."""


def key_of(number: int) -> bytes | None:
    return None if number % 4 == 3 else b"key %d" % (number % 4)


def payload_of(number: int) -> str:
    return f"record {number} " + "x" * (200 if number % 11 == 5 else 0)


class GroupMachine(RuleBasedStateMachine):
    order: Order = "any"

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        for name, value in SMALL.items():
            self.stack.enter_context(patch(name, value))
        self.disk = FakeDisk(1)
        self.log = open_log(self.disk, segment_bytes=900)
        self.groups = Groups(self.disk.folder("groups"), self.log)
        self.groups.open("g", AskedOptions(order=self.order, ack_wait_s=10), 0)
        self.now = 0.0
        self.number = 0
        self.holding: dict[str, list[int]] = {}
        self.settled: set[int] = set()
        """By now."""
        self.said: set[int] = set()
        """Ever, by somebody or by retention."""
        self.written: set[int] = set()
        self.synced: set[int] = set()
        self.failed = False
        """The journal, and it may not have been begun anew since."""
        self.rejected: set[int] = set()
        """Ever."""
        self.committed = 0
        self.append(6, 2)

    # -- What happens ------------------------------------------------------------------------

    @rule(count=st.integers(1, 6), per_batch=st.integers(1, 3))
    def append(self, count: int, per_batch: int) -> None:
        numbers = range(self.number, self.number + count)
        records = [NewRecord(codec.pack(payload_of(n)), key_of(n)) for n in numbers]
        fill(self.log, *records, per_batch=per_batch)
        self.number += count

    @rule(member=MEMBERS, prefetch=st.integers(1, 12))
    def join(self, member: str, prefetch: int) -> None:
        self.groups.join("g", member, prefetch)
        self.holding.setdefault(member, [])
        self.remember(())  # retention may have taken something meanwhile

    @rule(member=MEMBERS)
    def leave(self, member: str) -> None:
        self.groups.leave("g", member)
        self.holding.pop(member, None)

    @rule(asking=st.lists(MEMBERS, unique=True, min_size=1), failing=FAILING)
    def deliver(self, asking: list[str], failing: Failing) -> None:
        for member in asking:
            if member not in self.holding:
                self.join(member, 6)
        for member, got in self.given(asking).items():
            self.holding[member] += got
        self.remember(failing)

    @precondition(lambda self: any(self.holding.values()))
    @rule(data=st.data(), how=st.sampled_from(["ack", "ack", "nak", "reject"]), failing=FAILING)
    def settle(self, data: st.DataObject, how: str, failing: Failing) -> None:
        member = data.draw(st.sampled_from([m for m, held in self.holding.items() if held]))
        held = self.holding[member]
        offset = held.pop(data.draw(st.integers(0, len(held) - 1)))
        if how == "ack":
            self.ack(member, offset)
        elif how == "reject":
            self.groups.settle("g", member, Settlements(rejects=((offset, "bad"),)), self.now)
            self.rejected.add(offset)
        else:
            self.groups.settle("g", member, Settlements(naks=((offset, 0.0),)), self.now)
        self.remember(failing)

    def ack(self, member: str, offset: int) -> None:
        self.groups.settle("g", member, Settlements(acks=((offset, offset + 1),)), self.now)
        self.settled.add(offset)
        self.said.add(offset)

    @rule(member=MEMBERS, failing=FAILING)
    def handle(self, member: str, failing: Failing) -> None:
        """All that it gets, and all of it is confirmed, if the disk does not fail."""
        self.deliver([member], ())
        while self.holding[member]:
            self.ack(member, self.holding[member].pop())
        self.remember(failing, sync=True)

    @rule(failing=FAILING)
    def bury(self, failing: Failing) -> None:
        """What was rejected by whoever held it is settled when it is safe elsewhere."""
        while (letter := self.groups.letter("g")) is not None:
            offset, header = letter.dead.offset, letter.found.header
            payloads = list(payloads_of(header, letter.found.body))
            assert payloads[offset - header.offset] == payload_of(offset)
            assert offset in self.rejected - self.settled
            self.groups.buried("g", offset)
            self.settled.add(offset)
            self.said.add(offset)
        self.remember(failing)

    @rule(seconds=st.sampled_from([1.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(failing=FAILING)
    def sync(self, failing: Failing) -> None:
        self.remember(failing, sync=True)

    @rule(failing=FAILING)
    def trim_what_is_acked(self, failing: Failing) -> None:
        self.log.trim(self.remember(failing, sync=True))
        self.groups.trimmed()
        self.remember(())

    @rule()
    def trim(self) -> None:
        """Whether or not it is settled."""
        if len(self.log.segments) > 2:
            self.log.trim(self.log.segments[1].base)
            self.groups.trimmed()
            self.remember(())

    @rule(
        crash=st.booleans(),
        stop=st.sampled_from([0, 0, 0, *range(1, 9)]),
        seed=st.integers(0, 1 << 16),
    )
    def end(self, crash: bool, stop: int, seed: int) -> None:
        """Of the process or the machine, perhaps while it writes."""
        if stop:
            self.disk.faults.stop_at = self.disk.faults.done.total() + stop
            try:
                self.groups.sync()
            except Stopped:
                pass
            else:
                self.disk.faults.stop_at = 0
                self.remember((), sync=True)
        self.said |= self.gone  # it may be back: a removal is not synced at once
        disk = self.disk.crash(Random(seed)) if crash else self.disk.kill()
        log = open_log(disk, segment_bytes=900)
        groups = Groups(disk.folder("groups"), log)
        assert "g" in groups, "gone, or damaged"
        tally = groups._groups["g"].group._tally
        found = {n for n in range(self.number) if n in tally.settled}
        assert (self.synced if crash else self.written) <= found, "forgotten"
        assert found <= self.said, "invented"
        self.disk, self.log, self.groups = disk, log, groups
        self.holding.clear()
        self.settled, self.written, self.synced = set(found), set(found), found
        if crash or self.failed:
            self.committed = 0
        self.failed = False

    # -- What is to be -----------------------------------------------------------------------

    @property
    def gone(self) -> set[int]:
        """What retention took."""
        return set(range(self.log.start))

    def given(self, asking: list[str]) -> dict[str, list[int]]:
        """The offsets that each gets, and they are what they should be."""
        given = {}
        for member, delivery in self.groups.deliver("g", asking, self.now, 0).items():
            assert isinstance(delivery, Delivery), delivery
            assert member in asking
            records = contents(delivery)
            for offset, payload in records:
                assert payload == payload_of(offset)
                assert offset not in self.settled, "again, after it was done"
                assert offset >= self.log.start
            offsets = given[member] = [offset for offset, _ in records]
            if self.order != "any":
                keys = {key_of(offset) if self.order == "key" else b"" for offset in offsets}
                for key in keys - {None}:
                    mine = [o for o in offsets if self.order != "key" or key_of(o) == key]
                    assert mine == sorted(mine)
            for first, last, count in self.groups.gaps("g", member):
                assert last < self.log.start
                assert count <= last + 1 - first
        everything = [offset for offsets in given.values() for offset in offsets]
        assert len(everything) == len(set(everything)), "to two at a time"
        return given

    def remember(self, failing: Failing, *, sync: bool = False) -> int:
        """What `write` or `sync` promise to, if the disk does not fail them. How far retention may
        go now."""
        before = self.failures
        for operation, nth in failing:
            self.disk.faults.fail(operation, nth)
        acked_to: int | None = 0
        if sync:
            acked_to = self.groups.acked_to()  # it syncs
        else:
            self.groups.write()
        self.disk.faults.mend()
        if self.failures > before:
            self.failed = True
            self.written = set(self.synced)  # a sync that failed takes with it what was written
        elif sync:
            self.failed = False
        if not self.failed:
            self.written = set(self.settled)
            if sync:
                self.synced = set(self.settled)
        assert acked_to is not None
        if sync:
            assert self.synced | set(range(acked_to)) <= self.on_disk(), "not on disk"
        return acked_to

    def on_disk(self) -> set[int]:
        """What would be settled after a crash."""
        disk = self.disk.crash(Random(self.number)).folder("groups")
        with suppress(FileNotFoundError, LogDamaged):
            _, progress = Journal(disk, "g", PARTITION).read()
            settled = Tally.restore(progress, self.number).settled
            return {n for n in range(self.number) if n in settled}
        return set()

    @property
    def failures(self) -> int:
        return self.groups.stats()["g"].counters.get("journal failed", 0)

    @invariant()
    def what_is_committed_does_not_go_back(self) -> None:
        stats = self.groups.stats()["g"]
        assert stats.committed >= self.committed
        assert set(range(stats.committed)) <= self.settled | self.gone
        self.committed = stats.committed

    def teardown(self) -> None:
        try:
            self.bury(())
            if self.order == "exclusive":
                for member in list(self.holding):
                    self.groups.leave("g", member)
            self.now += 20  # the leases of all others run out
            self.groups.join("g", "last", 1000)
            rest: list[int] = []
            while given := self.given(["last"]):
                rest += given["last"]
                acks = tuple((offset, offset + 1) for offset in given["last"])
                self.groups.settle("g", "last", Settlements(acks=acks), self.now)
            left = set(range(self.number)) - self.settled - self.gone
            assert sorted(rest) == sorted(left), "not what is left"
            sound(self.disk)
        except Stopped:
            pass  # what was amiss after that end has been raised
        finally:
            self.stack.close()


class KeyMachine(GroupMachine):
    order = "key"


class ExclusiveMachine(GroupMachine):
    order = "exclusive"


SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestGroup = GroupMachine.TestCase
TestKey = KeyMachine.TestCase
TestExclusive = ExclusiveMachine.TestCase
TestGroup.settings = TestKey.settings = TestExclusive.settings = SETTINGS
