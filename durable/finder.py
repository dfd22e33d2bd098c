"""Which sidecars there are: all of them, or those that have a certain stream.

A core like a pattern's (`mesh.sockets.home.Core`), attached to offers by the control thread, but
without sockets: who waits for a sidecar waits on its link.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Final, Literal

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


class Finder:
    """See above."""

    kind = "stream"

    def __init__(
        self,
        own: int,
        seeks: Literal["log", "host"],
        channel: str,
        name_of: Callable[[int], str],
    ) -> None:
        """`name_of` says what a node is called that is there."""
        self.seeks: OfferKind | None = seeks
        self.channel = channel
        self.counters = Counters()
        self.link = Link(f"sidecars of {channel!r}")
        self.met: dict[str, None] = {}
        """Partitions that were there at any time, the latest last."""
        self._own = own
        self._name_of = name_of
        self._found: dict[tuple[int, int], FoundSidecar] = {}
        self._twice: dict[str, int] = {}
        """For how many ticks a partition has been at more than one node."""

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

    def _all(self) -> list[FoundSidecar]:
        return list(self._found.values())  # in one go: others may be changing it

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        distance = 0 if peer == self._own else 1 if scheme_of(endpoint) == "ipc" else 2
        partition = offer.channel if self.seeks == "log" else offer.partition
        with self.link:
            self._meet(partition)
            self._found[peer, offer.key] = FoundSidecar(distance, partition, self._name_of(peer))
            self.link.wake_all()

    def _meet(self, partition: str) -> None:
        self.met.pop(partition, None)
        self.met[partition] = None
        if len(self.met) > limits.PARTITIONS_MET_MAX:
            del self.met[next(iter(self.met))]

    def detach(self, peer: int, key: int, reason: str) -> None:
        with self.link:
            self._found.pop((peer, key), None)

    def tick(self) -> None:
        if self.seeks == "log":
            self._look_for_copies()

    def _look_for_copies(self) -> None:
        at: dict[str, dict[int, str]] = {}
        for (peer, _), found in list(self._found.items()):
            at.setdefault(found.partition, {})[peer] = found.node
        self._twice = {
            partition: self._twice.get(partition, 0) + 1
            for partition, nodes in at.items()
            if len(nodes) > 1
        }
        for partition, ticks in self._twice.items():
            if ticks == _COPIED_TICKS:
                logger.error(
                    "partition %s is at %d nodes (%s): their directories are copies of one, of "
                    "which only one may run",
                    partition,
                    len(at[partition]),
                    ", ".join(sorted(at[partition].values())),
                )

    def close(self, linger_ms: int) -> None:
        self.link.close(0)
