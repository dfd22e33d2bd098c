"""What a group must not forget: which records are settled, and how often the others were delivered.

It only grows: more is settled, and counts go up. (A delivery that came to nothing through no fault
of its record is taken off in memory, and is back after a crash before the next `snapshot`.) So
pieces of it can be joined in any order, each as often as one likes; and where pieces are missing,
an acknowledgement is lost, never invented. It knows nothing of files, nor of who has the records.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from mesh import limits
from mesh.durable.intervals import Intervals, Range

Run = tuple[int, int, int]
"""First, the end, which is not included, and how often each of those records was delivered."""


class Progress(msgspec.Struct, frozen=True):
    """All that is to be remembered, or what is new of it."""

    settled: tuple[Range, ...] = ()
    deliveries: tuple[Run, ...] = ()
    """Of records that are not settled."""


class Tally:
    """The progress of one group, in memory."""

    def __init__(self) -> None:
        self.committed = 0
        """All below that is settled."""
        self.settled = Intervals()
        self.deliveries: dict[int, int] = {}
        """By offset, of each record that was delivered and is not settled."""
        self.overstated = False
        """Whether `changes` has told of deliveries that were taken off since."""
        self._newly_settled = Intervals()
        self._newly_delivered = Intervals()

    @property
    def horizon(self) -> int:
        """Beyond this nothing is looked at, so that `deliveries` and the ranges of `settled` are no
        more than the window."""
        return self.committed + limits.GROUP_WINDOW

    def settle(self, first: int, end: int) -> None:
        """Those records are settled. Their `deliveries` are for the caller to drop."""
        self.settled.add(first, end)
        self._newly_settled.add(first, end)
        self.committed = self.settled.missing_from(self.committed)

    def deliver(self, first: int, end: int) -> Iterator[Run]:
        """Those records are delivered once more: how often each, then."""
        deliveries = self.deliveries
        for offset in range(first, end):
            deliveries[offset] = deliveries.get(offset, 0) + 1
        self._newly_delivered.add(first, end)
        return self._runs(range(first, end))

    def delivered_in(self, first: int, end: int) -> list[int]:
        """Those of that range that were delivered and are not settled, the lowest first: sought in
        the range or among all of them, whichever are fewer."""
        deliveries = self.deliveries
        if end - first <= len(deliveries):
            return list(filter(deliveries.__contains__, range(first, end)))
        return sorted(offset for offset in deliveries if first <= offset < end)

    def take_off(self, offset: int) -> None:
        """The last delivery of that record does not count."""
        self.deliveries[offset] -= 1
        self.overstated |= offset not in self._newly_delivered

    def changes(self) -> Progress | None:
        """What is new since the last call; None if nothing is."""
        runs = [
            run
            for first, end in self._newly_delivered
            for run in self._runs(range(max(first, self.committed), end))
        ]
        settled = tuple(self._newly_settled)
        self._newly_settled, self._newly_delivered = Intervals(), Intervals()
        return Progress(settled, tuple(runs)) if settled or runs else None

    def snapshot(self) -> Progress:
        """All of it."""
        self.overstated = False
        return Progress(tuple(self.settled), tuple(self._runs(sorted(self.deliveries))))

    @classmethod
    def restore(cls, journal: Iterable[Progress], end: int) -> Tally:
        """What `journal` says, joined; of records from `end` on nothing is taken over."""
        tally, journal = cls(), list(journal)
        for progress in journal:
            for first, last in progress.settled:
                tally.settled.add(first, min(last, end))
        tally.committed = tally.settled.missing_from(0)
        end = min(end, tally.horizon)
        for progress in journal:
            for first, last, count in progress.deliveries:
                for low, high in tally.settled.missing_in(first, min(last, end)):
                    for offset in range(low, high):
                        tally.deliveries[offset] = max(count, tally.deliveries.get(offset, 0))
        return tally

    def _runs(self, offsets: Iterable[int]) -> Iterator[Run]:
        """Of `offsets`, which ascend, those that have a count."""
        first = end = count = -1
        for offset in offsets:
            n = self.deliveries.get(offset)
            if n is None:
                continue
            if offset != end or n != count:
                if end > first:
                    yield first, end, count
                first, count = offset, n
            end = offset + 1
        if end > first:
            yield first, end, count
