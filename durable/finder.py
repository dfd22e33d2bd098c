"""Which sidecars there are, and which of them have a certain stream.

Cores like a pattern's (`mesh.sockets.home.Core`), attached to offers by the control thread, but
without sockets: who waits for a sidecar waits on their links.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Final

import msgspec

from mesh import limits
from mesh.errors import InvalidOption
from mesh.sockets.control import Offer, OfferKind
from mesh.sockets.home import Counters
from mesh.sockets.link import Link
from mesh.sockets.transport import scheme_of

logger = logging.getLogger(__name__)

_COPIED_TICKS: Final = 120
"""How long a partition has to be at two nodes before that is an error, half a minute: one that has
died elsewhere is here until its silence is noticed."""
_PARTITION: Final = re.compile(r"[0-9a-f]{16}")
"""What looks like one is never taken for the name of a node: which of the two is meant must not
depend on who is there."""


class FoundSidecar(msgspec.Struct, frozen=True, order=True):
    """One that is there. The nearest sorts first."""

    distance: int
    """0: in this process; 1: on this host; 2: elsewhere."""
    partition: str
    node: str
    """The name of its node."""
    bytes_max: int = 0
    """Of a message that it takes. 0: it does not say."""


class FoundSidecars:
    """Sidecars that were found. Asked from any thread."""

    def __init__(self) -> None:
        self.met: dict[str, None] = {}
        """Partitions that were there at any time, the latest last."""
        self._found: dict[tuple[int, int], FoundSidecar] = {}

    def nearest(self) -> list[str]:
        """Partitions, the nearest first."""
        return list(dict.fromkeys(each.partition for each in sorted(self._all())))

    def has(self, partition: str) -> bool:
        """Whether it is there."""
        return any(each.partition == partition for each in self._all())

    def at(self, where: str) -> str | None:
        """The partition that is meant: by its own name, or by its node's. None: it is not there.
        Raises `InvalidOption` if several nodes of that name have one."""
        if _PARTITION.fullmatch(where):
            return where if where in self.nearest() else None
        named = sorted({each.partition for each in self._all() if each.node == where})
        if len(named) > 1:
            raise InvalidOption(
                f"{where!r} is the name of {len(named)} nodes that have a log: say which "
                f"partition is meant, {' or '.join(named)}"
            )
        return named[0] if named else None

    def listed(self) -> str:
        """All of them, for people."""
        found = dict.fromkeys(f"{each.partition} ({each.node})" for each in sorted(self._all()))
        return ", ".join(found) or "none"

    def distance(self, partition: str) -> int:
        """Of that sidecar, which is there."""
        return min(f.distance for f in self._all() if f.partition == partition)

    def bytes_max(self, partition: str) -> int:
        """Of a message that it takes. 0: it does not say, or is not there."""
        return max((f.bytes_max for f in self._all() if f.partition == partition), default=0)

    def nodes(self) -> dict[str, dict[int, str]]:
        """By partition: ids and names of the nodes that say that they have it."""
        at: dict[str, dict[int, str]] = {}
        for (peer, _), found in list(self._found.items()):
            at.setdefault(found.partition, {})[peer] = found.node
        return at

    def _all(self) -> list[FoundSidecar]:
        return list(self._found.values())  # in one go: others may be changing it

    def add(self, peer: int, key: int, sidecar: FoundSidecar) -> None:
        self.met.pop(sidecar.partition, None)
        self.met[sidecar.partition] = None
        if len(self.met) > limits.PARTITIONS_MET_MAX:
            del self.met[next(iter(self.met))]
        self._found[peer, key] = sidecar

    def remove(self, peer: int, key: int) -> None:
        self._found.pop((peer, key), None)


class _Finder:
    """What both have in common."""

    kind = "stream"

    def __init__(self, what: str, own: int, name_of: Callable[[int], str]) -> None:
        """`own`: the id of this node. `name_of` says what a node is called that is there."""
        self.counters = Counters()
        self.link = Link(what)
        self._own = own
        self._name_of = name_of

    def _sidecar(self, peer: int, partition: str, endpoint: str, offer: Offer) -> FoundSidecar:
        distance = 0 if peer == self._own else 1 if scheme_of(endpoint) == "ipc" else 2
        return FoundSidecar(distance, partition, self._name_of(peer), offer.message_bytes_max)

    def close(self, linger_ms: int) -> None:
        self.link.close(0)


class LogFinder(_Finder):
    """All of them."""

    seeks: OfferKind | None = "log"
    channel = "*"

    def __init__(self, own: int, name_of: Callable[[int], str]) -> None:
        super().__init__("search for a log", own, name_of)
        self.found = FoundSidecars()
        self._twice: dict[str, int] = {}
        """For how many ticks a partition has been at more than one node."""

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        with self.link:
            self.found.add(peer, offer.key, self._sidecar(peer, offer.channel, endpoint, offer))
            self.link.wake_all()

    def detach(self, peer: int, key: int, reason: str) -> None:
        with self.link:
            self.found.remove(peer, key)

    def tick(self) -> None:
        """Look for copies of directories."""
        nodes = self.found.nodes()
        self._twice = {
            partition: self._twice.get(partition, 0) + 1
            for partition, at in nodes.items()
            if len(at) > 1
        }
        for partition, ticks in self._twice.items():
            if ticks == _COPIED_TICKS:
                logger.error(
                    "partition %s is at %d nodes (%s): their directories are copies of one, of "
                    "which only one may run",
                    partition,
                    len(nodes[partition]),
                    ", ".join(sorted(nodes[partition].values())),
                )


class HostFinder(_Finder):
    """Which of them have which streams: one for all of these, as a program may use any number."""

    seeks: OfferKind | None = "host"
    channel = "**"

    def __init__(self, own: int, name_of: Callable[[int], str]) -> None:
        super().__init__("search for a stream", own, name_of)
        self._streams: dict[str, FoundSidecars] = {}
        self._gone: dict[str, None] = {}
        """Of these, which nobody has any more, the latest last."""
        self._stream_of: dict[tuple[int, int], str] = {}

    def of(self, stream: str) -> FoundSidecars:
        """Those that have that one, as they are now."""
        found = self._streams.get(stream)
        return FoundSidecars() if found is None else found

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        with self.link:
            stream = offer.channel
            sidecar = self._sidecar(peer, offer.partition, endpoint, offer)
            self._streams.setdefault(stream, FoundSidecars()).add(peer, offer.key, sidecar)
            self._stream_of[peer, offer.key] = stream
            self._gone.pop(stream, None)
            self.link.wake_all()

    def detach(self, peer: int, key: int, reason: str) -> None:
        with self.link:
            stream = self._stream_of.pop((peer, key), None)
            if stream is None:
                return
            found = self._streams[stream]
            found.remove(peer, key)
            if not found.nearest():
                self._gone[stream] = None
            if len(self._gone) > limits.STREAMS_GONE_MAX:
                forgotten = next(iter(self._gone))
                del self._gone[forgotten], self._streams[forgotten]

    def tick(self) -> None:
        """There is nothing to do."""
