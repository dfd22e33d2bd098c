"""What uses a log: one process that appends and reads, whoever's log it is and wherever it is kept.

Nothing here counts as appended before it is on the disk, as acknowledged before the log was told.
What each block appended or acknowledged is asked of the log itself afterwards, out of its time.
"""

from __future__ import annotations

import contextlib
import time
from abc import abstractmethod
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

from bench.roles import Role, Stalled, at_most


class Log(Role):
    """Is opened, or connected to, by `connect`. Nobody is asked for what he does not have."""

    @abstractmethod
    def stored(self) -> int:
        """How many records the log holds."""

    def append(self, payload: bytes) -> object:
        """Return once it is on the disk."""
        raise NotImplementedError

    def append_all(self, payloads: Iterator[bytes], count: int) -> object:
        """As fast as it goes: return once all of them, which are `count`, are on the disk."""
        raise NotImplementedError

    def read(self, count: int, progress: list[int]) -> object:
        """The first `count` payloads. `progress` is as in `Receiver.take`."""
        raise NotImplementedError

    def consume(self, count: int, progress: list[int]) -> object:
        """The next `count` payloads as the one member of a group, each acknowledged by a call of
        its own; return once these have left."""
        raise NotImplementedError

    def acknowledged(self, count: int) -> int:
        """How many records the group has acknowledged, so far or when they are `count`."""
        raise NotImplementedError

    def payloads(self, count: int) -> Iterator[bytes]:
        return islice(cycle(self.setting.payloads()), count)

    def latencies(self, count: int) -> list[float]:
        """What each of `count` appends took, one after the other, in seconds."""
        clock, append, took = time.perf_counter, self.append, []
        for payload in self.payloads(count):
            start = clock()
            append(payload)
            took.append(clock() - start)
        return took

    def do_append(self, count: int, seconds: float) -> dict[str, Any]:
        with at_most(seconds):
            took = self.latencies(count)
        return {"latencies": took, "stored": self.stored()}

    def do_append_all(self, count: int, seconds: float) -> dict[str, Any]:
        with at_most(seconds):
            start = time.perf_counter()
            self.append_all(self.payloads(count), count)
            elapsed = time.perf_counter() - start
        return {"elapsed": elapsed, "stored": self.stored()}

    def do_read(self, count: int, seconds: float) -> dict[str, Any]:
        progress = [0, 0]
        start = time.perf_counter()
        with contextlib.suppress(Stalled), at_most(seconds):
            self.read(count, progress)
        elapsed = time.perf_counter() - start
        return {"elapsed": elapsed, "count": progress[0], "total": progress[1]}

    def do_consume(self, count: int, seconds: float, all_in_all: int) -> dict[str, Any]:
        progress = [0, 0]
        start = time.perf_counter()
        with contextlib.suppress(Stalled), at_most(seconds):
            self.consume(count, progress)
        elapsed = time.perf_counter() - start
        acknowledged = self.acknowledged(all_in_all)
        return {"elapsed": elapsed, "total": progress[1], "acknowledged": acknowledged}
