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
        self._closed = False

    def run(self, hook: Callable[[Any], object], event: Any) -> None:
        """Have `hook` called with `event`, soon. Does not block; safe from any thread."""
        with self._lock:
            room = self._calls.qsize() < limits.HOOK_EVENTS_MAX
            if self._closed or not room or not self._has_thread():
                self.dropped += 1
            else:
                self._calls.put((hook, event))

    def close(self) -> None:
        """Take no more events, and end once those that wait have been told. Does not wait."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._calls.put(None)

    def join(self, timeout: float) -> None:
        """Let the events that are waiting be told, for `timeout` seconds at the most."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _has_thread(self) -> bool:
        """False if there is none to be had: there are too many, or the interpreter is ending."""
        if self._thread is None:
            thread = threading.Thread(
                target=self._work, name=f"mesh hooks {self._name}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                logger.info("node %r has no thread for its hooks: %s", self._name, error)
                return False
            self._thread = thread
        return True

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            hook, event = call
            try:
                hook(event)
            except BaseException:  # the user's code, be it sys.exit: the other hooks go on
                logger.exception("a hook of node %r raised on %r", self._name, event)
