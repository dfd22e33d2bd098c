"""What of a group waits to be delivered, and which of it may go to whom. No I/O: `now` is given.

A record that waits is *ready*, *delayed* until a moment, or *held* until it is withdrawn. The
lowest offset that is ready goes first, so what comes back goes before what was never delivered.

Where there is an order, records form *lanes*: one for each key, or a single one of all records
(``order="exclusive"``). Records without a key have none. A lane keeps these rules:

- only its lowest waiting record, its *head*, is ready, and only if it is not delayed and nothing of
  the lane is held;
- while something of it is in flight it has a *holder*, and the head is reserved for that member, so
  that the next record can go where the one before it is;
- when a record of it comes back, what is in flight behind that comes back, too: all that waits is
  higher than all that is in flight;
- the single lane keeps its holder, the active member, until it is handed over.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile
from typing import Literal

from mesh.deadlines import Deadlines
from mesh.durable.intervals import Intervals, Range
from mesh.durable.leases import Member

Order = Literal["any", "key", "exclusive"]


class Lane:
    """Records to be handled one after the other. Offsets ascend in both tables."""

    __slots__ = ("held", "holder", "in_flight", "key", "waiting")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.holder: Member | None = None
        self.held = 0
        # Ordered for their ends: those of a dict are only found past all that was deleted there.
        self.in_flight: OrderedDict[int, None] = OrderedDict()
        self.waiting: OrderedDict[int, None] = OrderedDict()


class Waiting:
    """All records of a group that wait. Of those in flight it knows the ones that are in a lane."""

    def __init__(self, order: Order) -> None:
        self.ready = Intervals()
        """What may go to any member. What may go to one only is `reserved` for that one."""
        self._order = order
        self._delayed: Deadlines[int] = Deadlines()
        self._held: set[int] = set()
        """Those that are in a lane."""
        self._single = Lane(b"")
        self._lanes: dict[bytes, Lane] = {}
        self._lane_of: dict[int, Lane] = {}

    def add(self, first: int, end: int, keys: Sequence[bytes | None]) -> None:
        """Records nobody told of yet, higher than all before; with a key for each if the order is
        one of keys."""
        offsets = range(first, end)
        if self._order == "any":
            self.ready.add(first, end)
        elif self._order == "exclusive":
            for offset in offsets:
                self._join(self._single, offset)
        else:
            for offset, key in zip(offsets, keys, strict=True):
                if key is None:
                    self.ready.add(offset, offset + 1)
                    continue
                lane = self._lanes.get(key)
                if lane is None:
                    lane = self._lanes[key] = Lane(key)
                self._join(lane, offset)

    def delay(self, offset: int, at: float) -> None:
        """A record that waits is not to be delivered before `at`."""
        lane = self._lane_of.get(offset)
        if lane is None:
            self.ready.discard(offset, offset + 1)
        else:
            self._hide(lane)
        self._delayed.set(offset, at)
        if lane is not None:
            self._show(lane)

    def due(self, now: float) -> None:
        """What was delayed until `now` is ready, as far as its lane allows it."""
        while (offset := self._delayed.take(now)) is not None:
            lane = self._lane_of.get(offset)
            if lane is None:
                self.ready.add(offset, offset + 1)
            else:
                self._show(lane)

    def next(self) -> float | None:
        """When the next delay is over, or None."""
        return self._delayed.next()

    def take(self, member: Member, share: int) -> list[Range]:
        """Records for `member`, the lowest first: as many as it has room for, at most `share` of
        them from what anybody could have."""
        ready, reserved = self.ready, member.reserved
        room = member.room
        runs: list[Range] = []
        while room:
            if share and ready and not (reserved and reserved.first < ready.first):
                first, end = ready.pop(min(share, room))
                share -= end - first
            elif reserved:
                first, end = reserved.pop(room)
            else:
                break
            room -= end - first
            if self._lane_of:
                self._depart(first, end, member)
            if runs and runs[-1][1] == first:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((first, end))
        return runs

    def back(self, offset: int, at: float | None = None) -> list[int]:
        """A record in flight comes back, to be delivered at once or not before `at`. Returns those
        behind it in its lane, which were in flight and come back with it."""
        if at is not None:
            self._delayed.set(offset, at)
        lane = self._lane_of.get(offset)
        if lane is None:
            if at is None:
                self.ready.add(offset, offset + 1)
            return []
        self._hide(lane)
        behind = list(takewhile(lambda o: o > offset, reversed(lane.in_flight)))
        for one in (*behind, offset):
            del lane.in_flight[one]
            lane.waiting[one] = None
            lane.waiting.move_to_end(one, last=False)
        self._unbind(lane)
        self._show(lane)
        return behind

    def arrived(self, offset: int) -> None:
        """A record in flight is done with."""
        lane = self._lane_of.pop(offset, None)
        if lane is None:
            return
        del lane.in_flight[offset]
        if not lane.in_flight:
            self._hide(lane)
            self._unbind(lane)
            self._show(lane)

    def hold(self, offset: int) -> None:
        """A record, waiting or in flight, is for nobody until it is withdrawn."""
        self._delayed.clear(offset)
        lane = self._lane_of.get(offset)
        if lane is None:
            self.ready.discard(offset, offset + 1)
            return
        self._hide(lane)
        self._held.add(offset)
        lane.held += 1
        if offset in lane.in_flight:
            del lane.in_flight[offset]
        else:
            del lane.waiting[offset]
        self._unbind(lane)

    def withdraw(self, offset: int) -> None:
        """A record that waits is done with."""
        self._delayed.clear(offset)
        lane = self._lane_of.pop(offset, None)
        if lane is None:
            self.ready.discard(offset, offset + 1)
            return
        self._hide(lane)
        if offset in self._held:
            self._held.remove(offset)
            lane.held -= 1
        else:
            del lane.waiting[offset]
        self._unbind(lane)
        self._show(lane)

    def hand_over(self, member: Member | None) -> None:
        """The single lane, of which nothing is in flight, has another holder."""
        self._hide(self._single)
        self._single.holder = member
        self._show(self._single)

    # Lanes

    def _join(self, lane: Lane, offset: int) -> None:
        self._lane_of[offset] = lane
        is_head = not lane.waiting
        lane.waiting[offset] = None
        if is_head:
            self._show(lane)

    def _depart(self, first: int, end: int, member: Member) -> None:
        for offset in range(first, end):
            lane = self._lane_of.get(offset)
            if lane is not None:
                del lane.waiting[offset]
                lane.in_flight[offset] = None
                lane.holder = member
                if lane.waiting:
                    self._show(lane)

    def _show(self, lane: Lane) -> None:
        for head in lane.waiting:
            if not lane.held and head not in self._delayed:
                self._place(lane).add(head, head + 1)
            return

    def _hide(self, lane: Lane) -> None:
        for head in lane.waiting:
            self._place(lane).discard(head, head + 1)
            return

    def _place(self, lane: Lane) -> Intervals:
        return self.ready if lane.holder is None else lane.holder.reserved

    def _unbind(self, lane: Lane) -> None:
        if lane is self._single or lane.in_flight:
            return
        lane.holder = None
        if not lane.waiting and not lane.held:
            del self._lanes[lane.key]
