"""A thread that does one thing after the other: what it is given, and what is due.

Whoever gives it something does not wait. What it is given may give it more.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import count

logger = logging.getLogger(__name__)

Action = Callable[[], object]


class Clerk:
    """See above. Started with it. However much it is given, what is due is done when it is."""

    def __init__(self, name: str) -> None:
        self._inbox: deque[tuple[Action, Action | None]] = deque()
        self._due: list[tuple[float, int, Action]] = []
        """The clerk's own."""
        self._numbers = count()
        self._bell = threading.Lock()  # released: it rang. Held: it did not
        self._bell.acquire()
        self._closing = False
        self._ended = False
        self._thread = threading.Thread(target=self._work, name=f"mesh clerk {name}", daemon=True)
        self._thread.start()

    def run(self, action: Action, otherwise: Action | None = None) -> None:
        """Do it soon, which takes no lock; or `otherwise`, here and now, if the clerk has ended."""
        self._inbox.append((action, otherwise))
        self._ring()
        if self._ended:
            self._do_otherwise()

    def at(self, when: float, action: Action) -> None:
        """Do it then (`time.monotonic`). For the clerk itself to call."""
        heapq.heappush(self._due, (when, next(self._numbers), action))

    def every(self, interval_s: float, action: Action) -> None:
        """Do it again and again, until the end."""

        def again() -> None:
            self.at(time.monotonic() + interval_s, again)
            action()

        self.run(lambda: self.at(time.monotonic() + interval_s, again))

    def close(self, timeout: float | None = 2.0) -> bool:
        """Do what was given, nothing that is due later, and end. Whether that was done in time."""
        self._closing = True
        self._ring()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # it rang already, and that was not heard yet
            self._bell.release()

    def _work(self) -> None:
        while True:
            left_s = self._due[0][0] - time.monotonic() if self._due else None
            if left_s is not None and left_s <= 0 and not self._closing:
                self._do(heapq.heappop(self._due)[2])
            elif self._inbox:
                self._do(self._inbox.popleft()[0])
            elif self._closing:
                self._ended = True
                self._do_otherwise()  # what has come since this looked
                return
            else:
                self._bell.acquire(timeout=-1.0 if left_s is None else left_s)

    def _do_otherwise(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                _, otherwise = self._inbox.popleft()
                if otherwise is not None:
                    self._do(otherwise)

    def _do(self, action: Action) -> None:
        try:
            action()
        except Exception:
            logger.exception("something could not be done")
