"""A group against a model that keeps everything of each record and looks through all of them.

Members come and go, leases end, records are handed back, rejected and trimmed, and the group is
restored from any part of its journal. The model says exactly what state each record is in; of what
`take` gives it says whether it was allowed, and whether anything was left that should have gone.
"""

from __future__ import annotations

from random import Random
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from mesh import limits
from mesh.durable.group import Group, GroupOptions, Trimmed
from mesh.durable.progress import Progress
from mesh.durable.waiting import Order
from tests.support.groups import newly_dead

WINDOW = 12
MEMBERS_MAX = 3
WAIT_S = 10.0
MAX_DELIVER = 3

NAMES = st.sampled_from(["a", "b", "c", "d"])
KEYS = st.sampled_from([b"x", b"x", b"y", b"z", None])
PLACES = st.integers(0, WINDOW + 1)
DELAYS_S = st.sampled_from([0.0, 0.0, 1.0, 7.0, 25.0])


class Record:
    """All there is to know of one."""

    def __init__(self, key: bytes | None, due: float) -> None:
        self.key = key
        self.due = due
        self.told = False
        self.settled = False
        self.delivered = False
        self.dead = False
        self.count = 0
        self.holder: str | None = None
        self.lease = (0.0, 0)
        """When it ends, and the number of the grant."""

    def rest(self) -> None:
        self.holder = None
        self.dead = False
        self.due = 0.0

    def settle(self) -> None:
        self.rest()
        self.settled = True
        self.count = 0


Kept = tuple[Progress, set[int], dict[int, int]]


