"""A thread that waits: for descriptors, for what other threads ask of it, for a moment to come.

It survives whatever is raised by what it does, which is its subclass's business
(`mesh.control_loop`). Nothing in it blocks but the one poll, and every round of it is bounded, so
that whoever floods one source keeps nobody else waiting for long.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from mesh.errors import Closed
from mesh.sockets.sleeping import NAP_S, Waker

logger = logging.getLogger(__name__)

T = TypeVar("T")

_AFTER_ERROR_S = 0.05
"""A fault that repeats must not become a busy loop, nor fill a disk with its log."""


class Loop(ABC):
    """Runs in a daemon thread from `start` until it is to run no longer. Other threads use what
    stands under that heading; what else is public belongs to the loop's own thread."""

    def __init__(self, name: str) -> None:
        self.errors = 0
        """Exceptions that should not have happened; each was logged."""
        self.ended = False
        """Whether nothing runs here any more, nor ever will."""
        self._name = name
        self._running = True
        self._inbox: deque[Callable[[], object]] = deque()
        self._bell = Waker()  # open for as long as anybody can still ring it
        self._poll = select.epoll()
        self._watched: dict[int, Callable[[], object]] = {}
        self._turn = threading.Lock()
        self._runner = 0
        self._thread = threading.Thread(target=self.run, name=f"mesh control {name}", daemon=True)
        self._watch(self._bell.fileno(), self._read_inbox)

    # -- From other threads ------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether the caller is this loop."""
        return self._runner == threading.get_ident()

    @property
    def running(self) -> bool:
        """Whether it has not begun its last steps."""
        return self._running

    def post(self, action: Callable[[], object]) -> None:
        """Have `action` run in the loop, unless that has ended. Takes no lock, so a finalizer may
        call it."""
        if not self.ended:
            self._inbox.append(action)
            self._bell.wake()

    def call(self, action: Callable[[], T], timeout: float) -> T:
        """Run `action` in the loop and return its result. Raises `Closed`."""
        if self.is_current:
            return action()
        answers: SimpleQueue[Callable[[], T]] = SimpleQueue()

        def run() -> None:
            try:
                result = action()
            except Exception as error:  # noqa: BLE001  handed to the thread that asked
                answers.put(lambda error=error: _raise(error))  # type: ignore[misc]
            else:
                answers.put(lambda: result)

        self.post(run)
        deadline = time.monotonic() + timeout
        while True:
            # Looked at first: what was posted before the loop ended has run by then.
            ended = self.ended
            left = deadline - time.monotonic()
            try:
                answer = answers.get(timeout=0 if ended else min(max(left, 0), NAP_S))
            except Empty:
                if ended or left <= 0:
                    raise Closed(f"node {self._name!r} is closing") from None
            else:
                return answer()

    def abandon(self) -> None:
        """In a forked child: there is no thread here, and the descriptors are the parent's."""
        self._running = False
        self._inbox.clear()
        self.ended = True

    # -- The loop ----------------------------------------------------------------------------

    def run(self) -> None:
        """Run to the end. It runs once, in whichever thread comes first: if the thread of its own
        could not be had, whoever made it ends it."""
        if not self._turn.acquire(blocking=False):
            return
        self._runner = threading.get_ident()
        self._guarded(self._begin)
        while self._running:
            errors = self.errors
            self._guarded(self._round)
            if self.errors > errors:
                time.sleep(_AFTER_ERROR_S)
        while self._inbox:
            self._read_inbox()
        self._guarded(self._conclude)
        self._poll.close()
        self.ended = True
        self._runner = 0
        while self._inbox:  # of whoever did not see that yet
            self._read_inbox()
        self._guarded(self._told)

    def _round(self) -> None:
        for fd, _ in self._poll.poll(self._sleep_s()):
            if self._running and (handler := self._watched.get(fd)) is not None:
                self._guarded(handler)
        if self._running:
            self._guarded(self._on_time)

    def _read_inbox(self) -> None:
        """What is there by now. What is posted meanwhile waits for the next round, or two actions
        that post each other would be all that ever runs."""
        self._bell.drain()
        for _ in range(len(self._inbox)):
            self._guarded(self._inbox.popleft())

    def _guarded(self, action: Callable[..., object], *arguments: Any) -> None:
        """The one boundary that must survive anything: without this thread a node is deaf."""
        try:
            action(*arguments)
        except Closed:
            return  # a core was closed while it was being told something
        except Exception:
            self.errors += 1
            logger.exception("node %r: unexpected error in its control thread", self._name)

    # -- Descriptors -------------------------------------------------------------------------

    def _watch(self, fd: int, handler: Callable[[], object]) -> None:
        if fd not in self._watched:
            self._poll.register(fd, select.EPOLLIN)
        self._watched[fd] = handler

    def _unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self._poll.unregister(fd)

    # -- What it does ------------------------------------------------------------------------

    @abstractmethod
    def _begin(self) -> None:
        """Before the first round."""

    @abstractmethod
    def _sleep_s(self) -> float:
        """How long there is nothing to do, in seconds, if nothing comes."""

    @abstractmethod
    def _on_time(self) -> None:
        """At the end of every round."""

    @abstractmethod
    def _conclude(self) -> None:
        """After the last round, before it has ended."""

    @abstractmethod
    def _told(self) -> None:
        """It has ended: tell whoever waits for that."""


def _raise(error: Exception) -> Any:
    raise error
