"""A sidecar in one thread: nothing happens but what was asked for, when it is its turn, and time
passes when it is told to. So it does the same each time, and can be ended at each place of it."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from unittest.mock import patch

from mesh.durable.outcomes import Refused
from mesh.durable.partition import Partition
from mesh.durable.writer import Writer

Action = Callable[[], object]
_CLOSED = Refused("closed", "the log was closed before that was written")

SMALL = {
    "mesh.durable.supply._TELL_BYTES": 300,
    "mesh.limits.DELIVERY_BYTES": 500,
    "mesh.durable.batch_cache._KEPT_BYTES": 400,
    "mesh.durable.batch_cache._AGAIN_BYTES": 200,
    "mesh.durable.journal._GROWN_BYTES": 300,
}
"""So that the bounds are met."""


class Turns:
    """The clerk of a sidecar, its clock, and whose turn it is."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s
        self.set_back_s = 0.0
        """How far the wall clock is behind that."""
        self.writers: list[TurnWriter] = []
        self._inbox: deque[Action] = deque()
        self._due: list[tuple[float, int, Action]] = []
        self._numbers = count()
        self._opened: list[str] = []
        """Right now, each by the one before."""
        self._every: list[Action] = []

    def monotonic(self) -> float:
        return self.now_s

    def time_ns(self) -> int:
        return round((self.now_s - self.set_back_s) * 1e9)

    def start(self, name: str, work: Action) -> bool:
        """Open a stream of that name; but not where that has just failed, as the process ends."""
        if name not in self._opened:
            self._opened.append(name)
            try:
                work()
            finally:
                self._opened.pop()
        return True

    def run(self, action: Action, otherwise: Action | None = None) -> None:
        self._inbox.append(action)

    def at(self, when: float, action: Action) -> None:
        heapq.heappush(self._due, (when, next(self._numbers), action))

    def every(self, interval_s: float, action: Action) -> None:
        self._every.append(action)

    def close(self, timeout: float | None = 0.0) -> bool:
        self.go()
        return True

    def go(self) -> None:
        """Everybody does what there is to do."""
        while any([writer.turn() for writer in self.writers]) or self._inbox:
            if self._inbox:
                self._inbox.popleft()()

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        while self._due and self._due[0][0] <= self.now_s:
            self.run(heapq.heappop(self._due)[2])
        self.go()

    def tick(self) -> None:
        self.wait(1.0)
        for action in self._every:
            self.run(action)
        self.go()


class TurnWriter(Writer):
    """Its thread ends at once, and others do its work."""

    def __init__(self, turns: Turns, partition: Partition, name: str, appended: Action) -> None:
        super().__init__(partition, name, appended=appended)
        self._thread.join()
        self._turns = turns
        turns.writers.append(self)

    def _work(self) -> None:
        pass

    def turn(self) -> bool:
        """Whether there was something to do."""
        group, actions = self._next()
        if group:
            self._write(group)
        for action in actions:
            action(_CLOSED)
        self._sync_if_due()
        return bool(group or actions)

    def close(self, timeout: float | None = 0.0) -> bool:
        super().close(0.0)
        if timeout != 0:
            while self.turn():
                pass
            self._turns.writers.remove(self)
            self.partition.close()
        return True


@contextmanager
def in_one_thread(now_s: float) -> Iterator[Turns]:
    """For sidecars that are made inside."""
    turns = Turns(now_s)

    def writer(partition: Partition, name: str, *, appended: Action) -> TurnWriter:
        return TurnWriter(turns, partition, name, appended)

    with ExitStack() as stack:
        stack.enter_context(patch("mesh.durable.sidecar.Clerk", lambda name: turns))
        stack.enter_context(patch("mesh.durable.hosted.Writer", writer))
        stack.enter_context(patch("mesh.durable.openings._start", turns.start))
        for module in ("sidecar", "hosted", "writer"):
            stack.enter_context(patch(f"mesh.durable.{module}.time", turns))
        for name, value in SMALL.items():
            stack.enter_context(patch(name, value))
        yield turns
