"""What one group gets of the log: it is told of records, and what it grants goes out.

A group is told of records only as members that ask have room for them, so that what waits, waits in
the log. What is granted goes out as batches, as they stand in the log, with the ranges that are
meant; what does not fit counts as never delivered. So a delivery is what was sent, and nothing else
is counted, leased, or kept from others.

Where the log is damaged its group is *stopped*: it says why to each member that asks. Where it
could only not be read this time, that is counted, and tried again when somebody asks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

import msgspec

from mesh import limits
from mesh.durable.batch import Header, encode
from mesh.durable.batch_cache import BatchCache
from mesh.durable.cursor import Cursor, Cut, Gap
from mesh.durable.deliveries import Delivery
from mesh.durable.group import DeadRecord, Grant, Group
from mesh.durable.log import Log
from mesh.durable.protocol import check_room, room_for_many_batches
from mesh.durable.records import columns_of
from mesh.durable.scan import Found
from mesh.errors import LogDamaged, MeshError, PayloadTooLarge
from mesh.sockets.frame import Malformed

logger = logging.getLogger(__name__)

_TELL_BYTES: Final = 1 << 20
"""Read of the log at one time."""
_DELAY_NS_MAX: Final = round(limits.DELAY_S_MAX * 1e9)
"""From when the log took a record in: when it is due says its producer's clock, which may be far
ahead, and until then all that is behind it may have to wait."""
_GRANT_BYTES: Final = 24
"""What a grant takes in a delivery, at most."""


class Letter(msgspec.Struct, frozen=True):
    """A dead record, as it was read, to be appended to the dead letters."""

    group: str
    dead: DeadRecord
    found: Found


class _Parcel:
    """What is being put together for one member."""

    def __init__(self, message_bytes_max: int) -> None:
        """`message_bytes_max`: what that member lets in."""
        self.grants: list[tuple[int, int, int]] = []
        self.batches: dict[int, bytes] = {}
        """By base offset."""
        self.full = False
        self.too_large: PayloadTooLarge | None = None
        """Why what comes next cannot be in any."""
        self._message_bytes_max = message_bytes_max
        self._bytes_left = min(room_for_many_batches(message_bytes_max), limits.DELIVERY_BYTES)

    def has_room(self, header: Header) -> bool:
        """Whether a grant of that batch may be put there, with the batch if it is not in it yet:
        the first always, if it has room at all."""
        self._bytes_left -= _GRANT_BYTES
        if header.offset not in self.batches:
            self._bytes_left -= header.size
        self.full = self._bytes_left < 0 and bool(self.batches)
        if self._bytes_left < 0 and not self.batches:
            try:
                check_room(header, self._message_bytes_max)
            except PayloadTooLarge as error:
                self.full, self.too_large = True, error
        return not self.full


class Supply:
    """See above. For one thread."""

    def __init__(self, name: str, group: Group, log: Log) -> None:
        self.name = name
        self.group = group
        self.prefetch: dict[str, int] = {}
        """What each member asked for."""
        self._message_bytes_max: dict[str, int] = {}
        """What it lets in."""
        self.stopped: LogDamaged | None = None
        """Why nothing more can be delivered."""
        self._log = log
        self._cursor = Cursor(log, group.end)
        self._cache = BatchCache(log)
        self._gaps: dict[str, tuple[int, int, int]] = {}
        self._record_bytes = 1.0
        """Of a record, as told of lately."""

    def close(self) -> None:
        self._cursor.close()

    # -- Members -----------------------------------------------------------------------------

    def join(self, member: str, prefetch: int, message_bytes_max: int) -> bool:
        """See `Groups.join`. A delivery has no more than `limits.DELIVERY_BYTES`, or is one batch
        that is larger."""
        if not self.group.join(member, self._bounded(prefetch)):
            return False
        self.prefetch[member] = prefetch
        self._message_bytes_max[member] = message_bytes_max
        self.trimmed()
        return True

    def leave(self, member: str) -> None:
        if self.prefetch.pop(member, None) is not None:
            del self._message_bytes_max[member]
            self.group.leave(member)
            self._gaps.pop(member, None)
        if not self.prefetch:
            self._cursor.close()  # or a segment that retention removes stays on the disk

    def _bounded(self, prefetch: int) -> int:
        """How many records a member may hold: what it asked for, as far as that is no more bytes
        than anybody may."""
        return max(1, min(prefetch, int(limits.PREFETCH_BYTES_MAX / self._record_bytes)))

    def resume(self, offset: int) -> None:
        """All below `offset` is done with, as far as there is a log."""
        self.group.resume(min(offset, self._log.tip.offset))

    # -- What goes out -----------------------------------------------------------------------

    def next_at(self) -> float | None:
        """When something is due, if nothing happens before."""
        return self.group.next_at() if self.prefetch and not self.stopped else None

    def deliver(
        self, asking: Iterable[str], now: float, now_ns: int
    ) -> dict[str, Delivery | MeshError]:
        """What those members get now, if they ask for records, or why they get nothing any more;
        who gets nothing now is not in it."""
        group = self.group
        group.expire(now)
        asked = [member for member in asking if member in self.prefetch]
        parcels = {member: _Parcel(self._message_bytes_max[member]) for member in asked}
        while not self.stopped:
            open_to = {member for member in asked if not parcels[member].full}
            whole = self._pack(group.take(now, open_to), parcels)
            still_open = {member for member in open_to if not parcels[member].full}
            again = any(parcels[each].too_large for each in open_to - still_open)  # to another
            if not whole or not group.room(still_open) or not (again or self._tell(now, now_ns)):
                break
        self._cache.forget(group.committed)
        outcomes: dict[str, Delivery | MeshError] = {}
        for member, parcel in parcels.items():
            if parcel.grants or member in self._gaps:
                outcomes[member] = Delivery(tuple(parcel.grants), tuple(parcel.batches.values()))
            elif error := parcel.too_large or self.stopped:
                outcomes[member] = error
        return outcomes

    def _pack(self, grants: list[Grant], parcels: dict[str, _Parcel]) -> bool:
        """Put what is granted into parcels, as far as it fits. False if the log cannot be read."""
        failed = False
        for grant in grants:
            parcel, first = parcels[grant.member], grant.first
            while first < grant.end and not parcel.full and not failed:
                try:
                    found = self._cache.find(first)
                except (LogDamaged, OSError) as error:
                    self._unreadable(error)
                    failed = True
                    break
                if found is None:  # retention was quicker, and tells of it
                    first = max(first + 1, self._log.start)
                    continue
                header = found.header
                if not parcel.has_room(header):
                    break
                if header.offset not in parcel.batches:
                    parcel.batches[header.offset] = self._sent(found)
                end = min(grant.end, header.end)
                parcel.grants.append((first, end, grant.deliveries))
                first = end
            self.group.put_back(first, grant.end)
        return not failed

    def again(self, grants: Iterable[tuple[int, int, int]]) -> Delivery:
        """See `Groups.again`."""
        kept, batches = [], {}
        for grant in grants:
            found = self._cache.find(grant[0])
            if found is not None:  # or retention has taken it, which tells of it
                kept.append(grant)
                if found.header.offset not in batches:
                    batches[found.header.offset] = self._sent(found)
        return Delivery(tuple(kept), tuple(batches.values()))

    def _sent(self, found: Found) -> bytes:
        return encode(found.header, self._log.partition) + found.body

    def gaps(self, member: str) -> list[tuple[int, int, int]]:
        """What retention took from the group since that member was told last: first, last, and how
        many."""
        gap = self._gaps.pop(member, None)
        return [] if gap is None else [gap]

    def letter(self) -> Letter | None:
        """The next dead record, as it is read now: to be appended to the dead letters, and then
        `buried`. None if there is none more that can be read now."""
        while (dead := self.group.next_dead()) is not None:
            try:
                found = self._cache.find(dead.offset)
            except LogDamaged as error:  # it stays unsettled
                self.group.counters["dead and damaged"] += 1
                logger.error("group %r: dead letter %d: %s", self.name, dead.offset, error)
            except OSError as error:
                self._unreadable(error)
                self.group.keep_dead(dead)
                return None
            else:
                if found is not None:
                    return Letter(self.name, dead, found)
                self.group.buried(dead.offset)
        return None

    # -- The log -----------------------------------------------------------------------------

    def trimmed(self) -> None:
        """The log may have given up records. Where nobody is a member, whoever joins next is told
        of it."""
        if not self.prefetch:
            return
        start = self._log.start
        gap = self.group.trimmed(start)
        if gap is not None:
            for member in self.prefetch:
                first, _, count = self._gaps.get(member, (gap.first, 0, 0))
                self._gaps[member] = first, gap.last, count + gap.count
        self._cache.forget(start)

    def _tell(self, now: float, now_ns: int) -> bool:
        """Tell the group of more records, if there are more that it may look at."""
        group, log = self.group, self._log
        if group.end >= min(log.tip.offset, group.horizon):
            return False
        if self._cursor.offset != group.end:
            self._cursor.move(group.end)
        try:
            found = self._cursor.read(_TELL_BYTES)
            if isinstance(found, Cut):
                return False  # `Groups.rewind` is about to begin again
            if isinstance(found, Gap):
                self.trimmed()
                return True
            return self._told(found, now, now_ns)
        except (LogDamaged, Malformed, OSError) as error:
            self._unreadable(error)
            return False

    def _told(self, found: list[Found], now: float, now_ns: int) -> bool:
        group = self.group
        before = group.end
        keyed = group.options.order == "key"
        self._cache.add(found)
        for each in found:
            header, first = each.header, group.end
            columns = columns_of(header, each.body)
            skip = first - header.offset
            keys = columns.keys or [None] * header.count if keyed else ()
            delayed = {}
            if columns.due_ns is not None:
                latest_ns = header.time_ns + _DELAY_NS_MAX
                delayed = {
                    header.offset + n: now + (min(due, latest_ns) - now_ns) / 1e9
                    for n, due in enumerate(columns.due_ns)
                    if min(due, latest_ns) > now_ns
                }
            if group.appended(header.end, keys[skip:], delayed) < header.end:
                break  # the horizon: again from there, later
        if found:
            records = found[-1].header.end - found[0].header.offset
            self._record_bytes = max(1.0, sum(each.header.size for each in found) / records)
            for member, prefetch in self.prefetch.items():
                group.join(member, self._bounded(prefetch))
        return group.end > before

    def _unreadable(self, error: Exception) -> None:
        logger.error("group %r: %s", self.name, error)
        if isinstance(error, OSError):
            self.group.counters["unreadable"] += 1
        elif isinstance(error, LogDamaged):
            self.stopped = error
        else:
            self.stopped = LogDamaged(f"group {self.name!r}", 0, self.group.end, str(error))
