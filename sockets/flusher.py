"""Closes open batches when they get old: one thread of a node, for all its channels.

It sleeps without a timer until some channel is busy; then it looks at those that are, once in each
window, until none is. So a channel that is used now and then never wakes it. One that has no room
is looked at ever more rarely.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Final, Protocol

import msgspec

logger = logging.getLogger(__name__)

BLOCKED_S_MAX: Final = 0.008
"""Longest pause before a batch without room is tried again. It doubles from a window, so that once
there is room a batch waits at most as long again as it did for that."""
FAILED_S: Final = 1.0
"""Before a core is looked at again that failed: it says so in the log each time."""


class Batching(Protocol):
    """A core with open batches."""

    def close_batches(self) -> bool:
        """Send what is older than a window; False if nothing could be, for want of room. Takes the
        link's lock; `forget`s itself under it once nothing is open any more."""


class _Turn(msgspec.Struct):
    """When a core is looked at next, and the pause before that."""

    due: float
    pause_s: float


class Flusher:
    """Looks after the cores that have open batches."""

    def __init__(self, window_s: float = 0.0005) -> None:
        """`window_s`: how long a message may wait for others to share its frame; 0: batches are
        never opened."""
        self.window_s = window_s
        self._cores: dict[Batching, _Turn] = {}
        self._bell = threading.Lock()  # released: it rang. Held: it did not
        self._bell.acquire()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def watch(self, core: Batching) -> bool:
        """`core` opens a batch: called under its lock. False if nobody could close it again."""
        if self._closed or not self.window_s or not self._start():
            return False
        if core not in self._cores:
            self._cores[core] = _Turn(time.monotonic() + self.window_s, self.window_s)
            self._ring()
        return True

    def forget(self, core: Batching) -> None:
        """`core` has no open batch any more: called under its lock."""
        self._cores.pop(core, None)

    def close(self) -> None:
        """End the thread. Does not wait; idempotent. The cores were closed before."""
        self._closed = True
        self._cores.clear()
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # it rang already, and that was not heard yet
            self._bell.release()

    def _start(self) -> bool:
        if self._thread is not None:
            return True
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="mesh flusher", daemon=True)
                try:
                    thread.start()
                except (RuntimeError, OSError):  # the interpreter ends, or has no thread left
                    logger.debug("no thread to close batches: each message leaves by itself")
                    return False
                self._thread = thread
        return True

    def _work(self) -> None:
        while not self._closed:
            dues = [turn.due for turn in tuple(self._cores.values())]
            # Not a SimpleQueue: its `get` can sleep for ever if its timeout is a few microseconds
            # (CPython 3.11).
            self._bell.acquire(timeout=max(0.0, min(dues) - time.monotonic()) if dues else -1)
            now = time.monotonic()
            for core, turn in tuple(self._cores.items()):
                if turn.due <= now:
                    self._look_at(core, turn)

    def _look_at(self, core: Batching, turn: _Turn) -> None:
        try:
            longer_s = max(self.window_s, min(2 * turn.pause_s, BLOCKED_S_MAX))
            turn.pause_s = self.window_s if core.close_batches() else longer_s
        except Exception:  # the other channels' batches have to leave all the same
            logger.exception("the batches of %s cannot be closed", core)
            turn.pause_s = FAILED_S
        turn.due = time.monotonic() + turn.pause_s
