"""Closes open batches when they get old: one thread of a node, for all its channels.

It sleeps without a timer until some channel is busy; then it looks at those that are, once in each
window, until none is. So a channel that is used now and then never wakes it.
"""

from __future__ import annotations

import logging
import threading
import time
from queue import SimpleQueue
from typing import Protocol

logger = logging.getLogger(__name__)


class Batching(Protocol):
    """A core with open batches."""

    def close_batches(self) -> None:
        """Send what is older than a window. Takes the link's lock; `forget`s itself under it once
        nothing is open any more."""


class Flusher:
    """Looks after the cores that have open batches."""

    def __init__(self, window_s: float = 0.0005) -> None:
        """`window_s`: how long a message may wait for others to share its frame; 0: batches are
        never opened."""
        self.window_s = window_s
        self._cores: dict[Batching, None] = {}
        self._bell: SimpleQueue[bool] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def watch(self, core: Batching) -> bool:
        """`core` opens a batch: called under its lock. False if nobody could close it again."""
        if self._closed or not self.window_s or not self._start():
            return False
        if core not in self._cores:
            self._cores[core] = None
            self._bell.put(True)
        return True

    def forget(self, core: Batching) -> None:
        """`core` has no open batch any more: called under its lock."""
        self._cores.pop(core, None)

    def close(self) -> None:
        """End the thread. Does not wait; idempotent. The cores were closed before."""
        self._closed = True
        self._cores.clear()
        self._bell.put(False)

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
        while self._bell.get():
            while self._cores:
                time.sleep(self.window_s)
                for core in tuple(self._cores):
                    try:
                        core.close_batches()
                    except Exception:  # the other channels' batches have to leave all the same
                        logger.exception("the batches of %s cannot be closed", core)
                        self._cores.pop(core, None)
