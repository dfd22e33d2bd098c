"""What a pattern's core needs from its node, and what the node needs from a core.

The seam between a pattern and the rest: no pattern knows nodes, membership or discovery.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import msgspec

from mesh import limits
from mesh.sockets.compression import Compression
from mesh.sockets.control import Offer, OfferKind
from mesh.sockets.flusher import Flusher
from mesh.sockets.link import Link
from mesh.sockets.transport import Transport


class Home(msgspec.Struct, frozen=True):
    """A node, as its patterns see it."""

    node_id: int
    """The node's incarnation, which every frame carries."""
    transport: Transport
    acknowledge: Callable[[int, str, bool], None]
    """Tell that node, over the control link, that the mark to this subscriber address arrived, of
    its topics that drop (False) or that wait (True)."""
    run_hook: Callable[[Callable[[Any], object], Any], None]
    """Call a user's hook with an event, in the node's hook thread, soon."""
    flusher: Flusher = msgspec.field(default_factory=Flusher)
    compress: bool = True
    """Whether what leaves over tcp may be compressed."""

    def compression(self) -> Compression | None:
        """For one channel over tcp; None where nothing is to be compressed."""
        return Compression() if self.compress else None


class Counters(msgspec.Struct):
    """One core's counters, changed under its link's lock."""

    sent: int = 0
    received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    lost: int = 0
    dropped: Counter[str] = msgspec.field(default_factory=Counter)

    def add(self, other: Counters) -> None:
        """Count what `other` has counted, too."""
        self.sent += other.sent
        self.received += other.received
        self.bytes_sent += other.bytes_sent
        self.bytes_received += other.bytes_received
        self.lost += other.lost
        self.dropped += other.dropped


class Unhurried:
    """A core that ends before the node says goodbye, and first finishes what it has begun: its
    `close` only begins that, or gives up what is left of it when it is called again."""

    link: Link

    def go_on(self) -> bool:
        """Whether that is done. Asked every few milliseconds; does not block."""
        return self.link.closed


class Core(Protocol):
    """A pattern's working part: it lives until closed, while handles to it come and go.

    `attach` and `detach` come from the control thread, for each matching offer of a peer (and of
    the node itself); they do not block.
    """

    @property
    def kind(self) -> str:
        """``topic``, ``queue`` or ``service``, for statistics."""

    @property
    def seeks(self) -> OfferKind | None:
        """The kind of offer it wants to be attached to."""

    @property
    def channel(self) -> str:
        """The channel or pattern by which offers are matched."""

    @property
    def counters(self) -> Counters: ...

    @property
    def link(self) -> Link: ...

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        """A peer offers what this core seeks: connect to it."""

    def detach(self, peer: int, key: int, reason: str) -> None:
        """That offer is gone: ``withdrawn``, ``moved``, or the reason for which the peer went."""

    def tick(self) -> None:
        """About every `limits.TICK_S`."""

    def close(self, linger_ms: int) -> None:
        """Close the link, that of a service once its handlers have answered: within `linger_ms`.
        Idempotent; does not wait."""


@lru_cache(maxsize=limits.SIGHTINGS_MAX)
def node_text(node_id: int) -> str:
    """A node id as users and control messages have it. Asked for with every message received."""
    return f"{node_id:016x}"


def node_number(text: str) -> int:
    return int(text, 16)
