"""A group: consumers that share the records of one partition. No I/O: `now` is given.

Promises, at least once: a record is settled when a member acknowledged it, when it was appended to
the dead letters, or when retention removed it, and not before; until then it is delivered again
whenever its lease ends, its member goes, or it is handed back. While its lease lasts, a record is
with one member only, and nobody is given more than its prefetch allows. `committed`, below which
all is settled, never goes back.

Orders: ``any`` has none. ``key``: the records of one key are handled one after the other, so all of
them that are in flight are with one member, delivered in order, and where one comes back those
behind it do, too. ``exclusive``: likewise for all records, and one member has them all until it
leaves, or lets a lease end while another stands by. What is delayed or waits to be buried holds up
what is behind it in its order.

It does not know the log, its files, or how members are reached. The parts: `mesh.durable.waiting`
(what may go to whom), `mesh.durable.leases` (who has what), `mesh.durable.progress` (what a crash
must not lose).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import get_args

import msgspec

from mesh import limits
from mesh.durable.intervals import Intervals, Range
from mesh.durable.leases import Leases, Member
from mesh.durable.progress import Progress, Tally
from mesh.durable.waiting import Order, Waiting
from mesh.errors import InvalidOption
from mesh.options import check_count, is_number


class GroupOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a group's records are delivered."""

    order: Order = "any"
    """``any``: to whoever has room. ``key``: of each key one after the other. ``exclusive``: all to
    one member, in order of their offsets."""

    ack_wait_s: float = 30.0
    """How long a member has to settle a record before it is delivered again: 0.05 to 86,400 s.
    JetStream's default."""

    max_deliver: int = 20
    """Deliveries of a record, 1 to 1,000,000, before it becomes a dead letter. RabbitMQ's limit for
    quorum queues."""

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise InvalidOption(f"order must be 'any', 'key' or 'exclusive', not {self.order!r}")
        wait_s = self.ack_wait_s
        if not is_number(wait_s) or not 0.05 <= wait_s <= 86_400:
            raise InvalidOption(f"ack_wait must be 0.05 to 86,400 s, not {wait_s!r}")
        check_count(self.max_deliver, "max_deliver", 1, 1_000_000)


class Grant(msgspec.Struct, frozen=True, gc=False):
    """Records from `first` to before `end` go to a member."""

    member: str
    first: int
    end: int
    deliveries: int
    """How often each of them was delivered, this time included."""


class DeadRecord(msgspec.Struct, frozen=True, gc=False):
    """A record that goes to nobody any more, and of which a dead letter is to be made."""

    offset: int
    deliveries: int
    reason: str


class Trimmed(msgspec.Struct, frozen=True, gc=False):
    """Retention removed `count` records that were not settled, the first and the last of them."""

    first: int
    last: int
    count: int


