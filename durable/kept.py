"""Batches kept in memory for a while, found by the offset of any of their records. No I/O."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import OrderedDict

from mesh.durable.scan import Found


class Kept:
    """Up to so many bytes: what was added or found longest ago goes first."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._by_base: OrderedDict[int, Found] = OrderedDict()
        self._bases: list[int] = []
        """Sorted."""

    def __len__(self) -> int:
        return len(self._by_base)

    def add(self, found: Found) -> None:
        base = found.header.offset
        if base in self._by_base:
            self._by_base.move_to_end(base)
            return
        self._by_base[base] = found
        insort(self._bases, base)
        self._bytes += found.header.size
        while self._bytes > self._bytes_max and len(self._by_base) > 1:
            base, gone = self._by_base.popitem(last=False)
            del self._bases[bisect_right(self._bases, base) - 1]
            self._bytes -= gone.header.size

    def find(self, offset: int) -> Found | None:
        """The batch that has that record."""
        index = bisect_right(self._bases, offset) - 1
        if index < 0:
            return None
        base = self._bases[index]
        found = self._by_base[base]
        if offset >= found.header.end:
            return None
        self._by_base.move_to_end(base)
        return found
