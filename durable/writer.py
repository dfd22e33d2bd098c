"""The one thread that writes a partition: all that waits is written and synced together.

Guarantee: everything submitted is answered once, in the order in which it came; what is answered
with a receipt is as safe as the stream's durability says. While one group is being synced the next
one gathers, so that a disk that takes 1 ms for a sync carries thousands of appends in that time.
Whoever submits waits while too much waits already: a full queue slows producers down instead of
growing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from mesh import limits
from mesh.durable.batch import HEADER_BYTES, Batch
from mesh.durable.partition import Outcome, Partition, Refused, Request

logger = logging.getLogger(__name__)

Answer = Callable[[Outcome], object]
"""Called in the writer's thread: to be quick, and to raise nothing."""
_GROUP_BYTES_MAX: Final = 8 * 1024 * 1024
"""Written and synced at one time: some 10 ms of a slow disk, so that nobody waits for much more."""
_REST_S: Final = 1.0
"""After so long without an append the log is marked as whole, which costs a small write."""
_CLOSED: Final = Refused("closed", "the log was closed before that was written")


class Writer:
    """See above. `appended` is called after each group, in the writer's thread."""

    def __init__(
        self,
        partition: Partition,
        name: str,
        *,
        appended: Callable[[], object] = lambda: None,
        interval_s: float = limits.SYNC_INTERVAL_S,
        queue_bytes_max: int = limits.WRITER_BYTES_MAX,
    ) -> None:
        self.partition = partition
        self._appended = appended
        self._interval_s = interval_s
        self._queue_bytes_max = queue_bytes_max
        self._queue: deque[tuple[Request | None, Answer]] = deque()
        """With None: something to be done between groups."""
        self._bytes = 0
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._bell = threading.Lock()
        """Released to wake the writer: what `Condition` costs is what a short append takes."""
        self._bell.acquire()
        self._asleep = False
        self._closing = False
        self._unsynced_since: float | None = None
        self._idle_since = time.monotonic()
        self._rested = True
        self._thread = threading.Thread(target=self._work, name=f"mesh log {name}", daemon=True)
        self._thread.start()

    def submit(self, request: Request, answer: Answer, *, patient: bool = True) -> None:
        """Have it written, and be told what became of it. Blocks while too much waits, if
        `patient`: who is not, bounds what it submits by itself."""
        size = _size(request)
        with self._lock:
            while patient and self._bytes > self._queue_bytes_max and not self._closing:
                self._room.wait()
            closing = self._closing
            if not closing:
                self._bytes += size
                self._queue.append((request, answer))
                if self._asleep:
                    self._wake()
        if closing:
            answer(_CLOSED)

    def run(self, action: Callable[[], object]) -> None:
        """Have something done by the writer, between groups: what nobody else may do to the log.
        Not done if it is closing."""
        with self._lock:
            if not self._closing:
                self._queue.append((None, lambda _: action()))
                if self._asleep:
                    self._wake()

    def close(self, timeout: float = 5.0) -> bool:
        """Write what was submitted, close the log, and end. Whether that was done in time."""
        with self._lock:
            self._closing = True
            self._room.notify_all()
            if self._asleep:
                self._wake()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _wake(self) -> None:
        self._asleep = False
        self._bell.release()

    # -- Its thread --------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            group, actions = self._next()
            if group:
                self._write(group)
            for action in actions:
                _call(action, _CLOSED)
            if not group and not actions:
                if self._closing:
                    break
                self._sleep()
        self.partition.close()

    def _next(self) -> tuple[list[tuple[Request, Answer]], list[Answer]]:
        group: list[tuple[Request, Answer]] = []
        size = 0
        with self._lock:
            queue = self._queue
            while queue and size < _GROUP_BYTES_MAX:
                request, answer = queue[0]
                if request is None:
                    if group:
                        break
                    queue.popleft()
                    return [], [answer]
                size += _size(request)
                group.append((request, answer))
                queue.popleft()
            if size:
                self._bytes -= size
                self._room.notify_all()
        return group, []

    def _write(self, group: list[tuple[Request, Answer]]) -> None:
        partition = self.partition
        try:
            outcomes = partition.commit([request for request, _ in group], time.time_ns())
        except Exception:
            logger.exception("appending to a log failed")
            outcomes = [Refused("storage", "the log could not be written")] * len(group)
            partition.mend()
        for (_, answer), outcome in zip(group, outcomes, strict=True):
            _call(answer, outcome)
        self._appended()
        self._idle_since, self._rested = time.monotonic(), False
        if partition.options.durability == "interval" and self._unsynced_since is None:
            self._unsynced_since = self._idle_since
        self._sync_if_due()

    def _sync_if_due(self) -> None:
        since = self._unsynced_since
        if since is not None and time.monotonic() - since >= self._interval_s:
            self._unsynced_since = None
            self.partition.sync()

    def _sleep(self) -> None:
        """Until something is submitted, or is due."""
        now = time.monotonic()
        due = None if self._rested else self._idle_since + _REST_S
        if self._unsynced_since is not None:
            due = min(due or now + _REST_S, self._unsynced_since + self._interval_s)
        with self._lock:
            if self._queue or self._closing:
                return
            self._asleep = True
        timeout = -1 if due is None else max(0.0, due - now)
        if not self._bell.acquire(timeout=timeout):
            with self._lock:
                if self._asleep:
                    self._asleep = False
                else:
                    self._bell.acquire()  # it was released just now
        self._sync_if_due()
        if not self._rested and time.monotonic() - self._idle_since >= _REST_S:
            self._rested = True
            if self.partition.options.durability == "fsync":
                self.partition.rest()


def _size(request: Request | None) -> int:
    return request.header.size if isinstance(request, Batch) else HEADER_BYTES


def _call(answer: Answer, outcome: Outcome) -> None:
    try:
        answer(outcome)
    except Exception:
        logger.exception("telling what became of an append failed")
