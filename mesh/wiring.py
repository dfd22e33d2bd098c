"""Data links exist only where offers match: this table knows both sides and joins them.

Holds the cores of this node and the offers of every peer (and the node's own). Decides only who is
attached to what; opens no socket itself. A link that cannot be made keeps none of the others from
being made, and is tried again. Used by the control thread alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable

from mesh import limits
from mesh.errors import Closed
from mesh.names import matches
from mesh.sockets.control import Offer
from mesh.sockets.home import Core, node_number

logger = logging.getLogger(__name__)

_RETRIES = 64
"""Links tried again at a time."""
_FREE = frozenset({"publish", "host", "record"})
"""Offers to which a link is no socket of its own: subscribers share theirs, and what looks for
streams has none."""

_Link = tuple[Core, str, int]
"""A core, a peer, and the key of its offer."""


class Wiring:
    """Attaches cores to offers and detaches them again."""

    def __init__(self, endpoint_of: Callable[[str, Offer], str | None], own_id: str = "") -> None:
        """`own_id`: whose offers cost what the node itself decided to spend, so have no bound."""
        self.dropped: Counter[str] = Counter()
        """Links that could not be made, by reason."""
        self._endpoint_of = endpoint_of
        self._own_id = own_id
        self._cores: list[Core] = []
        self._offers: dict[str, dict[int, Offer]] = {}
        self._costly: dict[str, set[_Link]] = {}
        """Links with a socket of their own, by peer."""
        self._missing: dict[_Link, None] = {}
        """Links that could not be made, the one that waits longest first."""

    @property
    def cores(self) -> tuple[Core, ...]:
        return tuple(self._cores)

    def add(self, core: Core) -> None:
        """A new core: attach it to all that is offered already."""
        self._cores.append(core)
        for peer, offers in self._offers.items():
            for offer in offers.values():
                self._join(core, peer, offer)

    def remove(self, core: Core) -> None:
        """The core is closed; nothing is to be told to it."""
        if core in self._cores:
            self._cores.remove(core)
            for links in self._costly.values():
                links -= {link for link in links if link[0] is core}

    def offered(self, peer: str, add: Iterable[Offer], drop: Iterable[int]) -> None:
        """A peer's offers changed."""
        offers = self._offers.setdefault(peer, {})
        for key in drop:
            gone = offers.pop(key, None)
            if gone is not None:
                self._part(peer, gone, "withdrawn")
        for offer in add:
            offers[offer.key] = offer
            for core in self._cores:
                self._join(core, peer, offer)

    def gone(self, peer: str, reason: str) -> None:
        """A peer is gone, and with it all that it offered."""
        for offer in self._offers.pop(peer, {}).values():
            self._part(peer, offer, reason)
        self._costly.pop(peer, None)

    def moved(self, peer: str) -> None:
        """A peer is reached at another address from now on: so is all that it offers."""
        for offer in self._offers.get(peer, {}).values():
            self._part(peer, offer, "moved")
            for core in self._cores:
                self._join(core, peer, offer)

    def retry(self) -> None:
        """Some of the links that could not be made may be possible by now."""
        for link in list(self._missing)[:_RETRIES]:
            del self._missing[link]
            core, peer, key = link
            offer = self._offers.get(peer, {}).get(key)
            if offer is not None and core in self._cores and self._attach(core, peer, offer):
                self._missing[link] = None

    def _join(self, core: Core, peer: str, offer: Offer) -> None:
        if _seeks(core, offer) and (failure := self._attach(core, peer, offer)):
            self.dropped[failure] += 1
            if len(self._missing) < limits.LINKS_MISSING_MAX:
                self._missing[core, peer, offer.key] = None

    def _attach(self, core: Core, peer: str, offer: Offer) -> str:
        """Make a link; returns why that failed, or nothing."""
        if (endpoint := self._endpoint_of(peer, offer)) is None:
            return ""
        costly = self._costly.setdefault(peer, set())
        full = peer != self._own_id and len(costly) >= limits.LINKS_PER_PEER_MAX
        if full and offer.kind not in _FREE:
            return "links full"
        try:
            core.attach(node_number(peer), offer, endpoint)
        except Closed:
            return ""  # it is about to be removed
        except Exception as error:  # noqa: BLE001  whatever it is, it concerns this link alone
            logger.warning("no link of %s to %s: %r", core.link.what, endpoint, error)
            return "link failed"
        if offer.kind not in _FREE:
            costly.add((core, peer, offer.key))
        return ""

    def _part(self, peer: str, offer: Offer, reason: str) -> None:
        for core in self._cores:
            if not _seeks(core, offer):
                continue
            self._missing.pop((core, peer, offer.key), None)
            self._costly.get(peer, set()).discard((core, peer, offer.key))
            try:
                core.detach(node_number(peer), offer.key, reason)
            except Closed:
                continue
            except Exception:  # the others have to hear of it all the same
                self.dropped["detach failed"] += 1
                logger.exception("%s cannot be detached from %s", core.link.what, peer)


def _seeks(core: Core, offer: Offer) -> bool:
    return core.seeks == offer.kind and matches(core.channel, offer.channel)
