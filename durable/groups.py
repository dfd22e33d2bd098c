"""The groups of one partition: what joins their logic (`mesh.durable.group`) with the log that they
read and the files that remember them. For one thread, the clerk's; `now` is given.

    groups/NAME   the journal of a group (`mesh.durable.journal`)

A group is told of records only as its members have room for them, so that what waits, waits in the
log. What is granted goes out as batches, as they stand in the log, with the ranges that are meant.
A group that cannot be read on is *stopped*: it says why to each of its members, and the others go
on.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, deque
from typing import Final
from urllib.parse import quote, unquote

import msgspec

from mesh import limits
from mesh.durable.batch import encode
from mesh.durable.cursor import Cursor, Gap
from mesh.durable.deliveries import AskedOptions, Delivery, Settlements
from mesh.durable.group import DeadLetter, Grant, Group, GroupOptions
from mesh.durable.journal import Beginning, Journal
from mesh.durable.kept import Kept
from mesh.durable.log import Log
from mesh.durable.records import columns_of
from mesh.durable.scan import Found
from mesh.durable.storage import Storage
from mesh.errors import LogDamaged, OptionsDiffer
from mesh.sockets.frame import Malformed

logger = logging.getLogger(__name__)

_TELL_BYTES: Final = 1 << 20
"""Read of the log at one time."""
_KEPT_BYTES: Final = 4 << 20
"""Of batches kept for a group, from telling it of them to delivering them."""
_AGAIN_BYTES: Final = 256 << 10
"""Read at one time of what was kept and had to go."""
_DELIVERY_BYTES: Final = 2 << 20
"""In one delivery, or one batch, if that is larger."""


class Letter(msgspec.Struct, frozen=True):
    """A record that is to be appended to the dead letters."""

    group: str
    dead: DeadLetter
    found: Found


class GroupStats(msgspec.Struct, frozen=True):
    """What a group has come to."""

    committed: int
    """All records below that are settled."""
    lag: int
    """Records from there to the end of the log."""
    in_flight: int
    members: int
    counters: dict[str, int]


class _Held:
    """A group, and what it needs of the log."""

    def __init__(self, name: str, group: Group, start: int, journal: Journal, log: Log) -> None:
        self.name = name
        self.group = group
        self.start = start
        self.journal = journal
        self.cursor = Cursor(log, group.end)
        self.kept = Kept(_KEPT_BYTES)
        self.granted: dict[str, deque[Grant]] = {}
        """What each member has been granted, and was not sent yet."""
        self.gaps: dict[str, list[tuple[int, int, int]]] = {}
        """What retention took from the group, for each member to be told of."""
        self.record_bytes = 1.0
        """Of a record, as told of lately."""
        self.prefetch: dict[str, int] = {}
        """What each member asked for."""
        self.stopped: str = ""
        """Why nothing more can be delivered."""

    @property
    def beginning(self) -> Beginning:
        return Beginning(self.name, self.group.options, self.start)


class Groups:
    """See above."""

    def __init__(self, storage: Storage, log: Log) -> None:
        """Open those that are in that folder. Raises `OSError`."""
        self._storage = storage
        self._log = log
        self._groups: dict[str, _Held] = {}
        self._damaged: dict[str, LogDamaged] = {}
        for file_name in storage.names():
            name = unquote(file_name)
            journal = Journal(storage, file_name, log.partition)
            try:
                beginning, progress = journal.read()
            except LogDamaged as error:
                logger.error("group %r: %s", name, error)
                self._damaged[name] = error
                continue
            group = Group.restore(beginning.options, progress, log.end)
            held = _Held(name, group, beginning.start, journal, log)
            try:
                journal.begin(held.beginning, group.snapshot())
            except OSError:
                if any(end > log.end for each in progress for _, end in each.settled):
                    raise  # or what gets those offsets would seem to be settled
                logger.exception("group %r: its journal cannot be written", name)
            self._groups[name] = held
        self._log_epoch = log.log_epoch

    def __contains__(self, name: str) -> bool:
        return name in self._groups

    def __bool__(self) -> bool:
        return bool(self._groups)

    def rewind(self) -> bool:
        """The log may have lost what it had not promised to keep, and other records may have those
        offsets now: begin again with all groups. Whether it has; then nobody is a member any more.
        Raises `OSError`."""
        if self._log.keeps_all or self._log_epoch == self._log.log_epoch:
            return False
        for name, held in list(self._groups.items()):
            group = Group.restore(held.group.options, [held.group.snapshot()], self._log.end)
            group.counters.update(held.group.counters)
            held.cursor.close()
            held.journal.close()
            again = _Held(name, group, held.start, held.journal, self._log)
            again.journal.begin(again.beginning, group.snapshot())
            self._groups[name] = again
        self._log_epoch = self._log.log_epoch
        return True

    # -- Groups and members ------------------------------------------------------------------

    def open(self, name: str, options: AskedOptions, start: int) -> None:
        """Make the group, if there is none: it begins at the offset `start`, which is there or was.
        Raises `OptionsDiffer` if there is one with others, `LogDamaged`, `OSError`."""
        if name in self._damaged:
            raise self._damaged[name]
        held = self._groups.get(name)
        if held is not None:
            if differs := options.differ_from(held.group.options):
                raise OptionsDiffer(f"group {name!r} was created with {differs}")
            return
        if len(self._groups) >= limits.GROUPS_MAX:
            raise OSError(f"there are {limits.GROUPS_MAX} groups already")
        group = Group(options.all(), start)
        journal = Journal(self._storage, file_name_of(name), self._log.partition)
        held = _Held(name, group, start, journal, self._log)
        journal.begin(held.beginning, group.snapshot())
        self._groups[name] = held

    def committed(self, name: str) -> int:
        """All records of that group below that are settled."""
        return self._groups[name].group.committed

    def options(self, name: str) -> GroupOptions:
        return self._groups[name].group.options

    def join(self, name: str, member: str, prefetch: int) -> bool:
        """A member comes, or changes how many records it may hold. False if there are too many."""
        held = self._groups[name]
        if not held.group.join(member, self._bounded(held, prefetch)):
            return False
        held.prefetch[member] = prefetch
        return True

    def has(self, name: str, member: str) -> bool:
        held = self._groups.get(name)
        return held is not None and member in held.prefetch

    def leave(self, name: str, member: str) -> None:
        """What it holds goes to others."""
        held = self._groups.get(name)
        if held is not None and held.prefetch.pop(member, None) is not None:
            held.group.leave(member)
            held.granted.pop(member, None)
            held.gaps.pop(member, None)

    def remove(self, name: str) -> None:
        """The group is gone, with all that it knew. Raises `OSError`."""
        held = self._groups.pop(name, None)
        if held is not None:
            held.cursor.close()
            held.journal.remove()

    def settle(self, name: str, member: str, said: Settlements, now: float) -> None:
        """Whether or not it is a member still: what was done, is done."""
        held = self._groups[name]
        group = held.group
        if said.resume:
            self._resume(held, said.resume, now)
        for first, end in said.acks:
            group.ack(member, first, end)
        for offset, reason in said.rejects:
            group.reject(member, offset, reason)
        for offset, delay_s in said.naks:
            group.nak(member, offset, now, delay_s)
        for offset in said.extends:
            group.extend(member, offset, now)

    def _resume(self, held: _Held, offset: int, now: float) -> None:
        """A group is told of what it passes over, a window at a time."""
        group = held.group
        offset = min(offset, self._log.tip.offset)
        while group.committed < offset:
            before = group.committed
            group.appended(min(offset, group.horizon), [None] * (offset - group.end))
            group.resume(offset)
            if group.committed == before:
                break

    # -- Delivery ----------------------------------------------------------------------------

    def next_at(self) -> float | None:
        """When something is due, if nothing happens before."""
        times = [at for held in self._groups.values() if (at := held.group.next_at()) is not None]
        return min(times, default=None)

    def grant(self, name: str, now: float, now_ns: int) -> list[str]:
        """Share out what there is among the members of that group: which of them have something to
        `fetch` now."""
        held = self._groups[name]
        group = held.group
        group.expire(now)
        while held.prefetch and not held.stopped:
            for grant in group.take(now):
                held.granted.setdefault(grant.member, deque()).append(grant)
            if not group.room or not self._tell(held, now, now_ns):
                break
        if held.stopped:
            return list(held.prefetch)
        return [each for each in held.prefetch if held.granted.get(each) or held.gaps.get(each)]

    def fetch(self, name: str, member: str) -> Delivery:
        """What that member was granted, as much as is sent at one time. Raises `LogDamaged`."""
        held = self._groups[name]
        waiting = held.granted.get(member)
        if not waiting:
            if held.stopped:
                raise LogDamaged(f"group {name!r}", 0, held.group.end, held.stopped)
            return Delivery((), ())
        grants: list[tuple[int, int, int]] = []
        batches: dict[int, bytes] = {}
        size = 0
        while waiting and size < _DELIVERY_BYTES:
            grant = waiting.popleft()
            first = grant.first
            while first < grant.end and size < _DELIVERY_BYTES:
                found = self._batch(held, first)
                if found is None:  # retention was quicker, and tells of it
                    first += 1
                    continue
                header = found.header
                if header.offset not in batches:
                    batches[header.offset] = encode(header, self._log.partition) + found.body
                    size += header.size
                end = min(grant.end, header.end)
                grants.append((first, end, grant.deliveries))
                first = end
            if first < grant.end:
                waiting.appendleft(Grant(member, first, grant.end, grant.deliveries))
        return Delivery(tuple(grants), tuple(batches.values()))

    def gaps(self, name: str, member: str) -> list[tuple[int, int, int]]:
        """What retention took from the group since that member was told last: first, last, and how
        many."""
        return self._groups[name].gaps.pop(member, [])

    def letters(self, name: str) -> list[Letter]:
        """What has become a dead letter since the last call: each is to be appended to the dead
        letters, and then `buried`. Raises `LogDamaged`."""
        held = self._groups[name]
        letters = []
        for dead in held.group.dead_letters():
            found = self._batch(held, dead.offset)
            if found is None:
                held.group.buried(dead.offset)
            else:
                letters.append(Letter(name, dead, found))
        return letters

    def buried(self, name: str, offset: int) -> None:
        """That dead letter is safe."""
        if name in self._groups:
            self._groups[name].group.buried(offset)

    # -- The log -----------------------------------------------------------------------------

    def trimmed(self) -> None:
        """The log has given up records."""
        start = self._log.start
        for held in self._groups.values():
            gap = held.group.trimmed(start)
            if gap is not None:
                for member in held.prefetch:
                    held.gaps.setdefault(member, []).append((gap.first, gap.last, gap.count))
            if held.cursor.offset < start:
                held.cursor.move(max(start, held.group.end))

    def acked_to(self) -> int | None:
        """All groups have settled everything below that, for good; None if there is no group."""
        if not self._groups or self._damaged:
            return None
        self.sync()
        return min(held.group.committed for held in self._groups.values())

    def _tell(self, held: _Held, now: float, now_ns: int) -> bool:
        """Tell it of more records, if there are more that it may look at."""
        group, log = held.group, self._log
        if group.end >= min(log.tip.offset, group.horizon):
            return False
        if held.cursor.offset != group.end:
            held.cursor.move(group.end)
        try:
            found = held.cursor.read(_TELL_BYTES)
            if isinstance(found, Gap):
                self.trimmed()
                return True
            return self._told(held, found, now, now_ns)
        except (LogDamaged, Malformed, OSError) as error:
            logger.error("group %r: %s", held.name, error)
            held.stopped = str(error)
            return False

    def _told(self, held: _Held, found: list[Found], now: float, now_ns: int) -> bool:
        group = held.group
        before = group.end
        keyed = group.options.order == "key"
        for each in found:
            header, first = each.header, group.end
            held.kept.add(each)
            columns = columns_of(header, each.body)
            skip = first - header.offset
            keys = columns.keys or [None] * header.count if keyed else ()
            delayed = {}
            if columns.due_ns is not None:
                delayed = {
                    header.offset + n: now + (due - now_ns) / 1e9
                    for n, due in enumerate(columns.due_ns)
                    if due > now_ns
                }
            if group.appended(header.end, keys[skip:], delayed) < header.end:
                break  # the horizon: again from there, later
        if found:
            records = found[-1].header.end - found[0].header.offset
            held.record_bytes = max(1.0, sum(each.header.size for each in found) / records)
            for member, prefetch in held.prefetch.items():
                group.join(member, self._bounded(held, prefetch))
        return group.end > before

    def _bounded(self, held: _Held, prefetch: int) -> int:
        """How many records a member may hold: what it asked for, as far as that is no more bytes
        than anybody may."""
        return max(1, min(prefetch, int(limits.PREFETCH_BYTES_MAX / held.record_bytes)))

    def _batch(self, held: _Held, offset: int) -> Found | None:
        """The batch that has that record; None if it is gone. Raises `LogDamaged`, `OSError`."""
        found = held.kept.find(offset)
        if found is None:
            cursor = Cursor(self._log, offset)
            with contextlib.closing(cursor):
                some = cursor.read(_AGAIN_BYTES)
            if isinstance(some, Gap) or not some:
                return None
            for each in reversed(some):  # the others are likely to be next
                held.kept.add(each)
            found = some[0]
        return found

    # -- What is remembered ------------------------------------------------------------------

    def write(self) -> None:
        """Write down what has changed, so that it survives this process."""
        for held in self._groups.values():
            changes = held.group.changes()
            if changes is not None and not held.journal.append(changes):
                self._anew(held)

    def sync(self) -> None:
        """Have on disk what was written, and what has changed."""
        self.write()
        for held in self._groups.values():
            if not held.journal.sync():
                self._anew(held)

    def _anew(self, held: _Held) -> None:
        try:
            held.journal.begin(held.beginning, held.group.snapshot())
        except OSError as error:
            held.group.counters["journal failed"] += 1
            logger.error("group %r: what it has acknowledged may come again: %s", held.name, error)

    def stats(self) -> dict[str, GroupStats]:
        return {
            name: GroupStats(
                held.group.committed,
                self._log.tip.offset - held.group.committed,
                held.group.in_flight,
                len(held.prefetch),
                dict(Counter(held.group.counters)),
            )
            for name, held in self._groups.items()
        }

    def close(self) -> None:
        self.sync()
        for held in self._groups.values():
            held.cursor.close()
            held.journal.close()


def file_name_of(group: str) -> str:
    """Of its journal."""
    return quote(group, safe="").replace(".", "%2E")
