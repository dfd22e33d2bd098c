"""Who of a group holds which records, and until when. No I/O: `now` is given.

A *lease* is one grant: consecutive records that one member holds, to be settled within the group's
`ack_wait_s`. As that is the same for all, and `now` never goes back, leases end in the order in
which they were made. A renewed record gets a lease of its own; a lease is forgotten with its last
record.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Container

import msgspec

from mesh import limits
from mesh.durable.intervals import Intervals


class Member(msgspec.Struct, eq=False):
    """A consumer of the group."""

    name: str
    prefetch: int
    """How many records it may hold."""
    held: int = 0
    reserved: Intervals = msgspec.field(default_factory=Intervals)
    """What waits for it alone, as it has the order of it: see `mesh.durable.waiting`."""

    @property
    def room(self) -> int:
        return max(0, self.prefetch - self.held)


class Lease(msgspec.Struct, eq=False):
    """Records from `first` to before `end` that a member was given at one time."""

    member: Member
    first: int
    end: int
    until: float
    held: int
    """How many of them it still holds."""


class Leases:
    """All members of a group, and what they hold."""

    def __init__(self, ack_wait_s: float) -> None:
        self.members: OrderedDict[str, Member] = OrderedDict()
        """By name; who was given something last comes last."""
        self.in_flight: dict[int, Lease] = {}
        """The lease of each record that a member holds, by offset."""
        self._ack_wait_s = ack_wait_s
        self._leases: OrderedDict[int, Lease] = OrderedDict()
        """By identity, in the order in which they end."""

    def join(self, name: str, prefetch: int) -> Member | None:
        """A member comes, or one that is here changes its prefetch. None if there are too many."""
        prefetch = min(max(1, prefetch), limits.PREFETCH_MAX)
        member = self.members.get(name)
        if member is not None:
            member.prefetch = prefetch
        elif len(self.members) < limits.GROUP_MEMBERS_MAX:
            member = self.members[name] = Member(name, prefetch)
        return member

    def shares(
        self, ready: Intervals, asking: Container[str] | None = None
    ) -> list[tuple[Member, int]]:
        """Those of `asking` with room, and how many of the records in `ready` each gets: as if one
        after the other went to the member that holds the fewest; of equals to the one longest
        without."""

        def dealt_up_to(level: int) -> int:
            return sum(max(0, min(level, m.prefetch) - m.held) for m in members)

        members = [member for member in self.members.values() if member.room]
        if asking is not None:
            members = [member for member in members if member.name in asking]
        if not members:
            return []
        count = ready.count(sum(member.room for member in members))
        lowest = min(member.held for member in members)
        level = lowest - 1 + bisect_right(range(lowest, lowest + count + 1), count, key=dealt_up_to)
        left = count - dealt_up_to(level)
        shares = []
        for member in members:
            share = max(0, min(level, member.prefetch) - member.held)
            if left and member.held <= level < member.prefetch:
                share, left = share + 1, left - 1
            shares.append((member, share))
        return shares

    def grant(self, member: Member, first: int, end: int, now: float) -> None:
        """`member` has those records from now on."""
        lease = Lease(member, first, end, now + self._ack_wait_s, end - first)
        self._leases[id(lease)] = lease
        self.in_flight.update(dict.fromkeys(range(first, end), lease))
        member.held += end - first
        self.members.move_to_end(member.name)

    def release(self, offset: int) -> Member | None:
        """Nobody holds that record any more: who did, if anybody."""
        lease = self.in_flight.pop(offset, None)
        if lease is None:
            return None
        lease.held -= 1
        if not lease.held:
            del self._leases[id(lease)]
        member = lease.member
        member.held -= 1
        return member

    def renew(self, offset: int, now: float) -> None:
        """The lease of that record, which is in flight, begins again."""
        member = self.release(offset)
        assert member is not None
        self.grant(member, offset, offset + 1, now)

    def of(self, member: Member) -> list[int]:
        """The records that `member` holds, in order of their offsets."""
        leases = [lease for lease in self._leases.values() if lease.member is member]
        return sorted(offset for lease in leases for offset in self._offsets(lease))

    def over(self, now: float) -> list[int]:
        """The records of the lease that ended first, if it has ended by `now`: they are to be
        released before the next call."""
        until = self.next()
        if until is None or until > now:
            return []
        return self._offsets(next(iter(self._leases.values())))

    def next(self) -> float | None:
        """When the next lease ends, or None."""
        for lease in self._leases.values():
            return lease.until
        return None

    def _offsets(self, lease: Lease) -> list[int]:
        held = self.in_flight
        return [o for o in range(lease.first, lease.end) if held.get(o) is lease]
