"""When to look at what again: one moment for each key, and the next of them all.

No clock: `now` is given. Setting and taking cost O(log n) of what is set, so a tick is as cheap as
what is due. A key that was set again or cleared leaves a stale entry in the heap, which is skipped
when its time comes; the heap is rebuilt before such entries outnumber the others.
"""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_STALE_MIN = 64
"""Below this rebuilding is not worth its while."""


class Deadlines(Generic[K]):
    """Moments, in seconds of the caller's clock, by key."""

    def __init__(self) -> None:
        self._at: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._order = count()  # keys of different types do not compare

    def __contains__(self, key: object) -> bool:
        return key in self._at

    def set(self, key: K, at: float) -> None:
        """Look at `key` at the moment `at`, and not when it was to be looked at before."""
        self._at[key] = at
        heappush(self._heap, (at, next(self._order), key))
        if len(self._heap) > 2 * len(self._at) + _STALE_MIN:
            self._heap = [(at, next(self._order), key) for key, at in self._at.items()]
            heapify(self._heap)

    def clear(self, key: K) -> None:
        self._at.pop(key, None)

    def next(self) -> float | None:
        """The earliest moment set, or None."""
        heap = self._heap
        while heap and self._at.get(heap[0][2]) != heap[0][0]:
            heappop(heap)
        return heap[0][0] if heap else None

    def take(self, now: float) -> K | None:
        """A key whose moment has come, which is then no longer set; None if there is none."""
        at = self.next()
        if at is None or at > now:
            return None
        key = heappop(self._heap)[2]
        del self._at[key]
        return key