class Machine(RuleBasedStateMachine):
    order: ClassVar[Order]

    def __init__(self) -> None:
        super().__init__()
        self.options = GroupOptions(order=self.order, ack_wait_s=WAIT_S, max_deliver=MAX_DELIVER)
        self.group = Group(self.options)
        self.now = 0.0
        self.log: list[Record] = []
        self.start = 0
        self.prefetch: dict[str, int] = {}
        self.line: list[str] = []
        """Members of an exclusive group: the active one, then those that stand by."""
        self.died: list[tuple[int, int]] = []
        self.grants = 0
        self.committed = 0
        self.journal: list[Kept] = []
        self.base = 0
        """Pieces of the journal that are safe: those that begin it after a restart."""

    # -- The model

    def unsettled(self) -> list[int]:
        return [o for o, record in enumerate(self.log) if not record.settled]

    def lane(self, offset: int) -> list[int]:
        """Those that have to be handled one after the other with that one."""
        key = self.log[offset].key
        if self.order == "any" or (self.order == "key" and key is None):
            return [offset]
        return [
            o
            for o in self.unsettled()
            if self.log[o].told and (self.order == "exclusive" or self.log[o].key == key)
        ]

    def may_have(self, offset: int) -> set[str]:
        """The members that a record could go to now, credit aside."""
        record = self.log[offset]
        if not record.told or record.settled or record.holder or record.due > self.now:
            return set()
        lane = self.lane(offset)
        if any(self.log[o].dead for o in lane):
            return set()
        if not all(self.log[o].holder for o in lane if o < offset):
            return set()
        assert not any(self.log[o].holder for o in lane if o > offset)
        holders = {holder for o in lane if (holder := self.log[o].holder)}
        assert len(holders) <= 1
        everybody = set(self.line[:1]) if self.order == "exclusive" else set(self.prefetch)
        return everybody & holders if holders else everybody

    def held(self, member: str) -> list[int]:
        return [o for o, record in enumerate(self.log) if record.holder == member]

    def recall(self, offset: int) -> None:
        self.log[offset].rest()
        self.log[offset].count -= 1

    def fail(self, offset: int, due: float = 0.0) -> None:
        record = self.log[offset]
        for other in self.lane(offset):
            if other > offset and self.log[other].holder:
                self.recall(other)
        record.rest()
        record.due = due
        if record.count >= MAX_DELIVER:
            self.die(offset)

    def die(self, offset: int) -> None:
        record = self.log[offset]
        record.rest()
        record.dead = True
        self.died.append((offset, record.count))

    # -- The log

    @rule(records=st.lists(st.tuples(KEYS, DELAYS_S), min_size=1, max_size=9))
    def append(self, records: list[tuple[bytes | None, float]]) -> None:
        self.log += [Record(key, self.now + delay if delay else 0.0) for key, delay in records]
        self.tell()

    def tell(self) -> None:
        first = self.group.end
        news = self.log[first:]
        delayed = {first + i: record.due for i, record in enumerate(news) if record.due}
        end = self.group.appended(len(self.log), [record.key for record in news], delayed)
        assert end == self.group.end == max(first, min(len(self.log), self.committed + WINDOW))
        for offset in range(first, end):
            record = self.log[offset]
            record.told = True
            if not record.settled and record.count >= MAX_DELIVER:
                self.die(offset)

    @rule(place=PLACES)
    def trim(self, place: int) -> None:
        start = min(self.committed + place - 2, len(self.log))
        self.start = max(self.start, start)
        self.check_trim(start)

    def check_trim(self, start: int) -> None:
        lost = [o for o in self.unsettled() if o < start]
        for offset in lost:
            self.log[offset].settle()
        gap = Trimmed(lost[0], lost[-1], len(lost)) if lost else None
        assert self.group.trimmed(start) == gap, "retention took something else"

    # -- Members

    @initialize(prefetch=st.integers(2, 9))
    def begin(self, prefetch: int) -> None:
        self.join("a", prefetch)
        self.join("b", prefetch)

    @rule(member=NAMES, prefetch=st.integers(0, 9))
    def come_or_go(self, member: str, prefetch: int) -> None:
        if prefetch:
            self.join(member, prefetch)
        else:
            self.leave(member)

    def join(self, member: str, prefetch: int) -> None:
        has_room = member in self.prefetch or len(self.prefetch) < MEMBERS_MAX
        assert self.group.join(member, prefetch) == has_room
        if has_room:
            self.prefetch[member] = prefetch
            if member not in self.line:
                self.line.append(member)

    def leave(self, member: str) -> None:
        self.group.leave(member)
        for offset in self.held(member):
            if self.log[offset].holder:
                self.fail(offset)
        if self.prefetch.pop(member, None):
            self.line.remove(member)

    @rule(member=NAMES, place=PLACES, count=st.integers(1, 9))
    def shown_to_nobody(self, member: str, place: int, count: int) -> None:
        first = self.committed + place - 1
        unseen = range(first, first + count)
        for offset in self.held(member):
            if offset in unseen and self.log[offset].holder:
                for other in self.lane(offset):
                    if other > offset and self.log[other].holder:
                        self.recall(other)
                self.recall(offset)
        self.group.recall(member, [(first, first + count)])

    # -- Delivery

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, WAIT_S]))
    def deliver(self, seconds: float) -> None:
        self.now += seconds
        self.expire()
        self.take()

    @rule(expires=st.booleans())
    def sleep_until_due(self, expires: bool) -> None:
        self.now = max(self.now, self.group.next_at() or 0.0)
        if expires:
            self.expire()
        self.take()

    def take(self) -> None:
        given = set()
        granted = []
        for grant in self.group.take(self.now):
            given.add(grant.member)
            self.grants += 1
            for offset in range(grant.first, grant.end):
                assert grant.member in self.may_have(offset)
                record = self.log[offset]
                record.holder = grant.member
                record.lease = (self.now + WAIT_S, self.grants)
                record.delivered = True
                record.due = 0.0
                record.count += 1
                assert record.count == grant.deliveries <= MAX_DELIVER
                granted.append(offset)
        for record in self.log:
            if record.due <= self.now:
                record.due = 0.0
        held = {member: len(self.held(member)) for member in self.prefetch}
        assert all(held[member] <= self.prefetch[member] for member in given)
        idle = {member for member in self.prefetch if held[member] < self.prefetch[member]}
        left = [o for o in range(len(self.log)) if self.may_have(o)]
        assert not any(self.may_have(offset) & idle for offset in left)
        if self.order == "any":
            assert all(held[m] <= held[i] + 1 for m in given for i in idle), "hoarded"
            assert not left or not granted or max(granted) < min(left), "overtaken"

    def expire(self) -> None:
        before = self.group.in_flight
        held = [(r.lease, o) for o, r in enumerate(self.log) if r.holder and r.lease[0] <= self.now]
        for _, offset in sorted(held):
            if self.log[offset].holder:
                self.fail(offset)
        if self.order == "exclusive" and held and len(self.line) > 1:
            for offset in self.held(self.line[0]):
                self.recall(offset)
            self.line.append(self.line.pop(0))
        after = sum(record.holder is not None for record in self.log)
        assert self.group.expire(self.now) == before - after

    # -- What members say

    @rule(
        what=st.sampled_from(["ack", "ack", "nak", "extend", "reject"]),
        place=PLACES,
        count=st.integers(1, 5),
        delay_s=DELAYS_S,
        other=st.none() | st.none() | NAMES,
    )
    def say(self, what: str, place: int, count: int, delay_s: float, other: str | None) -> None:
        """Who holds a record says something of it, or somebody of any record."""
        offset, member = self.committed + place - 1, other or "a"
        in_flight = [o for o, record in enumerate(self.log) if record.holder]
        if other is None and in_flight:
            offset = in_flight[place % len(in_flight)]
            member = self.log[offset].holder or ""
        if what == "ack":
            self.ack(member, offset, count)
            return
        may = offset in self.held(member)
        if what == "nak":
            if may:
                self.fail(offset, self.now + delay_s if delay_s else 0.0)
            assert self.group.nak(member, offset, self.now, delay_s) == may
        elif what == "extend":
            if may:
                self.grants += 1
                self.log[offset].lease = (self.now + WAIT_S, self.grants)
            assert self.group.extend(member, offset, self.now) == may
        else:
            if may:
                self.die(offset)
            assert self.group.reject(member, offset, "no") == may

    def ack(self, member: str, first: int, count: int) -> None:
        settled = 0
        for offset in range(max(first, 0), min(first + count, len(self.log))):
            record = self.log[offset]
            if record.delivered and not record.settled:
                record.settle()
                settled += 1
        assert self.group.ack(member, first, first + count) == settled, "settled"

    @rule(place=PLACES)
    def bury(self, place: int) -> None:
        dead = [offset for offset, record in enumerate(self.log) if record.dead]
        offset = dead[place % len(dead)] if dead else place
        if offset in dead:
            self.log[offset].settle()
        self.group.buried(offset)

    # -- The journal

    def state(self) -> tuple[set[int], dict[int, int]]:
        settled = {offset for offset, record in enumerate(self.log) if record.settled}
        counts = {
            offset: record.count
            for offset, record in enumerate(self.log)
            if record.delivered and not record.settled
        }
        return settled, counts

    @rule(all_of_it=st.booleans())
    def write_journal(self, all_of_it: bool) -> None:
        if all_of_it:
            self.compact()
        else:
            self.write()

    def write(self) -> None:
        changes = self.group.changes()
        if changes is not None:
            self.journal.append((changes, *self.state()))

    def compact(self) -> None:
        self.journal = [(self.group.snapshot(), *self.state())]
        self.base = 1

    @rule(random=st.randoms())
    def restart(self, random: Random) -> None:
        self.write()
        self.crash(0, 0, random)

    @rule(keep=st.integers(0, 5), cut=st.integers(0, 3), random=st.randoms())
    def crash(self, keep: int, cut: int, random: Random) -> None:
        """Only part of the journal was written, and the log may have lost its end."""
        kept = self.journal[: max(self.base, len(self.journal) - keep)]
        pieces = [progress for progress, _, _ in kept]
        pieces += random.choices(pieces, k=2) if pieces else []
        random.shuffle(pieces)
        end = max(self.start, len(self.log) - cut)
        del self.log[end:]

        settled: set[int] = set().union(*(settled for _, settled, _ in kept))
        for offset, record in enumerate(self.log):
            counts = [counts[offset] for _, _, counts in kept if offset in counts]
            assert record.settled or offset not in settled, "an ack was invented"
            record.rest()
            record.told = False
            record.settled = offset in settled
            record.delivered = bool(counts)
            record.count = max(counts, default=0)
        self.prefetch.clear()
        self.line.clear()
        self.died.clear()

        self.group = Group.restore(self.options, pieces, end)
        for record in self.log[: self.group.end]:
            record.told = True
        self.check_trim(self.start)
        self.committed = self.group.committed
        self.compact()
        self.tell()

    @rule(seed=st.integers(0, 1 << 32))
    def busy_while(self, seed: int) -> None:
        """Much of everything but crashes, which single steps seldom add up to."""
        random = Random(seed)
        words = ["ack", "ack", "nak", "extend", "reject"]
        names = ["a", "b", "c", "d"]
        for _ in range(30):
            place = random.randint(0, WINDOW + 1)
            delay_s = random.choice([0.0, 0.0, 1.0, 7.0, 25.0])
            other = random.choice([None, None, None, *names])
            match random.randrange(12):
                case 0 | 1:
                    count = random.randint(1, 6)
                    keys = [random.choice([b"x", b"x", b"y", None]) for _ in range(count)]
                    self.append([(key, random.choice([0.0, 0.0, delay_s])) for key in keys])
                case 2 | 3:
                    self.deliver(random.choice([0.0, 1.0, 3.0]))
                case 4:
                    self.sleep_until_due(random.random() < 0.8)
                case 5:
                    self.come_or_go(random.choice(names), random.randint(0, 6))
                case 6:
                    self.bury(place)
                case 7 if random.random() < 0.2:
                    self.trim(place)
                case 7:
                    self.shown_to_nobody(random.choice(names), place, random.randint(1, 5))
                case 8 if random.random() < 0.5:
                    self.write_journal(all_of_it=random.random() < 0.3)
                case _:
                    word = random.choice(words)
                    self.say(word, place, random.randint(1, 5), delay_s, other)
            self.all_is_well()

    # -- What holds always

    @invariant()
    def all_is_well(self) -> None:
        self.records_are_as_the_model_says()
        self.committed_never_goes_back()
        self.it_knows_when_something_is_due()
        self.tables_are_bounded()

    def records_are_as_the_model_says(self) -> None:
        settled, counts = self.state()
        progress = self.group.snapshot()
        found = {o for first, end in progress.settled for o in range(first, end)}
        assert found == settled, "settled"
        assert {o: n for first, end, n in progress.deliveries for o in range(first, end)} == {
            o: n for o, n in counts.items() if not self.log[o].settled
        }, "deliveries"
        assert self.group.in_flight == sum(record.holder is not None for record in self.log)
        assert self.group.active == (
            self.line[0] if self.order == "exclusive" and self.line else None
        )
        died = [(dead.offset, dead.deliveries) for dead in newly_dead(self.group)]
        assert sorted(died) == sorted(self.died)
        self.died.clear()

    def committed_never_goes_back(self) -> None:
        assert self.group.committed == min(self.unsettled(), default=len(self.log))
        assert self.group.committed >= self.committed
        self.committed = self.group.committed

    def it_knows_when_something_is_due(self) -> None:
        times = [record.lease[0] for record in self.log if record.holder]
        times += [record.due for record in self.log if record.told and record.due]
        assert self.group.next_at() == min(times, default=None)

    def tables_are_bounded(self) -> None:
        group: Any = self.group
        leases, waiting, tally = group._leases, group._waiting, group._tally
        assert group.end <= group.committed + WINDOW
        assert len(leases.members) <= MEMBERS_MAX
        for table in (
            leases.in_flight,
            leases._leases,
            waiting._lane_of,
            waiting._lanes,
            waiting._held,
            waiting._delayed._at,
            tally.deliveries,
            group._dead,
            group._newly_dead,
            group._spent,
            list(waiting.ready),
            list(tally.settled),
        ):
            assert len(table) <= WINDOW
        assert waiting._lanes.keys() == {lane.key for lane in waiting._lane_of.values()} - {b""}
        assert not leases.members or all(m.held >= 0 for m in leases.members.values())


class AnyOrder(Machine):
    order = "any"


class KeyOrder(Machine):
    order = "key"


class ExclusiveOrder(Machine):
    order = "exclusive"


@pytest.mark.slow
@pytest.mark.parametrize("machine", [AnyOrder, KeyOrder, ExclusiveOrder])
def test_a_group_does_what_its_model_does(
    machine: type[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "GROUP_WINDOW", WINDOW)
    monkeypatch.setattr(limits, "GROUP_MEMBERS_MAX", MEMBERS_MAX)
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=30))
