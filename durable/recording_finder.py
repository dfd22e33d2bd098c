"""Which nodes record which of their topics, and where: a core like `mesh.durable.finder`'s.

Nodes that have gone are remembered for a while: what one had published may be in the log of a
sidecar that lives on, and be all that is left of it.
"""

from __future__ import annotations

import time
from typing import Final

import msgspec

from mesh import limits
from mesh.discovery.plausible import is_node_id
from mesh.names import is_pattern, matches
from mesh.sockets.control import Offer, OfferKind
from mesh.sockets.home import Counters
from mesh.sockets.link import Link

_REMEMBERED_S: Final = 600.0


class FoundRecording(msgspec.Struct, frozen=True):
    """Where a node records topics of a pattern."""

    stream: str
    partition: str
    pattern: str


class RecordingFinder:
    """See above. Asked from any thread."""

    kind = "stream"
    seeks: OfferKind | None = "record"
    channel = "**"

    def __init__(self) -> None:
        self.counters = Counters()
        self.link = Link("recordings")
        self._live: dict[int, dict[int, FoundRecording]] = {}
        """By node, and the key of its offer."""
        self._gone: dict[tuple[int, FoundRecording], float] = {}
        """With the time until which each is remembered; the next to be forgotten comes first."""

    def of(self, node: int, topic: str) -> set[tuple[str, str]]:
        """Streams and partitions in which that topic of that node may be."""
        with self.link.lock:
            found = list(self._live.get(node, {}).values())
            found += [recording for of, recording in self._gone if of == node]
        return {(each.stream, each.partition) for each in found if matches(each.pattern, topic)}

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        if not (is_pattern(offer.pattern) and is_node_id(offer.partition)):
            self.counters.dropped["offer"] += 1
            return
        with self.link:
            recording = FoundRecording(offer.channel, offer.partition, offer.pattern)
            self._live.setdefault(peer, {})[offer.key] = recording

    def detach(self, peer: int, key: int, reason: str) -> None:
        with self.link:
            found = self._live.get(peer, {})
            recording = found.pop(key, None)
            if not found:
                self._live.pop(peer, None)
            if recording is not None:
                self._gone.pop((peer, recording), None)
                self._gone[peer, recording] = time.monotonic() + _REMEMBERED_S
                if len(self._gone) > limits.RECORDINGS_MET_MAX:
                    del self._gone[next(iter(self._gone))]

    def tick(self) -> None:
        now = time.monotonic()
        with self.link:
            while self._gone and self._gone[first := next(iter(self._gone))] < now:
                del self._gone[first]

    def close(self, linger_ms: int) -> None:
        self.link.close(0)
