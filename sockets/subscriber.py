"""Subscribing to topics.

Guarantee: a message is delivered at most once, in each publisher's order, and none is lost
silently: a gap in a publisher's sequence is counted under its sender in `Subscriber.lost` and told
to the `on_loss` hook with the range. Subscribing to ``a`` never delivers ``ab``. With
``repair=True`` a gap is filled from where it was recorded, as far as that goes, and what is left of
it counted (`mesh.sockets.repairing`).

The handle; what it works on is in `mesh.sockets.subscription`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from mesh import limits
from mesh.message import Loss, Message, Messages
from mesh.options import check_count, check_timeout
from mesh.sockets.handle import Receiving
from mesh.sockets.moment import PATIENT_S
from mesh.sockets.subscription import Subscription


class Subscriber(Receiving[Message]):
    """A handle to a subscription, from `Node.subscriber`. Iterate it, or call `recv`. Safe from
    several threads, each message going to one of them."""

    def __init__(self, core: Subscription, owner: object, release: Callable[[], None]) -> None:
        super().__init__(core.link.what, owner, release)
        self._core = core
        self._made = core.inbox.made

    @property
    def pattern(self) -> str:
        """Of the topics that are subscribed to."""
        return self._core.channel

    @property
    def lost(self) -> Mapping[str, int]:
        """How many messages were missed, by sender (node id). A snapshot; does not block."""
        with self._core.link.lock:
            return MappingProxyType(dict(self._core.arrivals.lost))

    @property
    def repaired(self) -> Mapping[str, int]:
        """How many messages were missed and fetched from where they were recorded, by sender (node
        id). Empty without ``repair=True``. A snapshot; does not block."""
        with self._core.link.lock:
            return MappingProxyType(dict(self._core.arrivals.repaired))

    def on_loss(self, hook: Callable[[Loss], object]) -> None:
        """Have `hook` called with each `Loss`, in the node's hook thread, soon after it is seen."""
        self._core.arrivals.on_loss = hook

    def recv(self, timeout: float | None = None) -> Message:
        """The next message, blocking up to `timeout` seconds (None: for ever, 0: not at all).

        Raises `Timeout`, `Closed`.
        """
        try:
            return self._made.popleft()
        except IndexError:
            pass
        core, wait_s = self._core, check_timeout(timeout)
        if wait_s is not None and wait_s <= PATIENT_S:
            return core.link.wait(core.take, wait_s, self._awaited)
        message = core.take_soon()
        if message is not None:
            return message
        return core.link.wait(core.take_paced, wait_s, self._awaited)

    async def arecv(self, timeout: float | None = None) -> Message:
        """`recv` for asyncio. Cancelling it loses nothing."""
        core = self._core
        return await core.link.wait_async(
            core.take,
            check_timeout(timeout),
            self._awaited,
            give_back=lambda message: core.arrivals.give_back([message]),
        )

    def recv_many(self, *, timeout: float | None = None, count_max: int = 1000) -> Messages:
        """Wait for one message, and return all that are there, at most `count_max`, and no more
        once about 1 MiB was read (`limits.RECV_MANY_BYTES`).

        Blocks for the first up to `timeout` seconds (None: for ever, 0: not at all). The result is
        a sequence that makes each `Message` as it is looked at; its `payloads` are the payloads
        alone. Raises `Timeout`, `Closed`, `InvalidOption`.
        """
        check_count(count_max, "count_max", 1, limits.RECV_MANY_MAX)
        return self._core.link.wait(
            lambda: self._core.take_many(count_max), check_timeout(timeout), self._awaited
        )

    async def arecv_many(self, *, timeout: float | None = None, count_max: int = 1000) -> Messages:
        """`recv_many` for asyncio. Cancelling it loses nothing."""
        check_count(count_max, "count_max", 1, limits.RECV_MANY_MAX)
        core = self._core
        return await core.link.wait_async(
            lambda: core.take_many(count_max),
            check_timeout(timeout),
            self._awaited,
            give_back=core.arrivals.give_back,
        )

    def close(self) -> None:
        """Stop receiving; whoever waits gets `Closed`. Does not block; idempotent."""
        self._core.close(0)
        super().close()

    @property
    def _awaited(self) -> str:
        return f"message on {self._core.channel!r}"
