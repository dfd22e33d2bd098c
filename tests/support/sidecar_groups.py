"""What the groups of a stream were told and what they have to remember of it: the model of the
groups and dead letters of `tests.support.sidecar_machine`.

Promises that it fails at the first look at which something is settled that nobody settled; after an
end, if something is not that was written, or synced where only that counts; and at a dead letter
that is there twice, or without a reason.

Must not know who asks, nor how the sidecar ended: it is told what may be lost by it.
"""

from __future__ import annotations

from typing import get_args

import msgspec

from mesh.durable.groups import Groups
from mesh.durable.log import Log
from mesh.durable.records import headers_of
from mesh.durable.waiting import Order
from mesh.message import StreamStats
from tests.support.sidecar_records import Records, records_in

MAX_DELIVER = 3
ORDERS: tuple[Order, ...] = get_args(Order)
"""There is a group of each, named after it."""


class Member(msgspec.Struct, eq=False):
    log_epoch: int
    number: int = 0
    """Of its last question."""
    holding: list[int] = []


class Followed(msgspec.Struct, eq=False):
    """A group, and what it was told."""

    begun_at: int
    said: set[int] = msgspec.field(default_factory=set)
    """To be done, by somebody, ever; and what is among the dead letters."""
    settled: set[int] = msgspec.field(default_factory=set)
    """By now, for sure."""
    written: set[int] = msgspec.field(default_factory=set)
    synced: set[int] = msgspec.field(default_factory=set)
    rejected: set[int] = msgspec.field(default_factory=set)
    members: dict[str, Member] = {}
    committed: int = 0
    committed_synced: int = 0
    failures: int = 0
    failed: bool = False
    """The journal, and it may not be whole since."""

    def confirmed(self, offsets: set[int]) -> None:
        """To be settled."""
        self.settled.update(offsets)
        if not self.failed:
            self.written = set(self.settled)

    def journal_failed(self) -> None:
        """A sync that failed takes with it what was written."""
        self.failed, self.written = True, set(self.synced)

    def lost(self, kept: int) -> None:
        """Records from there on are others, or will be."""
        for offsets in (self.said, self.settled, self.written, self.synced, self.rejected):
            offsets.difference_update([each for each in offsets if each >= kept])
        self.begun_at = min(self.begun_at, kept)
        self.committed = min(self.committed, kept)
        self.committed_synced = min(self.committed_synced, kept)


class FollowedGroups:
    """See above."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.by_name: dict[Order, Followed] = {}
        self.letters: dict[int, int] = {}
        """By their offset among the dead letters: the number of the record."""
        self.buried: set[tuple[str, int]] = set()

    @property
    def all(self) -> list[Followed]:
        return list(self.by_name.values())

    def done_by(self, group: Followed) -> set[int]:
        """All that may be settled there."""
        return group.said | set(range(max(group.begun_at, self.records.gone)))

    @property
    def acked(self) -> int | None:
        """All have done with what is before that; None if there are none."""
        if not self.by_name:
            return None
        done = [self.done_by(each) for each in self.all]
        return next(o for o in range(self.records.end + 1) if any(o not in each for each in done))

    # -- What happens ------------------------------------------------------------------------

    @property
    def committed(self) -> dict[Order, int]:
        return {name: group.committed for name, group in self.by_name.items()}

    def synced(self, committed: dict[Order, int], *, faulty: bool) -> None:
        """A second is over: what groups knew before it, when that was `committed`, is on disk."""
        for name, group in self.by_name.items():
            group.failed = group.failed and faulty
            if not group.failed:
                group.written, group.synced = set(group.settled), set(group.settled)
                group.committed_synced = committed.get(name, group.begun_at)

    def journals_failed(self) -> None:
        """Perhaps, as the process ended."""
        for group in self.all:
            group.journal_failed()

    def lost(self, kept: int) -> None:
        """Records from there on."""
        for group in self.all:
            group.lost(kept)

    # -- What there is -----------------------------------------------------------------------

    def look(self, log: Log, groups: Groups) -> None:
        """What was committed is, and somebody settled all of that."""
        stats = groups.stats()
        for name in [each for each in ORDERS if each in stats]:
            group, found = self.by_name.get(name), stats[name]
            if group is None:
                begun_at = groups._groups[name].start
                group = self.by_name[name] = Followed(begun_at, committed=begun_at)
            failures = found.counters.get("journal failed", 0)
            if failures > group.failures:
                group.failures = failures
                group.journal_failed()
            if log.keeps_all or groups.log_epoch == log.log_epoch:
                assert found.committed >= group.committed, "committed went back"
                group.committed = found.committed
                assert set(range(group.committed)) <= self.done_by(group), "nobody settled it"

    def look_at_letters(self, log: Log) -> None:
        for at, header, payload, columns in records_in(log):
            if at in self.letters:
                continue
            assert columns.headers is not None
            assert columns.derived is not None
            headers = headers_of(columns.headers[0])
            name, offset, number = headers["mesh-group"], headers["mesh-offset"], payload[0]
            group = self.by_name[name]
            assert (name, number) not in self.buried, "twice"
            assert header.count == 1
            assert columns.derived.offset == offset
            self.letters[at] = number
            self.buried.add((name, number))
            if self.records.shown.get(offset) == number:
                dead = headers["mesh-deliveries"] >= MAX_DELIVER
                assert dead or offset in group.rejected, "nobody rejected it"
                group.said.add(offset)

    def look_again(self, groups: Groups, stats: StreamStats, *, power: bool) -> None:
        """After an end, before anybody has asked: what is remembered is no less than was promised.
        `power`: only what was synced counts."""
        for name, group in self.by_name.items():
            assert name in stats.groups, "forgotten"
            found = stats.groups[name]
            synced_only = power or group.failed
            if synced_only:  # who got what is lost, and it is delivered again
                group.members.clear()
            settled = self.settled_in(groups, name)
            assert (group.synced if synced_only else group.written) <= settled, "forgotten"
            assert settled <= self.done_by(group), "invented"
            committed = group.committed_synced if synced_only else group.committed
            assert found.committed >= committed, "forgotten"
            group.settled, group.written, group.synced = set(settled), set(settled), set(settled)
            group.committed = group.committed_synced = found.committed
            group.failures, group.failed = found.counters.get("journal failed", 0), False

    def settled_in(self, groups: Groups, name: str) -> set[int]:
        assert not groups._unread, "a journal is damaged"
        settled = groups._groups[name].group._tally.settled
        return {offset for offset in range(self.records.end) if offset in settled}