class Group:
    """One group. The sidecar calls it from one thread, with a `now` that never goes back.

    A new one begins at the offset `start`; one that was there before is restored.
    """

    def __init__(self, options: GroupOptions, start: int = 0) -> None:
        self.options = options
        self.end = start
        """The first offset that the group has not been told of."""
        self.counters: Counter[str] = Counter()
        """What was refused, late, redelivered or dead, by what it was."""
        self._leases = Leases(options.ack_wait_s)
        self._waiting = Waiting(options.order)
        self._tally = Tally()
        self._tally.settle(0, start)
        self._dead: dict[int, DeadRecord] = {}
        """Those that are not buried yet."""
        self._newly_dead: OrderedDict[int, DeadRecord] = OrderedDict()
        self._spent: set[int] = set()
        """After a restore: what is dead as soon as the group is told of it."""
        self._active: Member | None = None

    # What can be asked

    @property
    def committed(self) -> int:
        """All records below that are settled."""
        return self._tally.committed

    @property
    def horizon(self) -> int:
        """How far the group looks; it moves with `committed`. What is beyond waits in the log."""
        return self._tally.horizon

    @property
    def active(self) -> str | None:
        """The member that has everything, if the order is exclusive."""
        return None if self._active is None else self._active.name

    @property
    def in_flight(self) -> int:
        """How many records members hold."""
        return len(self._leases.in_flight)

    def room(self, asking: Container[str]) -> int:
        """How many more records could be given to those members now."""
        members = list(self._leases.members.values())
        if self.options.order == "exclusive":
            members = [] if self._active is None else [self._active]
        return sum(member.room for member in members if member.name in asking)

    def next_at(self) -> float | None:
        """When to `expire` and `take`, if nothing else happens before; None: never."""
        times = [at for at in (self._leases.next(), self._waiting.next()) if at is not None]
        return min(times, default=None)

    # The log

    def appended(
        self,
        end: int,
        keys: Sequence[bytes | None] = (),
        delayed: Mapping[int, float] | None = None,
    ) -> int:
        """The log has records from `self.end` to before `end`.

        `keys` has one for each of them, if the order is one of keys. `delayed` has the moments
        before which some of them are not to be delivered. Returns the new `self.end`: of what is
        beyond the horizon the group is to be told again.
        """
        first, end = self.end, min(end, self.horizon)
        if end <= first:
            return first
        settled = self._tally.settled
        for low, high in settled.missing_in(first, end):
            self._waiting.add(low, high, keys[low - first : high - first])
        for offset, at in (delayed or {}).items():
            if first <= offset < end and offset not in settled:
                self._waiting.delay(offset, at)
        for offset in sorted(offset for offset in self._spent if offset < end):
            self._spent.remove(offset)
            self._waiting.hold(offset)
            self._die(offset)
        self.end = end
        return end

    def trimmed(self, start: int) -> Trimmed | None:
        """Records below `start` are gone from the log. What of them was lost without having been
        settled, if anything."""
        lost = self._pass_over(start)
        if not lost:
            return None
        count = sum(end - first for first, end in lost)
        self.counters["trimmed"] += count
        return Trimmed(lost[0][0], lost[-1][1] - 1, count)

    def resume(self, offset: int) -> None:
        """All records below `offset`, which the log has or had, are done with, whoever has them:
        their effects say so."""
        self._pass_over(offset)

    # Members

    def join(self, member: str, prefetch: int) -> bool:
        """A member comes that may hold `prefetch` records, or one that is here says so anew. False
        if there are too many members."""
        joined = self._leases.join(member, prefetch)
        if joined is None:
            self.counters["too many members"] += 1
            return False
        if self._active is None:
            self._activate(joined)
        return True

    def recall(self, member: str, ranges: Iterable[Range]) -> None:
        """Of the records in these ranges, those that `member` holds were shown to nobody: they can
        be delivered again at once, and count as never delivered."""
        holder, unseen = self._leases.members.get(member), Intervals(ranges)
        for offset in [] if holder is None else self._leases.of(holder):
            if offset in unseen and offset in self._leases.in_flight:
                self._recall((offset, *self._waiting.back(offset)))

    def leave(self, member: str) -> None:
        """A member left or died: what it holds can be delivered again at once."""
        gone = self._leases.members.get(member)
        if gone is None:
            return
        for offset in self._leases.of(gone):
            if offset in self._leases.in_flight:
                self._failed(offset)
        del self._leases.members[member]
        if gone is self._active:
            self._activate(next(iter(self._leases.members.values()), None))

    # Delivery

    def take(self, now: float, asking: Container[str] | None = None) -> list[Grant]:
        """What is to be delivered now to those of the members, or to all. With this call it is
        delivered, and its leases begin."""
        self._waiting.due(now)
        grants: list[Grant] = []
        before = -1
        while before < len(grants):
            before = len(grants)
            for member, share in self._leases.shares(self._waiting.ready, asking):
                for run in self._waiting.take(member, share):
                    for first, end, deliveries in self._tally.deliver(*run):
                        self._leases.grant(member, first, end, now)
                        grants.append(Grant(member.name, first, end, deliveries))
                        if deliveries > 1:
                            self.counters["redelivered"] += end - first
        return grants

    def put_back(self, first: int, end: int) -> None:
        """What `take` has just granted did not leave: it counts as never delivered."""
        for offset in range(first, end):
            if offset in self._leases.in_flight:
                self._recall((offset, *self._waiting.back(offset)))

    def expire(self, now: float) -> int:
        """Take back what was not settled in time. Returns how many records came back."""
        before = self.in_flight
        late = None
        while offsets := self._leases.over(now):
            for offset in offsets:
                if offset in self._leases.in_flight:
                    late = self._failed(offset)
                    self.counters["expired"] += 1
        if late is not None and late is self._active:
            self._take_over(late)
        return before - self.in_flight

    # What members say

    def ack(self, member: str, first: int, end: int) -> int:
        """`member` is done with the records from `first` to before `end`. Returns how many that
        settles.

        They were handled, so it need not hold them any more, nor be a member any more. What was
        settled before, or never delivered to anybody, is counted, and nothing else comes of it.
        """
        first, end = max(first, 0), min(end, self.horizon)
        tally, repeated, settled = self._tally, max(0, end - first), 0
        for low, high in tally.settled.missing_in(first, end):
            repeated -= high - low
            delivered = tally.delivered_in(low, high)
            settled += len(delivered)
            for offset in delivered:
                holder = self._remove(offset)
                if holder is None or holder.name != member:
                    self.counters["late ack"] += 1
            if undelivered := high - low - len(delivered):
                self.counters["undelivered ack"] += undelivered
                for run in Intervals((offset, offset + 1) for offset in delivered):
                    tally.settle(*run)
            else:
                tally.settle(low, high)
        if repeated:
            self.counters["repeated ack"] += repeated
        return settled

    def nak(self, member: str, offset: int, now: float, delay_s: float = 0.0) -> bool:
        """`member` hands a record back, to be delivered again, but not within `delay_s`. False if
        it does not hold it."""
        if not self._holds(member, offset, "late nak"):
            return False
        self._failed(offset, now + min(delay_s, limits.NAK_DELAY_S_MAX) if delay_s > 0 else None)
        return True

    def extend(self, member: str, offset: int, now: float) -> bool:
        """`member` needs `ack_wait_s` from now for that record. False if it does not hold it."""
        if not self._holds(member, offset, "late extend"):
            return False
        self._leases.renew(offset, now)
        return True

    def reject(self, member: str, offset: int, reason: str) -> bool:
        """`member` says that a record can never be handled, which makes it a dead letter. False if
        it does not hold it."""
        if not self._holds(member, offset, "late reject"):
            return False
        self._leases.release(offset)
        self._waiting.hold(offset)
        self._die(offset, reason[: limits.REASON_CHARACTERS_MAX])
        return True

    # Dead records

    def next_dead(self) -> DeadRecord | None:
        """One that died, and was not told of yet: to be `buried`, as a dead letter, or `keep_dead`
        until it can be."""
        return self._newly_dead.popitem(last=False)[1] if self._newly_dead else None

    @property
    def has_newly_dead(self) -> bool:
        return bool(self._newly_dead)

    def keep_dead(self, dead: DeadRecord) -> None:
        """That one has to wait: it is told of again, after the others, if it is dead then."""
        if dead.offset in self._dead:
            self._newly_dead[dead.offset] = dead

    def buried(self, offset: int) -> None:
        """Its dead letter is safe, which settles the record."""
        if offset in self._dead:
            self._remove(offset)
            self._tally.settle(offset, offset + 1)

    # The journal

    def changes(self) -> Progress | None:
        """What is new since the last call, for the journal; None if nothing is."""
        return self._tally.changes()

    @property
    def overstated(self) -> bool:
        """Whether a journal says that some were delivered more often than they were: a new one
        does not."""
        return self._tally.overstated

    def snapshot(self) -> Progress:
        """All that is to be remembered, for a new journal."""
        return self._tally.snapshot()

    @classmethod
    def restore(cls, options: GroupOptions, journal: Iterable[Progress], end: int) -> Group:
        """The group that wrote `journal`, with nobody in it and nothing in flight. It is to be told
        of the log from its `end` on, which is where it is committed.

        `end` here is that of the log of which the journal speaks, as far as it is there still: what
        the journal says of records behind it is forgotten. A crash may have taken them, and others
        get their offsets.
        """
        group = cls(options)
        group._tally = tally = Tally.restore(journal, end)
        group.end = tally.committed
        group._spent = {o for o, n in tally.deliveries.items() if n >= options.max_deliver}
        return group

    # What they mean

    def _pass_over(self, offset: int) -> list[Range]:
        """Settle all below `offset`, told of or not. Returns what was not settled."""
        tally = self._tally
        missing = tally.settled.missing_in(tally.committed, offset)
        for each in [each for each in tally.deliveries if each < offset]:
            self._remove(each)
        for first, end in missing:
            for each in range(first, min(end, self.end)):
                self._waiting.withdraw(each)
            tally.settle(first, end)
        self.end = max(self.end, offset)
        return missing

    def _holds(self, member: str, offset: int, otherwise: str) -> bool:
        lease = self._leases.in_flight.get(offset)
        if lease is not None and lease.member.name == member:
            return True
        self.counters[otherwise] += 1
        return False

    def _failed(self, offset: int, at: float | None = None) -> Member | None:
        """A delivery came to nothing: once more, not before `at`, unless it was the last. Returns
        whose it was."""
        member = self._leases.release(offset)
        self._recall(self._waiting.back(offset, at))
        if self._tally.deliveries[offset] >= self.options.max_deliver:
            self._waiting.hold(offset)
            self._die(offset)
        return member

    def _recall(self, offsets: Iterable[int]) -> None:
        """Those came back only because of one before them, which does not count as delivered."""
        for offset in offsets:
            self._leases.release(offset)
            self._tally.take_off(offset)
            self.counters["recalled"] += 1

    def _die(self, offset: int, reason: str = "") -> None:
        deliveries = self._tally.deliveries[offset]
        reason = reason or f"delivered {deliveries:,} times, which is the limit (max_deliver)"
        self._dead[offset] = self._newly_dead[offset] = DeadRecord(offset, deliveries, reason)
        self.counters["dead"] += 1

    def _remove(self, offset: int) -> Member | None:
        """A record that was delivered is done with, wherever it is now. Returns who held it."""
        del self._tally.deliveries[offset]
        holder = self._leases.release(offset)
        if holder is not None:
            self._waiting.arrived(offset)
        else:
            self._waiting.withdraw(offset)
            self._dead.pop(offset, None)
            self._newly_dead.pop(offset, None)
            self._spent.discard(offset)
        return holder

    def _activate(self, member: Member | None) -> None:
        if self.options.order == "exclusive":
            self._active = member
            self._waiting.hand_over(member)

    def _take_over(self, late: Member) -> None:
        """The turn of the next member, if there is one: all that the active one has comes back."""
        successor = next((m for m in self._leases.members.values() if m is not late), None)
        if successor is None:
            return
        self._leases.members.move_to_end(late.name)
        held = self._leases.of(late)
        if held:
            self._recall((held[0], *self._waiting.back(held[0])))
        self._activate(successor)
