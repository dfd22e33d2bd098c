"""Requests a server holds: which may start, which wait, and which never will.

No I/O and no clock: `now` is given, in seconds that only grow. A request's remaining time counts
from its arrival, since the two sides' clocks have nothing to do with each other.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Hashable
from typing import Generic, TypeVar

from mesh.sockets.frame import FOR_EVER, Frame

C = TypeVar("C", bound=Hashable)


class Verdict(enum.Enum):
    WAIT = enum.auto()
    BUSY = enum.auto()
    EXPIRED = enum.auto()
    REPEATED = enum.auto()


class Request(Generic[C]):
    """A request as it arrived."""

    __slots__ = ("arrived", "caller", "charged", "expires", "message", "seq")

    def __init__(
        self, caller: C, seq: int, remaining: int, message: bytes | Frame, now: float
    ) -> None:
        self.caller = caller
        self.seq = seq
        """With the caller, unique as long as it waits."""
        self.message = message
        """Not yet decoded: see `mesh.sockets.single`."""
        self.charged = 0
        """The bytes it counts for in a backlog."""
        self.arrived = now
        self.expires = math.inf if remaining == FOR_EVER else now + remaining / 1000

    @property
    def size(self) -> int:
        """Bytes of payload and headers, as they came."""
        message = self.message
        return message.size if isinstance(message, Frame) else len(message)


class Backlog(Generic[C]):
    """At most `concurrency` requests run, at most `places` more wait, in the order of arrival, and
    what waits has no more than `bytes_max` bytes. One that need not wait may have more."""

    def __init__(self, concurrency: int, places: int, bytes_max: int) -> None:
        self.running = 0
        self._concurrency = concurrency
        self._places = places
        self._bytes_max = bytes_max
        self._waiting_bytes = 0
        """Of those that wait."""
        self._waiting: dict[tuple[C, int], Request[C]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def arrive(self, request: Request[C]) -> Verdict:
        """What is to become of a new request."""
        if request.arrived >= request.expires:
            return Verdict.EXPIRED
        key = request.caller, request.seq
        waiting = self._waiting
        if key in waiting:
            return Verdict.REPEATED
        ahead = self.running + len(waiting) - self._concurrency
        size = request.size if ahead >= 0 else 0  # it need not wait
        if ahead >= self._places or self._waiting_bytes + size > self._bytes_max:
            return Verdict.BUSY
        waiting[key] = request
        request.charged = size
        self._waiting_bytes += size
        return Verdict.WAIT

    def start_at_once(self) -> bool:
        """Count one that has just come as running, unless it has to wait: the same as to `arrive`
        and `start`, for one whose time is not over."""
        if self._waiting or self.running >= self._concurrency:
            return False
        self.running += 1
        return True

    def can_start(self) -> bool:
        """Whether one waits that may run."""
        return bool(self._waiting) and self.running < self._concurrency

    def start(self, now: float) -> tuple[Request[C] | None, list[Request[C]]]:
        """The next to run, if one waits and may run; and those before it that have expired."""
        expired: list[Request[C]] = []
        waiting = self._waiting
        while waiting and self.running < self._concurrency:
            request = self._take(next(iter(waiting)))
            if now < request.expires:
                self.running += 1
                return request, expired
            expired.append(request)
        return None, expired

    def done(self) -> None:
        """One that was started has ended."""
        self.running -= 1

    def cancel(self, caller: C, seq: int) -> Request[C] | None:
        """Take out a request whose caller gave up; None if it does not wait here."""
        key = caller, seq
        return self._take(key) if key in self._waiting else None

    def expire(self, now: float) -> list[Request[C]]:
        """Take out those whose callers wait no longer."""
        expired = [request for request in self._waiting.values() if now >= request.expires]
        for request in expired:
            self._take((request.caller, request.seq))
        return expired

    def clear(self) -> list[Request[C]]:
        """Take out all that wait."""
        waiting = list(self._waiting.values())
        self._waiting.clear()
        self._waiting_bytes = 0
        return waiting

    def _take(self, key: tuple[C, int]) -> Request[C]:
        request = self._waiting.pop(key)
        self._waiting_bytes -= request.charged
        return request
