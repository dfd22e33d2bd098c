"""What users hold: a handle is a thin object over a core, which ends with its last handle (a
node's topics with the node).

The calls that are made for each message (`send`, `recv`) take their options by position as well as
by name: CPython 3.11 enters a function with keyword-only ones the long way, which took longer than
all that the call does (300 ns against 150).

A handle that is forgotten is given back when it is collected. That may happen anywhere, even inside
a locked region, so `release` must not lock or block: the node puts it in its control thread's
inbox. A handle keeps its node alive.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from mesh.errors import Closed
from mesh.sockets.codec import Headers

T = TypeVar("T")


class Handle:
    """``with`` and ``async with`` close it; so does losing it."""

    def __init__(self, what: str, owner: object, release: Callable[[], None]) -> None:
        self._what = what  # it is called in errors: ``pusher 'jobs'``
        self._owner = owner
        self._release = weakref.finalize(self, release)
        self._release.atexit = False

    @property
    def closed(self) -> bool:
        """Whether it was given back."""
        return not self._release.alive

    def close(self) -> None:
        """Give the handle back; whoever waits on it gets `Closed`. Does not block; idempotent."""
        self._release()

    def __repr__(self) -> str:
        return f"<{self._what}{' closed' if self.closed else ''}>"

    def _check_open(self) -> None:
        if self.closed:
            raise Closed(f"{self._what} is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


class Sending(Handle, ABC):
    """A handle to send by."""

    @abstractmethod
    def send(
        self, payload: Any, headers: Headers | None = None, timeout: float | None = None
    ) -> None:
        """Send one, blocking up to `timeout` seconds (None: for ever, 0: not at all)."""

    @abstractmethod
    async def asend(
        self, payload: Any, headers: Headers | None = None, timeout: float | None = None
    ) -> None:
        """`send` for asyncio."""

    def send_many(self, payloads: Iterable[Any], *, timeout: float | None = None) -> int:
        """Send each of `payloads` in order; returns how many. `timeout` is for each of them.

        An error ends it where it occurred: what came before was sent.
        """
        count = 0
        for payload in payloads:
            self.send(payload, timeout=timeout)
            count += 1
        return count

    async def asend_many(self, payloads: Iterable[Any], *, timeout: float | None = None) -> int:
        """`send_many` for asyncio."""
        count = 0
        for payload in payloads:
            await self.asend(payload, timeout=timeout)
            count += 1
        return count


class Receiving(Handle, ABC, Generic[T]):
    """A handle to iterate over: until it is closed."""

    @abstractmethod
    def recv(self, timeout: float | None = None) -> T:
        """The next one, blocking up to `timeout` seconds (None: for ever, 0: not at all)."""

    @abstractmethod
    async def arecv(self, timeout: float | None = None) -> T:
        """`recv` for asyncio."""

    def __iter__(self) -> Iterator[T]:
        while True:
            try:
                item = self.recv()
            except Closed:
                return
            yield item

    async def __aiter__(self) -> AsyncIterator[T]:
        while True:
            try:
                item = await self.arecv()
            except Closed:
                return
            yield item
