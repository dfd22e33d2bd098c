"""Large payloads that are lent to libzmq, and how late Python is in freeing them.

A large payload is sent as it is. libzmq says when it needs it no more, which is at once where no
subscriber has room, and pyzmq frees it then: in a thread of Python, which takes the interpreter for
each, and from a thread that publishes without a pause it seldom gets it. On a busy machine 760
payloads of 1 MiB were kept that way, of which the buffer of a reader that did not read had 16; the
queue to that thread has room for 2,000, whatever their size.

So now and then a probe goes that way: once it is freed, so is all that was given back before it.
While it is not, no more than a bound is lent, and the rest is copied, which libzmq frees by itself.
What is given back and not freed is at most twice the bound, and a payload or two. Knows no sockets.
Any thread may use it: of two that count at once, one may not be counted.
"""

from __future__ import annotations

import os
from typing import Final

import zmq

_WAIT_S: Final = 0.001
"""For the probe, once, before anything is copied. Over tcp payloads of 1 MiB are mostly freed late:
with buffers of 16 MiB a quarter was copied, and an eighth less got through. With this wait as much
as ever does."""


class Lending:
    """What was lent since the last probe left."""

    def __init__(self) -> None:
        self._bytes_max = 0
        self._fresh()

    def _fresh(self) -> None:
        self._bytes = 0
        self._probe = zmq.MessageTracker()  # of nothing: it is back
        self._waited = False

    def allow(self, buffer_bytes: int) -> None:
        """What is given back and not freed may be as much as the largest buffer of this process."""
        self._bytes_max = max(self._bytes_max, buffer_bytes // 2)

    def may(self) -> bool:
        """Whether to lend the next one. May wait for a moment."""
        if self._bytes < self._bytes_max // 2:
            return True
        if self._probe.done or (self._bytes >= self._bytes_max and self._comes_back()):
            self._probe = zmq.Frame(b".", track=True, copy=False).tracker  # lent, given back
            self._bytes = 0
            self._waited = False
        return self._bytes < self._bytes_max

    def _comes_back(self) -> bool:
        if self._waited:
            return False
        self._waited = True
        try:
            self._probe.wait(_WAIT_S)
        except zmq.NotDone:
            return False
        return True

    def lent(self, size: int) -> None:
        """A payload of `size` bytes was."""
        self._bytes += size


lending: Final = Lending()
"""pyzmq has one such thread for a process. A forked child gets another, which knows of no probe."""
os.register_at_fork(after_in_child=lending._fresh)
