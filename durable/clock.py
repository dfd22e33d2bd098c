"""The time of a log: the wall clock's, where that does not go back. Decides only: `now` is given.

Where the wall clock was ahead, and was set right, time would stand still until that is made up for,
be it a year, and with it whatever is counted from a record's time: a window of dedup ids, the age
that retention goes by. So it runs on then, at half the speed: what is counted takes no more than
twice as long, and what was ahead is made up for after twice that.
"""

from __future__ import annotations

import threading
from typing import Final

_STEP_NS_MAX: Final = 86_400 * 1_000_000_000
"""The wall clock of a board without a battery leaps from 1970 into the present: that is no time
which has passed."""


class Clock:
    """See above. One thread ticks, one hears; any may look."""

    __slots__ = ("_last", "_lock")

    def __init__(self, time_ns: int, now_ns: int) -> None:
        """`time_ns`: of the last batch."""
        self._lock = threading.Lock()
        self._last = time_ns, now_ns
        """Time, and what the wall clock said then."""

    @property
    def time_ns(self) -> int:
        """Of the last batch; the next will not be before it."""
        return self._last[0]

    def at(self, now_ns: int) -> int:
        """What time it is when the wall clock says `now_ns`."""
        time_ns, heard_ns = self._last
        if now_ns >= time_ns:
            return now_ns
        return time_ns + min(max(0, now_ns - heard_ns), _STEP_NS_MAX) // 2

    def tick(self, now_ns: int) -> int:
        """It is so late now, and never earlier again."""
        with self._lock:
            time_ns = self.at(now_ns)
            self._last = time_ns, now_ns
        return time_ns

    def hear(self, now_ns: int) -> int:
        """What time it is, which runs on though nothing is appended: to be called now and then, at
        least once a day."""
        with self._lock:
            time_ns = self.at(now_ns)
            if time_ns > now_ns:
                self._last = time_ns, now_ns
        return time_ns
