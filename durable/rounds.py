"""Which of many is looked at next: one at a time, all of them once in a while. No I/O, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class Rounds:
    """See above. The first begins at once; each takes as long as it takes."""

    def __init__(self, interval_s: float) -> None:
        """Between the beginnings of two of them, at least."""
        self._interval_s = interval_s
        self._due: deque[str] = deque()
        self._next_at: float | None = None

    def next(self, names: Iterable[str], now: float) -> str | None:
        """One of those that there are; None if none is due. Who came during a round has to wait for
        the next, and who is gone may be named all the same."""
        if not self._due and (self._next_at is None or now >= self._next_at):
            self._due.extend(sorted(names))
            self._next_at = now + self._interval_s
        return self._due.popleft() if self._due else None

    def put_back(self, name: str) -> None:
        """It could not have its turn: it is the next."""
        self._due.appendleft(name)
