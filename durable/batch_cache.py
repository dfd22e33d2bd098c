"""The batches that a group was told of and may have to deliver yet, so that they are read once.

What is not here any more is read again, some batches at a time, as those that follow are often
wanted next. For one thread.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from typing import Final

from mesh.durable.cursor import Cursor
from mesh.durable.log import Log
from mesh.durable.scan import Found

_KEPT_BYTES: Final = 1 << 21
"""For each group; or its latest batch, if that is larger."""
_AGAIN_BYTES: Final = 1 << 16
"""Read at one time of what is not here any more."""


class BatchCache:
    """See above. Both lists ascend."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._told: list[Found] = []
        self._bytes = 0
        self._again: list[Found] = []

    def add(self, found: list[Found]) -> None:
        """The group is told of those, which follow what it was told of before."""
        told = self._told
        latest = told[-1].header.offset if told else -1
        new = [each for each in found if each.header.offset > latest]
        told += new
        self._bytes += sum(each.header.size for each in new)
        excess, drop = self._bytes - _KEPT_BYTES, 0
        while excess > 0 and drop < len(told) - 1:
            excess -= told[drop].header.size
            drop += 1
        self._drop(drop)

    def forget(self, offset: int) -> None:
        """What is below that is not wanted any more."""
        self._again = []
        if self._told and self._told[0].header.end <= offset:
            self._drop(bisect_right(self._told, offset, key=_end_of))

    def find(self, offset: int) -> Found | None:
        """The batch that has that record; None if retention took it. Raises `LogDamaged`,
        `OSError`."""
        return _find(self._told, offset) or _find(self._again, offset) or self._read(offset)

    def _read(self, offset: int) -> Found | None:
        with contextlib.closing(Cursor(self._log, offset)) as cursor:
            found = cursor.read(_AGAIN_BYTES)
        if not isinstance(found, list):
            return None
        self._again = found
        return _find(found, offset)

    def _drop(self, count: int) -> None:
        self._bytes -= sum(each.header.size for each in self._told[:count])
        del self._told[:count]


def _offset_of(found: Found) -> int:
    return found.header.offset


def _end_of(found: Found) -> int:
    return found.header.end


def _find(found: list[Found], offset: int) -> Found | None:
    at = bisect_right(found, offset, key=_offset_of) - 1
    return found[at] if at >= 0 and offset < found[at].header.end else None
