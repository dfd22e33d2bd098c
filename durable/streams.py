"""What the streams of one node share: which sidecars there are, and the way to each.

Made with the node's first stream, so that programs without one never load any of this.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Final
from weakref import WeakSet

from mesh.durable.finder import HostFinder, LogFinder
from mesh.durable.route import LocalRoute, RemoteRoute, Route
from mesh.durable.sidecar import Sidecar
from mesh.durable.under_way import UnderWay
from mesh.errors import NoSidecar, Timeout
from mesh.sockets.home import Core, Home
from mesh.sockets.link import Link
from mesh.timeouts import within

_HELP = (
    "give a node a directory (Node(durable=...)), or start a sidecar on this host "
    "(mesh sidecar DIRECTORY)"
)
_LOOK_S: Final = 0.25
"""How often who waits for a sidecar or a partition looks again: not all that it looks at wakes it,
as a stream does not that is new at the sidecar in this process."""


class Streams:
    """See above. Safe from any thread."""

    def __init__(
        self,
        home: Home,
        add: Callable[[Core], object],
        release_of: Callable[[Core], Callable[[], None]],
        sidecar: Sidecar | None,
        name_of: Callable[[int], str],
    ) -> None:
        """`add` has the node look after a core; what `release_of` makes has it do so no more;
        `name_of` says what a node is called."""
        self.release_of = release_of
        self.node_id = home.node_id
        self.bytes_max = home.transport.message_bytes_max
        self.flusher = home.flusher
        self.lock = threading.Lock()
        self.sidecar = sidecar
        self._home = home
        self.add = add
        self._routes: dict[str, Route] = {}
        self._logs = LogFinder(home.node_id, name_of)
        self._hosts = HostFinder(home.node_id, name_of)
        add(self._logs)
        add(self._hosts)
        self.under_way = UnderWay()
        add(self.under_way)
        self._links: WeakSet[Link] = WeakSet()
        self._own: LocalRoute | None = None
        if sidecar is not None:
            self._own = LocalRoute(sidecar)
            self._routes[self._own.partition] = self._own
            self.has_link(self._own.link)

    def find(self, stream: str, home: str | None, timeout: float | None) -> str:
        """The partition to append to: the nearest, or the one at `home`. Blocks until there is one.
        Raises `NoSidecar`, `InvalidOption`, `Closed`."""
        if (partition := self._at_once(home)) is not None:
            return partition
        try:
            return self._logs.link.wait(
                lambda: self._choose(stream, home), timeout, "sidecar", retry_s=_LOOK_S
            )
        except Timeout:
            raise self._none(home, timeout) from None

    async def afind(self, stream: str, home: str | None, timeout: float | None) -> str:
        """`find` for asyncio."""
        if (partition := self._at_once(home)) is not None:
            return partition
        try:
            return await self._logs.link.wait_async(
                lambda: self._choose(stream, home), timeout, "sidecar", retry_s=_LOOK_S
            )
        except Timeout:
            raise self._none(home, timeout) from None

    def all_of(
        self,
        stream: str,
        only: str | None,
        count: int,
        timeout: float | None,
        go_on: Callable[[], None],
    ) -> list[str]:
        """The partitions of a stream: at least `count` of them, or the one that is named. Blocks
        until they are there. Raises `NoSidecar`, `InvalidOption`, `Closed`, and what `go_on` does,
        which it calls now and then."""
        attempt = partial(self._have, stream, only, count, go_on)
        try:
            return self._hosts.link.wait(attempt, timeout, "partition", retry_s=_LOOK_S)
        except Timeout:
            raise self._too_few(stream, only, count, timeout) from None

    async def aall_of(
        self,
        stream: str,
        only: str | None,
        count: int,
        timeout: float | None,
        go_on: Callable[[], None],
    ) -> list[str]:
        """`all_of` for asyncio."""
        attempt = partial(self._have, stream, only, count, go_on)
        try:
            return await self._hosts.link.wait_async(attempt, timeout, "partition", retry_s=_LOOK_S)
        except Timeout:
            raise self._too_few(stream, only, count, timeout) from None

    def having(self, stream: str) -> list[str]:
        """The partitions of a stream that are there, the nearest first."""
        partitions = self._hosts.of(stream).nearest()
        own = self._own
        if own is not None and own.partition not in partitions and own.has(stream):
            partitions.insert(0, own.partition)
        return partitions

    def missing(self, stream: str) -> frozenset[str]:
        """Those that this node has met and cannot reach now."""
        return frozenset(self._hosts.of(stream).met) - frozenset(self.having(stream))

    def _have(
        self, stream: str, only: str | None, count: int, go_on: Callable[[], None]
    ) -> list[str] | None:
        go_on()
        partitions = self.having(stream)
        if only is not None:
            named = only if only in partitions else self._hosts.of(stream).at(only)
            return None if named is None else [named]
        return partitions if len(partitions) >= count else None

    def _too_few(
        self, stream: str, only: str | None, count: int, timeout: float | None
    ) -> NoSidecar:
        there = self._hosts.of(stream).listed()
        if only is not None:
            return NoSidecar(
                f"no partition {only!r} of stream {stream!r} {within(timeout)}; there are: {there}"
            )
        if count > 1:
            return NoSidecar(
                f"no {count} partitions of stream {stream!r} {within(timeout)}; there are: {there}"
            )
        return NoSidecar(f"no partition {within(timeout)}: {nobody_has(stream)}")

    def is_there(self, partition: str) -> bool:
        """Whether that sidecar is connected."""
        if self._own is not None and partition == self._own.partition:
            return True
        return self._logs.found.has(partition)

    def route_to(self, partition: str) -> Route:
        """The way to that sidecar."""
        with self.lock:
            return self.route(partition)

    def route(self, partition: str) -> Route:
        """Likewise, under `lock`."""
        route = self._routes.get(partition)
        if route is None:
            takes = self._logs.found.bytes_max(partition)
            remote = RemoteRoute(self._home, partition, takes)
            self.add(remote.core)
            route = self._routes[partition] = remote
        return route

    def close(self) -> None:
        """Whoever waits gets `Closed`. The node closes the cores."""
        if self._own is not None:
            self._own.link.close()

    def has_link(self, link: Link) -> None:
        """One that is no core's is not to be used in a forked child either."""
        self._links.add(link)

    def abandon(self) -> None:
        """In a forked child: all of it is the parent's."""
        self.lock = threading.Lock()
        for link in list(self._links):
            link.abandon()

    def _at_once(self, home: str | None) -> str | None:
        if self._own is not None and home in (None, self._own.partition):
            return self._own.partition
        return None

    def _choose(self, stream: str, home: str | None) -> str | None:
        """Under the lock of the finder of all."""
        logs = self._logs.found
        if home is not None:
            return logs.at(home)
        partitions = logs.nearest()
        having = set(self._hosts.of(stream).nearest())
        distance = logs.distance
        return min(
            partitions, key=lambda each: (distance(each), each not in having, each), default=None
        )

    def _none(self, home: str | None, timeout: float | None) -> NoSidecar:
        if home is not None:
            there = self._logs.found.listed()
            return NoSidecar(
                f"sidecar {home!r} was not found {within(timeout)}; there are: {there}"
            )
        return NoSidecar(f"no sidecar was found {within(timeout)}: {_HELP}")


def nobody_has(stream: str) -> str:
    return (
        f"nobody has a stream {stream!r}: nothing was appended to it yet, or its sidecar is not "
        "there"
    )
