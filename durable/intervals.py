"""A set of offsets, kept as ranges: exact, and as small as the number of its holes.

Ranges are half open everywhere: `first` belongs to them, `end` does not. The set is one sorted list
of bounds, at which it begins and ends in turn::

    bounds   [3,     7,    9,    10]
             begins  ends  begins ends      the set {3, 4, 5, 6, 9}

So whether an offset is in it is whether the number of bounds up to it is odd, and to add or discard
a range is to replace the bounds that it covers. Looking up costs O(log n) of the holes, changing a
move of the list's tail besides.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Range = tuple[int, int]
"""First, and the end, which is not included."""


class Intervals:
    """Offsets. Not safe from several threads."""

    __slots__ = ("_bounds",)

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._bounds: list[int] = []
        for first, end in sorted(ranges):  # in descending order each would move the rest
            self.add(first, end)

    def __bool__(self) -> bool:
        return bool(self._bounds)

    def __contains__(self, offset: int) -> bool:
        return bisect_right(self._bounds, offset) % 2 == 1

    def __iter__(self) -> Iterator[Range]:
        """Its ranges, the lowest first. No two of them touch."""
        bounds = iter(self._bounds)
        return zip(bounds, bounds, strict=True)

    def __len__(self) -> int:
        """Of its ranges."""
        return len(self._bounds) // 2

    @property
    def first(self) -> int:
        """The lowest offset. The set must not be empty."""
        return self._bounds[0]

    def count(self, most: int) -> int:
        """How many offsets there are; of more than `most` only that."""
        count = 0
        for first, end in self:
            count += end - first
            if count >= most:
                return most
        return count

    def add(self, first: int, end: int) -> None:
        """All from `first` to before `end`, of which some may be in it already."""
        if first >= end:
            return
        bounds = self._bounds
        if not bounds or first > bounds[-1]:  # what is new is often beyond all others
            bounds += (first, end)
            return
        low, high = bisect_left(bounds, first), bisect_right(bounds, end)
        bounds[low:high] = [first] * (low % 2 == 0) + [end] * (high % 2 == 0)

    def discard(self, first: int, end: int) -> None:
        """All from `first` to before `end`, of which some may not be in it."""
        if first >= end:
            return
        bounds = self._bounds
        low, high = bisect_left(bounds, first), bisect_right(bounds, end)
        bounds[low:high] = [first] * (low % 2) + [end] * (high % 2)

    def pop(self, most: int) -> Range:
        """Take the lowest range out, or the first `most` of it. The set must not be empty."""
        bounds = self._bounds
        first, end = bounds[0], bounds[1]
        if end - first > most:
            bounds[0] = end = first + most
        else:
            del bounds[:2]
        return first, end

    def take(self, most: int) -> list[Range]:
        """Take its lowest ranges out, so many at most."""
        taken = self._bounds[: 2 * most]
        del self._bounds[: 2 * most]
        bounds = iter(taken)
        return list(zip(bounds, bounds, strict=True))

    def missing_from(self, offset: int) -> int:
        """The first offset from `offset` on that is not in it."""
        at = bisect_right(self._bounds, offset)
        return self._bounds[at] if at % 2 else offset

    def missing_in(self, first: int, end: int) -> list[Range]:
        """What of that range is not in it, the lowest first."""
        bounds = self._bounds
        missing = []
        first = self.missing_from(first)
        at = bisect_right(bounds, first)
        while first < end:
            if at == len(bounds):
                missing.append((first, end))
                break
            missing.append((first, min(bounds[at], end)))
            first = bounds[at + 1]
            at += 2
        return missing
