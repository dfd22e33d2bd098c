"""Where users' hooks run: one thread for each node, so that a slow hook holds up nobody's messages.

Events wait in a bounded queue; what does not fit is dropped and counted. A hook that raises is
logged, and the next event goes on.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from mesh import limits

logger = logging.getLogger(__name__)

_Call = tuple[Callable[[Any], object], Any]


class Hooks:
    """Runs hooks in the order in which their events came. The thread starts with the first."""

    def __init__(self, name: str) -> None:
        self.dropped = 0
        self._name = name
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def run(self, hook: Callable[[Any], object], event: Any) -> None:
        """Have `hook` called with `event`, soon. Does not block; safe from any thread."""
        if self._calls.qsize() >= limits.HOOK_EVENTS_MAX:
            self.dropped += 1
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name=f"mesh hooks {self._name}", daemon=True
                )
                self._thread.start()
        self._calls.put((hook, event))

    def close(self, timeout: float) -> None:
        """Let the events that are waiting be told, for `timeout` seconds at the most."""
        if self._thread is None:
            return
        self._calls.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            hook, event = call
            try:
                hook(event)
            except Exception:  # the user's code: it must not stop the other hooks
                logger.exception("a hook of node %r raised on %r", self._name, event)
