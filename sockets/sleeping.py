"""How a thread sleeps: on a descriptor of its own, by which others wake it, and a link's besides.

Each thread has one `Sleeper` for all its waits. Knows neither links nor ZeroMQ.
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections.abc import Callable

NAP_S = 0.5
"""Longest sleep of a thread, waking for nothing but Python's own sake: a signal that comes just
before the call that sleeps is noticed only after it (Ctrl-C would be lost until the next one)."""
_NAP_MS = int(NAP_S * 1000)


class Waker:
    """A descriptor that a sleeping thread watches. One for each thread, for all its waits."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def wake(self) -> None:
        os.eventfd_write(self._fd, 1)

    def drain(self) -> None:
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return  # nobody woke us

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self._fd)  # `os` may be gone by the time the program ends


class Sleeper:
    """One thread, as those see it who wake it."""

    def __init__(self) -> None:
        self.busy = False
        """Whether it is in a wait: a signal handler may begin another in the midst of it."""
        self.result: object = None
        """What it waits for, if somebody handed it that."""
        self._waker = Waker()
        self.wake = self._waker.wake
        """From any thread."""
        self._own_fd = self._waker.fileno()
        self._alone = select.poll()
        self._alone.register(self._own_fd, select.POLLIN)
        self._also = self._alone
        """Of `_also_serial`. No more than a list of numbers, which the kernel is given each time:
        one may have been closed since."""
        self._also_serial = 0

    def hand(self, result: object) -> None:
        """Wake it with what it waits for."""
        self.result = result
        self.wake()

    def sleep(self, fd: int, serial: int, timeout: float) -> bool:
        """Until woken, until `fd` is readable (-1: there is none), or for `timeout` seconds; says
        whether `fd` was readable. `serial`, over 0, tells it from others that had the same number.
        """
        if fd < 0:
            poll = self._alone.poll
        else:
            if serial != self._also_serial:
                self._watch(fd, serial)
            poll = self._also.poll
        nap_ms = _NAP_MS if timeout >= NAP_S else math.ceil(timeout * 1000)
        fired = poll(nap_ms)
        if not fired:
            until = time.monotonic() + timeout - nap_ms / 1000
            while not fired and self.result is None:
                left_s = until - time.monotonic()
                if left_s <= 0:
                    return False
                fired = poll(_NAP_MS if left_s >= NAP_S else math.ceil(left_s * 1000))
        if len(fired) == 1 and fired[0][0] == fd:
            return True
        self._waker.drain()
        return len(fired) > 1

    def _watch(self, fd: int, serial: int) -> None:
        poll = select.poll()
        poll.register(self._own_fd, select.POLLIN)
        poll.register(fd, select.POLLIN)
        self._also, self._also_serial = poll, serial


class _Own(threading.local):
    def __init__(self) -> None:
        self.sleeper = Sleeper()


own = _Own()
"""``own.sleeper`` is the calling thread's."""


def _fresh() -> None:
    """A forked child shares its parent's descriptors: a wake-up meant for one would reach both."""
    own.__dict__["sleeper"] = Sleeper()


os.register_at_fork(after_in_child=_fresh)
