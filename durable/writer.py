"""The one thread that writes a partition: all that waits is written and synced together.

Guarantee: everything submitted is answered once, in the order in which it came; what is answered
with a receipt is as safe as the stream's durability says. While one group is being synced the next
one gathers, so that a disk that takes 1 ms for a sync carries thousands of appends in that time.
Whoever submits waits while too much waits already: a full queue slows producers down instead of
growing. Where nothing else is under way and the disk is quick, who submitted may write in the
writer's stead (`submit` with `lone`): a hop to another thread takes as long as such a disk.
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
from mesh.durable.outcomes import Code, Outcome, Refused
from mesh.durable.partition import Partition, Request

logger = logging.getLogger(__name__)

Answer = Callable[[Outcome], object]
"""Called in the writer's thread: to be quick, and to raise nothing."""
_GROUP_BYTES_MAX: Final = 8 * 1024 * 1024
"""Written and synced at one time: some 10 ms of a slow disk, so that nobody waits for much more."""
_QUICK_S: Final = 0.001
"""A disk that takes no longer is quick: nobody minds who stands in for the writer meanwhile."""
_REST_S: Final = 1.0
"""After so long without an append the log is marked as whole, which costs a small write."""
_CLOSED: Final = Refused("closed", "the log was closed before that was written")


class Writer:
    """See above. `appended` is called after each group, and after a cut, in the writer's thread."""

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
        self._turn = threading.Lock()
        """Held by whoever writes right now. Taken before `_lock`."""
        self._took_s = 0.0
        """How long writing the last group took."""
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

    def submit(
        self, request: Request, answer: Answer, *, patient: bool = True, lone: bool = False
    ) -> Callable[[], None] | None:
        """Have it written, and be told what became of it. Blocks while too much waits, if
        `patient`: who is not, bounds what it submits by itself. `lone`: the caller is about to
        submit nothing else. Then a function may be returned, which the caller has to call: it
        writes the request in the caller's thread, or leaves that to the writer."""
        size = _size(request)
        with self._lock:
            while patient and self._bytes > self._queue_bytes_max and not self._closing:
                self._room.wait()
            closing = self._closing
            if not closing:
                self._bytes += size
                self._queue.append((request, answer))
                if self._asleep:
                    if lone and len(self._queue) == 1 and self._may_stand_in:
                        return self._stand_in
                    self._wake()
        if closing:
            answer(_CLOSED)
        return None

    @property
    def _may_stand_in(self) -> bool:
        return self._took_s < _QUICK_S and self.partition.options.durability != "interval"

    def run(self, action: Callable[[], object]) -> None:
        """Have something done by the writer, between groups: what nobody else may do to the log.
        Not done if it is closing."""
        with self._lock:
            if not self._closing:
                self._queue.append((None, lambda _: action()))
                if self._asleep:
                    self._wake()

    def tick(self) -> None:
        """To be called about every second. Does not block."""
        with self._lock:
            if self._queue and self._asleep:  # who was to stand in has died before that
                self._wake()
        if not self._rested and time.monotonic() - self._idle_since >= _REST_S:
            self._rested = True
            if self.partition.options.durability == "fsync":
                self.run(self.partition.rest)

    def close(self, timeout: float | None = 5.0) -> bool:
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

    # -- In the thread of whoever submitted --------------------------------------------------

    def _stand_in(self) -> None:
        """Write what was submitted last, unless the writer is about to."""
        with self._turn:
            with self._lock:
                if not (self._asleep and len(self._queue) == 1) or self._closing:
                    return
                request, answer = self._queue[0]
            assert request is not None
            try:
                self._write([(request, answer)])
            finally:
                with self._lock:
                    self._queue.popleft()
                    self._bytes -= _size(request)
                    self._room.notify_all()

    # -- Its thread --------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._turn:
                group, actions = self._next()
                if group:
                    self._write(group)
                for action in actions:
                    _call(action, _CLOSED)
                if not group and not actions and self._closing:
                    break
            if not group and not actions:
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
        began = time.monotonic()
        try:
            outcomes = partition.commit([request for request, _ in group], time.time_ns())
        except Exception:
            logger.exception("appending to a log failed")
            code: Code = "storage" if partition.mend() else "unsure"
            outcomes = [Refused(code, "the log could not be written")] * len(group)
        for (_, answer), outcome in zip(group, outcomes, strict=True):
            _call(answer, outcome)
        self._appended()
        self._idle_since, self._rested = time.monotonic(), False
        self._took_s = self._idle_since - began
        if partition.options.durability == "interval" and self._unsynced_since is None:
            self._unsynced_since = self._idle_since
        self._sync_if_due()

    def _sync_if_due(self) -> None:
        since = self._unsynced_since
        if since is not None and time.monotonic() - since >= self._interval_s:
            self._unsynced_since = None
            if not self.partition.sync():
                self._appended()  # who waits behind what was cut off is to be told

    def _sleep(self) -> None:
        """Until something is submitted, or is due."""
        timeout = -1.0
        if self._unsynced_since is not None:
            timeout = max(0.0, self._unsynced_since + self._interval_s - time.monotonic())
        with self._lock:
            if self._queue or self._closing:
                return
            self._asleep = True
        if not self._bell.acquire(timeout=timeout):
            with self._lock:
                if self._asleep:
                    self._asleep = False
                else:
                    self._bell.acquire()  # it was released just now
        with self._turn:
            self._sync_if_due()


def _size(request: Request | None) -> int:
    return request.header.size if isinstance(request, Batch) else HEADER_BYTES


def _call(answer: Answer, outcome: Outcome) -> None:
    try:
        answer(outcome)
    except Exception:
        logger.exception("telling what became of an append failed")
