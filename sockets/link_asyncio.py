"""How an event loop waits on a link: it watches the link's descriptor itself, no thread between.

One `LoopWaiter` stands for all coroutines of one loop on one link. It goes on watching when none of
them waits any more, until the loop is woken for nothing or the link is closed: to begin and end
that with every wait would cost more than the wait. It has one timer for all of their deadlines.
Imported when first needed, so that blocking programs never import asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mesh.errors import Closed, Timeout
from mesh.timeouts import within

if TYPE_CHECKING:
    from mesh.sockets.link import Link, Slot

T = TypeVar("T")

CancelledError = asyncio.CancelledError
running_loop = asyncio.get_running_loop
_running_loop_if_any = asyncio._get_running_loop
_current_task = asyncio.current_task


def loop_waiter(link: Link, loop: asyncio.AbstractEventLoop) -> LoopWaiter:
    """A waiter of `loop` on `link`, which has none yet. Under the lock."""
    link.has_loops()  # those that are closed make room
    waiter = link.loops[loop] = LoopWaiter(link, loop)
    return waiter


class Wait(Generic[T]):
    """One coroutine that waits."""

    __slots__ = ("_of", "attempt", "deadline", "future", "retry_s", "slot", "timeout", "what")

    def __init__(
        self,
        of: LoopWaiter,
        future: asyncio.Future[T],
        attempt: Callable[[], T | None],
        timeout: float | None,
        what: str,
        slot: Slot | None,
        retry_s: float | None,
    ) -> None:
        self._of = of
        self.future = future
        self.attempt = attempt
        self.timeout = timeout
        self.deadline = math.inf
        self.what = what
        self.slot = slot
        self.retry_s = retry_s

    def wake(self) -> None:
        self._of.wake()

    def hand(self, result: T) -> None:
        """Under the lock, from any thread."""
        if self._of.runs():
            self._of.settle(self, result)
        else:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
                self._of.loop.call_soon_threadsafe(self._handed, result)

    def _handed(self, result: T) -> None:
        with self._of.link.lock:
            self._of.settle(self, result)


class LoopWaiter:
    """The coroutines of one event loop that wait on one link.

    Used by the loop's own thread alone, but for `wake`. All under the link's lock, but for what the
    loop calls.
    """

    def __init__(self, link: Link, loop: asyncio.AbstractEventLoop) -> None:
        self.link = link
        self.loop = loop
        self._calls: dict[asyncio.Future[Any], Wait[Any]] = {}
        self._watching = False
        self._asked = False
        self._trying = False
        self._retry: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    # -- From coroutines ---------------------------------------------------------------------

    def begin(
        self,
        attempt: Callable[[], T | None],
        timeout: float | None,
        what: str,
        slot: Slot | None,
        retry_s: float | None,
    ) -> Wait[T]:
        """Wait, after a first attempt. Under the lock still: nothing that anybody took notice of
        can have come since."""
        future: asyncio.Future[T] = self.loop.create_future()
        wait = Wait(self, future, attempt, timeout, what, slot, retry_s)
        if not self._calls:
            self.link.join(self)
            if not self._watching:
                self._watching = True
                self.loop.add_reader(self.link.fileno(), self._readable)
        self._calls[future] = wait
        if slot is not None:
            slot.waiter = wait
        if timeout is not None:
            wait.deadline = deadline = self.loop.time() + timeout
            if deadline < self._timer_at:
                self._set_timer(deadline)
        if retry_s is not None and self._retry is None:
            self._retry = self.loop.call_later(retry_s, self._look_again)
        return wait

    def end(self, wait: Wait[Any], give_back: Callable[[Any], None]) -> None:
        """It was cancelled. What it was about to return goes to `give_back`."""
        future = wait.future
        with self.link.lock:
            self._forget(wait)
        if future.done() and not future.cancelled() and future.exception() is None:
            with contextlib.suppress(Closed):  # then there is nobody to give it to
                self.link.run(lambda: give_back(future.result()))

    # -- From whoever has the lock -----------------------------------------------------------

    def runs(self) -> bool:
        """Whether this is its loop's thread, and the loop not asleep: where it is, a signal handler
        may be what runs, and what that leaves for later does not wake it."""
        if _running_loop_if_any() is not self.loop:
            return False
        return self._trying or _current_task(self.loop) is not None

    def wake(self) -> None:
        """Have all attempt. From any thread."""
        if self._asked:
            return
        try:
            if self.runs():
                self.loop.call_soon(self._look)
            else:
                self.loop.call_soon_threadsafe(self._look)
            self._asked = True
        except RuntimeError:  # the loop was closed under its coroutines: nobody is left to wake
            self.link.leave(self)

    def settle(self, wait: Wait[T], result: T) -> None:
        """In the loop's thread."""
        if not wait.future.done():
            wait.future.set_result(result)
        self._forget(wait)

    def _forget(self, wait: Wait[Any]) -> None:
        if self._calls.pop(wait.future, None) is None:
            return
        if wait.slot is not None:
            wait.slot.waiter = None
        if not self._calls:
            if self._retry is not None:
                self._retry.cancel()
                self._retry = None
            self.link.leave(self)

    # -- From the loop -----------------------------------------------------------------------

    def _readable(self) -> None:
        """A socket has something."""
        link = self.link
        with link.lock:
            if not self._calls or link.closed:
                self._leave_off()
                return
            link.rang = True
            self._try_all()
            link.rang = False

    def _look(self) -> None:
        """Somebody woke it."""
        link = self.link
        with link.lock:
            self._asked = False
            self._try_all()
            if link.closed:
                self._leave_off()
        if self._calls and self._retry is None:
            retries = [each.retry_s for each in self._calls.values() if each.retry_s is not None]
            if retries:
                self._retry = self.loop.call_later(min(retries), self._look_again)

    def _look_again(self) -> None:
        self._retry = None
        self._look()

    def _try_all(self) -> None:
        """Let every wait attempt, in the order in which they came; but a wait with a slot is handed
        what comes for it, so once one of them has read all there is the others need not."""
        self.link.attempts += 1
        emptied = False
        self._trying = True
        try:
            for wait in list(self._calls.values()):
                if not (emptied and wait.slot is not None) and not wait.future.done():
                    emptied = not self._try(wait)
            if self._calls and not emptied:
                self.link.pass_on(False)
        finally:
            self._trying = False

    def _try(self, wait: Wait[Any]) -> bool:
        """Whether it has its outcome."""
        try:
            self.link.check_open()
            result = wait.attempt()
        except Exception as error:  # noqa: BLE001  it belongs to the coroutine that waits
            wait.future.set_exception(error)
            self._forget(wait)
            return True
        if result is None:
            return False
        self.settle(wait, result)
        return True

    def _leave_off(self) -> None:
        """Nobody waits, or nothing will come any more."""
        if self._watching:
            self._watching = False
            self.loop.remove_reader(self.link.fileno())
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._timer_at = None, math.inf

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self.loop.call_at(at, self._expire)

    def _expire(self) -> None:
        self._timer, self._timer_at = None, math.inf
        now = self.loop.time()
        with self.link.lock:
            for wait in list(self._calls.values()):
                if wait.deadline <= now:
                    if not wait.future.done():
                        text = f"no {wait.what} {within(wait.timeout)}"
                        wait.future.set_exception(Timeout(text))
                    self._forget(wait)
        if self._calls:
            first = min(wait.deadline for wait in self._calls.values())
            if first < math.inf:
                self._set_timer(first)
