"""What a node's streams have under way: gone on with while the node runs, whether or not anybody
waits for it or has its handle still, and finished when the node closes.

Until the node's deadline nothing of it is given up: appends have their outcome, and what consumers
have done is known where it has to be. What is not so by then is logged.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Final

from mesh.durable.appender import Appender
from mesh.errors import Closed
from mesh.sockets.control import Offer, OfferKind
from mesh.sockets.home import Counters, Unhurried
from mesh.sockets.link import Link

if TYPE_CHECKING:
    from mesh.durable.consumer import Consuming

logger = logging.getLogger(__name__)

_CLOSED_TICKS: Final = 480
"""How long what a consumer has done is still said after it was closed: two minutes, after which its
group has given it up."""


class UnderWay(Unhurried):
    """See above. A core; in the control thread, but for what says otherwise."""

    kind = "stream"
    seeks: OfferKind | None = None
    channel = ""

    def __init__(self) -> None:
        self.counters = Counters()
        self.link = Link("what streams have under way")
        self._appenders: set[Appender] = set()
        """Under the lock."""
        self._released: deque[Appender] = deque()
        """Those of them that nobody submits to any more."""
        self._consumers: dict[Consuming, int] = {}
        """With the number of ticks since each was closed. Under the lock."""
        self._leaving = False

    def add(self, appender: Appender) -> None:
        """Look after that one until it is released, and nothing is under way there. From any
        thread."""
        with self.link.lock:
            self._appenders.add(appender)

    def release(self, appenders: Iterable[Appender]) -> None:
        """Nobody submits to them any more. From any thread; neither locks nor blocks."""
        self._released += appenders

    def add_consumer(self, consumer: Consuming) -> None:
        """Look after that one until it is closed, and what it has done is known. From any
        thread."""
        with self.link.lock:
            self._consumers[consumer] = 0

    def tick(self) -> None:
        self._forget()
        self._forget_consumers()
        self._advance()

    def _forget(self) -> None:
        for _ in range(len(self._released)):
            appender = self._released.popleft()
            if appender.at_work:
                self._released.append(appender)
            else:
                with self.link.lock:
                    self._appenders.discard(appender)

    def _forget_consumers(self) -> None:
        for consumer in self._all_consumers():
            if not consumer.link.closed:
                continue
            consumer.say()
            with self.link.lock:
                self._consumers[consumer] += 1
                ticks = self._consumers[consumer]
            if ticks > _CLOSED_TICKS:
                consumer.tell_unheard()
            elif not _is_settled(consumer):
                continue
            with self.link.lock:
                del self._consumers[consumer]

    def _advance(self) -> list[Appender]:
        """Returns all that are looked after."""
        with self.link.lock:
            appenders = list(self._appenders)
        for appender in appenders:
            if not appender.idle:
                with contextlib.suppress(Closed):
                    appender.route.link.run(partial(appender.advance, None))
        return appenders

    # -- Its end -----------------------------------------------------------------------------

    def close(self, linger_ms: int) -> None:
        for consumer in self._all_consumers():
            consumer.close(linger_ms)
        if self._leaving:
            self._give_up()
            self.link.close()
        self._leaving = True

    def go_on(self) -> bool:
        consumers = self._all_consumers()
        appenders = self._advance()  # all of them, before anything is looked at
        waiting = any(appender.at_work for appender in appenders)
        for consumer in consumers:
            consumer.say()
            waiting = not _is_settled(consumer) or waiting
        return not waiting

    def _give_up(self) -> None:
        for appender in self._advance():
            if not appender.at_work:
                continue
            with contextlib.suppress(Closed):
                logger.warning(
                    "%d records for stream %r at partition %s were under way when the node was "
                    "closed: whether they are there is not known",
                    appender.route.link.run(lambda each=appender: each.records_waiting),  # type: ignore[misc]
                    appender.stream,
                    appender.route.partition,
                )
        for consumer in self._all_consumers():
            consumer.tell_unheard()

    def _all_consumers(self) -> list[Consuming]:
        with self.link.lock:
            return list(self._consumers)

    # -- The rest of a core ------------------------------------------------------------------

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        raise AssertionError("it seeks nobody")

    def detach(self, peer: int, key: int, reason: str) -> None:
        raise AssertionError("it seeks nobody")


def _is_settled(consumer: Consuming) -> bool:
    """Or will never be, as the node closes."""
    try:
        return consumer.settled()
    except Closed:
        return True
