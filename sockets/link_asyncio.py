"""How an event loop waits on a link: it watches the link's descriptor itself, no thread between.

One `LoopWaiter` stands for all coroutines of one loop on one link.
Imported when first needed, so that blocking programs never import asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mesh.errors import Closed, Timeout

if TYPE_CHECKING:
    from mesh.sockets.link import Link, Slot

T = TypeVar("T")


def loop_waiter(link: Link) -> LoopWaiter:
    """The running loop's waiter on `link`."""
    loop = asyncio.get_running_loop()
    with link.lock:
        link.check_open()
        for old in [each for each in link.loops if each.is_closed()]:
            del link.loops[old]
        waiter = link.loops.get(loop)
        if waiter is None:
            waiter = link.loops[loop] = LoopWaiter(link, loop)
        return waiter


@dataclass(frozen=True, slots=True)
class _Call(Generic[T]):
    attempt: Callable[[], T | None]
    retry_s: float | None


class LoopWaiter:
    """The coroutines of one event loop that wait on one link.

    Used by the loop's own thread alone, but for `wake`, which comes under the link's lock.
    """

    def __init__(self, link: Link, loop: asyncio.AbstractEventLoop) -> None:
        self._link = link
        self._loop = loop
        self._calls: dict[asyncio.Future[Any], _Call[Any]] = {}
        self._retry: asyncio.TimerHandle | None = None
        self._asked = False

    async def wait(
        self,
        attempt: Callable[[], T | None],
        timeout: float | None,
        what: str,
        *,
        give_back: Callable[[T], None],
        slot: Slot | None,
        retry_s: float | None,
    ) -> T:
        future: asyncio.Future[T] = self._loop.create_future()
        if not self._calls:
            self._watch()
        self._calls[future] = call = _Call(attempt, retry_s)
        if slot is not None:
            slot.waiter = self
        expiry = None
        if timeout is not None:
            expiry = self._loop.call_later(timeout, _expire, future, what, timeout)
        if retry_s is not None and self._retry is None:
            self._retry = self._loop.call_later(retry_s, self._look_again)
        try:
            # What came since the first attempt. For this call alone: with all of them n calls that
            # begin one after another would cost n² attempts.
            self._link.run(partial(self._try, future, call))
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                result = future.result()
                with contextlib.suppress(Closed):  # then there is nobody to give it to
                    self._link.run(lambda: give_back(result))
            raise
        finally:
            if expiry is not None:
                expiry.cancel()
            if slot is not None:
                slot.waiter = None
            if self._calls.pop(future, None) is not None and not self._calls:
                self._unwatch()
            # It may hold an error, whose traceback holds this frame: a circle around the link.
            del future

    def wake(self) -> None:
        if self._asked:
            return
        self._asked = True
        try:
            self._loop.call_soon_threadsafe(self._look)
        except RuntimeError:  # the loop was closed under its coroutines: nobody is left to wake
            self._link.leave(self)

    def _watch(self) -> None:
        with self._link.lock:
            self._link.check_open()
            self._link.join(self)
            self._loop.add_reader(self._link.fileno(), self._look)

    def _unwatch(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        with self._link.lock:
            self._loop.remove_reader(self._link.fileno())
            self._link.leave(self)

    def _look(self) -> None:
        """Let every waiting call attempt, in the order in which they came."""
        with self._link.lock:
            self._asked = False
            if not self._calls:
                return
            self._link.attempts += 1
            for future, call in list(self._calls.items()):
                if not future.done():
                    self._try(future, call)
                if future.done():
                    del self._calls[future]
        if not self._calls:
            self._unwatch()
        elif self._retry is None:
            retries = [call.retry_s for call in self._calls.values() if call.retry_s is not None]
            if retries:
                self._retry = self._loop.call_later(min(retries), self._look_again)

    def _look_again(self) -> None:
        self._retry = None
        self._look()

    def _try(self, future: asyncio.Future[Any], call: _Call[Any]) -> None:
        try:
            self._link.check_open()
            result = call.attempt()
        except Exception as error:  # noqa: BLE001  it belongs to the coroutine that waits
            future.set_exception(error)
        else:
            if result is not None:
                future.set_result(result)


def _expire(future: asyncio.Future[Any], what: str, timeout: float) -> None:
    if not future.done():
        future.set_exception(Timeout(f"no {what} within {timeout:g} s"))
