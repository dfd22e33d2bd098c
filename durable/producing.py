"""One producer's way into a stream: at which partitions it is, and what it has under way there.

It is at one at a time: the nearest sidecar's, or the one that `home` names, or whose node it does.
While something is under way it stays there; with a `home` it stays for good, and so does a producer
with a name, since only that partition knows its sequence. What is derived from a record goes where
that record is, unless `home` names another: only one partition can know whether it is there
already.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable

from mesh import limits
from mesh.durable.appender import Appender, Pending
from mesh.durable.appending import Appending, wait_for_room
from mesh.durable.batch import Batch
from mesh.durable.encoding import producer_number
from mesh.durable.reading import Record
from mesh.durable.streams import Streams
from mesh.options import StreamOptions
from mesh.timeouts import deadline_of, left_of


class Producing:
    """See above. Safe from several threads and tasks."""

    def __init__(
        self,
        streams: Streams,
        stream: str,
        *,
        options: StreamOptions | None = None,
        producer: str | None = None,
        home: str | None = None,
        waits: bool = False,
    ) -> None:
        """`waits`: for room, while the log is full."""
        self._streams = streams
        self._stream = stream
        self._options = options
        self._producer = secrets.randbits(63) | 1 if producer is None else producer_number(producer)
        self._named = producer is not None
        self._home = home
        self._waits = waits
        self._nearest: Appender | None = None
        """For what may be anywhere."""
        self._appenders: dict[str, Appender] = {}
        """One for each partition, or its runs would fence each other."""
        weakref.finalize(self, _release, streams, self._appenders).atexit = False

    @property
    def appenders(self) -> list[Appender]:
        """Those that there are."""
        return list(self._appenders.values())

    def begin(
        self,
        submit: Callable[[Appender], tuple[Pending, int | None]],
        timeout: float | None,
        derived_from: Record | None = None,
    ) -> Appending:
        """Have something be under way, once there is room for it. Raises `Busy` if there is none,
        and what `bind` raises."""
        deadline = deadline_of(timeout)
        appender = self.bind(left_of(deadline), derived_from)
        wait_for_room(appender, deadline)
        return Appending(appender, *appender.route.link.run(lambda: submit(appender)))

    def submit(
        self, batch: Batch, timeout: float | None, derived_from: Record | None = None
    ) -> Appending:
        """`begin` with a batch."""
        return self.begin(lambda appender: (appender.submit(batch), None), timeout, derived_from)

    def bind(self, timeout: float | None, derived_from: Record | None = None) -> Appender:
        """What is appended with. Blocks until there is a sidecar. Raises `NoSidecar`,
        `InvalidOption`, `Closed`."""
        home = self._home_of(derived_from)
        appender = self._bound(home)
        if appender is None:
            appender = self._at(self._streams.find(self._stream, home, timeout), home)
        return appender

    async def abind(self, timeout: float | None, derived_from: Record | None = None) -> Appender:
        """`bind` for asyncio."""
        home = self._home_of(derived_from)
        appender = self._bound(home)
        if appender is None:
            appender = self._at(await self._streams.afind(self._stream, home, timeout), home)
        return appender

    def _home_of(self, derived_from: Record | None) -> str | None:
        """The partition that has to be it, if one has."""
        if self._home is None and derived_from is not None:
            return derived_from.partition
        return self._home

    def _bound(self, home: str | None) -> Appender | None:
        """What is used so far, if there is any, and no reason to look for another."""
        if home is not None:
            return self._appenders.get(home)
        nearest = self._nearest
        return None if nearest is None or self._may_move(nearest) else nearest

    def _may_move(self, appender: Appender) -> bool:
        """Whether its sidecar is gone, and nothing binds it to that."""
        return (
            not self._named
            and not self._streams.is_there(appender.route.partition)
            and not appender.at_work
        )

    def _at(self, partition: str, home: str | None) -> Appender:
        with self._streams.lock:
            appender = self._appenders.get(partition)
            if appender is None:
                route = self._streams.route(partition)
                appender = Appender(
                    route,
                    self._stream,
                    self._producer,
                    self._options,
                    flusher=self._streams.flusher,
                    bytes_max=self._streams.bytes_max,
                    waits=self._waits,
                )
                if len(self._appenders) >= limits.PARTITIONS_MET_MAX:
                    self._forget_idle()
                self._appenders[partition] = appender
                self._streams.under_way.add(appender)
            if home is not None and home == self._home:
                self._home = partition  # of a node that may have another some day
            if home is None:
                self._nearest = appender
            return appender

    def _forget_idle(self) -> None:
        for partition, each in list(self._appenders.items()):
            if each.idle and each is not self._nearest:
                self._streams.under_way.release([self._appenders.pop(partition)])


def _release(streams: Streams, appenders: dict[str, Appender]) -> None:
    """What is under way there is finished all the same."""
    streams.under_way.release(appenders.values())
