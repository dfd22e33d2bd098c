"""Pushing tasks to a queue.

Guarantee: each task goes to exactly one worker, at most once, in this node's order for each worker.
The sender waits while no worker has room, then gets `Timeout`, and nothing was sent; a worker that
is full holds up none of the others. A worker that goes away takes at most its `prefetch` with it,
and that many are counted in `Pusher.lost` and told to the `on_loss` hook.

The handle; what it works on is in `mesh.sockets.dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import msgspec

from mesh import limits
from mesh.errors import Timeout
from mesh.message import TasksLost
from mesh.options import check_count, check_timeout
from mesh.sockets import codec
from mesh.sockets.batch import Batch
from mesh.sockets.dispatch import Dispatch
from mesh.sockets.handle import Sending
from mesh.sockets.outgoing import encode_message


class Pusher(Sending):
    """A handle to a queue, from `Node.pusher`. Safe from several threads."""

    def __init__(self, core: Dispatch, owner: object, release: Callable[[], None]) -> None:
        self._key = key = object()

        def give_back() -> None:
            core.loss_hooks.pop(key, None)
            release()

        super().__init__(core.link.what, owner, give_back)
        self._core = core
        self._batch = core.batch
        """The queue's, or once this handle is closed one that is shut."""

    @property
    def channel(self) -> str:
        """The name of the queue."""
        return self._core.channel

    @property
    def workers(self) -> int:
        """How many workers are connected. Does not block."""
        return len(self._core.ledger)

    @property
    def lost(self) -> Mapping[str, int]:
        """How many tasks went away with their worker, by worker (node id): of all this node's
        pushers of the queue. A snapshot; does not block."""
        with self._core.link.lock:
            return MappingProxyType(dict(self._core.lost))

    def on_loss(self, hook: Callable[[TasksLost], object]) -> None:
        """Have `hook` called with each `TasksLost` of this node's pushers of the queue, in the
        node's hook thread, for as long as this handle is open. Raises `Closed`."""
        self._check_open()
        self._core.loss_hooks[self._key] = hook

    def send(
        self,
        payload: Any,
        headers: codec.Headers | None = None,
        timeout: float | None = None,
    ) -> None:
        """Give one task to the worker that has the fewest.

        `payload`: see docs/payloads.md. A buffer that may be written to is copied; one that is
        read-only is not, and must not change. `headers`: str keys, plain values. Blocks while no
        worker has room, or there is none, up to `timeout` seconds (None: for ever, 0: not at all).
        Raises `NotSerializable`, `PayloadTooLarge`, `Timeout`, `Closed`; nothing was sent then.
        """
        batch = self._batch
        if headers is None and len(batch.items) < batch.room:
            item = payload if type(payload) is bytes else msgspec.Raw(codec.pack(payload))
            if len(item) <= batch.item_bytes_max:
                batch.items.append(item)
                if not batch.room:
                    self._core.settle(item)
                return
        attempt = self._sending(payload, headers)
        with self._telling_workers():
            self._core.link.wait(attempt, check_timeout(timeout), self._room, retry_s=limits.TICK_S)

    async def asend(
        self,
        payload: Any,
        headers: codec.Headers | None = None,
        timeout: float | None = None,
    ) -> None:
        """`send` for asyncio. Cancelled, the task was sent or was not, as with any send."""
        batch = self._batch
        if headers is None and len(batch.items) < batch.room:
            item = payload if type(payload) is bytes else msgspec.Raw(codec.pack(payload))
            if len(item) <= batch.item_bytes_max:
                batch.items.append(item)
                if not batch.room:
                    self._core.settle(item)
                return
        attempt = self._sending(payload, headers)
        with self._telling_workers():
            await self._core.link.wait_async(
                attempt, check_timeout(timeout), self._room, retry_s=limits.TICK_S
            )

    def wait_for(self, count: int, *, timeout: float | None = None) -> None:
        """Block until at least `count` workers are connected. Raises `Timeout`, `Closed`."""
        with self._watching():
            self._core.link.wait(*self._connected(count, timeout))

    async def await_for(self, count: int, *, timeout: float | None = None) -> None:
        """`wait_for` for asyncio."""
        with self._watching():
            await self._core.link.wait_async(*self._connected(count, timeout))

    def close(self) -> None:
        """Give the handle back; whoever sends with it gets `Closed`. Does not block; idempotent."""
        super().close()
        self._batch = Batch()
        with self._core.link.lock:
            self._core.link.wake_all()

    def _connected(self, count: int, timeout: float | None) -> tuple[Any, float | None, str]:
        check_count(count, "count", 0, limits.PEERS_MAX)
        core = self._core

        def attempt() -> bool | None:
            self._check_open()
            core.read_credit()
            return len(core.ledger) >= count or None

        return attempt, check_timeout(timeout), f"{count} workers of queue {self.channel!r}"

    @contextmanager
    def _watching(self) -> Iterator[None]:
        with self._core.link.lock:
            self._core.watchers += 1
        try:
            yield
        finally:
            with self._core.link.lock:
                self._core.watchers -= 1

    @contextmanager
    def _telling_workers(self) -> Iterator[None]:
        """Say how many workers there are now that nobody had room in time."""
        try:
            yield
        except Timeout as error:
            raise Timeout(f"{error} ({self.workers} workers)") from None

    @property
    def _room(self) -> str:
        return f"worker of queue {self.channel!r} with room"

    def _sending(self, payload: Any, headers: codec.Headers | None) -> Callable[[], bool | None]:
        """Encode in the caller's thread, before the lock is taken; returns the attempt to send."""
        core = self._core
        task = encode_message(payload, headers, core._home.transport.message_bytes_max)

        def attempt() -> bool | None:
            self._check_open()
            return core.send(task)

        return attempt
