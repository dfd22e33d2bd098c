"""A moment's wait inside ZeroMQ, holding the lock of a link that nobody else is about to use.

Who exchanges one small message after another waits mostly for less than it takes to sleep on
descriptors and to be woken: two system calls more, and above all a good deal of code that no cache
holds just after a wake-up. So for a moment, which is short enough for others to wait for the lock,
it blocks in `recv`. It does so only while that pays: where the last exchange was that quick, and no
other thread has come upon the lock lately. Why: docs/decisions/009.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from threading import get_ident
from typing import Final

MOMENT_MS: Final = 1
MOMENT_S: Final = MOMENT_MS / 1000
PATIENT_S: Final = 10 * MOMENT_S
"""Who waits no longer than this does not wait so: it might come too late for its own deadline."""
IN_A_ROW: Final = 100
"""Then all that allows it is looked at again."""
CALM_S: Final = 0.1
"""After two threads met at a lock neither waits with it held for so long."""

_HANDLED: Final = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGTERM,
    signal.SIGCHLD,
)
"""Signals that programs handle. To ask for all there are takes 0.1 ms."""
_main = threading.main_thread().ident


def _forked() -> None:
    global _main
    _main = get_ident()


os.register_at_fork(after_in_child=_forked)


def may_hold() -> bool:
    """Whether this thread may wait so. The main thread may not where the program handles signals: a
    handler runs in the midst of that wait, and may itself wait for one that waits for the lock.
    Ctrl-C raises, which releases it."""
    if get_ident() != _main:
        return True
    for number in _HANDLED:
        handler = signal.getsignal(number)
        if callable(handler) and handler is not signal.default_int_handler:
            return False
    return True


class Pace:
    """Whether things follow each other so closely that who awaits the next may wait so."""

    __slots__ = ("_at", "_left", "_thread")

    def __init__(self) -> None:
        self._left = 0
        self._thread = 0
        self._at = -math.inf

    def allows(self) -> bool:
        """In this thread, now. Needs no lock: who goes by it looks with the lock whether that may
        be held."""
        return self._left > 0 and get_ident() == self._thread

    def slow(self) -> None:
        """It did not come within a moment."""
        self._left = 0

    def came(self, met_at: float) -> None:
        """It came, awaited in this thread. `met_at`: when others were last about."""
        now = time.monotonic()
        quick, self._at = now - self._at < MOMENT_S, now
        if not quick or now - met_at < CALM_S:
            self._left = 0
        elif self._left > 0:
            self._left -= 1
        elif may_hold():
            self._left, self._thread = IN_A_ROW, get_ident()
