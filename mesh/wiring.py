"""Data links exist only where offers match: this table knows both sides and joins them.

Holds the cores of this node and the offers of every peer (and the node's own). Decides only who is
attached to what; opens no socket itself. Used by the control thread alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

from mesh.errors import Closed
from mesh.names import matches
from mesh.sockets.control import Offer
from mesh.sockets.home import Core, node_number


class Wiring:
    """Attaches cores to offers and detaches them again."""

    def __init__(self, endpoint_of: Callable[[str, Offer], str | None]) -> None:
        self._endpoint_of = endpoint_of
        self._cores: list[Core] = []
        self._offers: dict[str, dict[int, Offer]] = {}

    @property
    def cores(self) -> tuple[Core, ...]:
        return tuple(self._cores)

    def add(self, core: Core) -> None:
        """A new core: attach it to all that is offered already."""
        self._cores.append(core)
        for peer, offers in self._offers.items():
            for offer in offers.values():
                self._attach(core, peer, offer)

    def remove(self, core: Core) -> None:
        """The core is closed; nothing is to be told to it."""
        if core in self._cores:
            self._cores.remove(core)

    def offered(self, peer: str, add: Iterable[Offer], drop: Iterable[int]) -> None:
        """A peer's offers changed."""
        offers = self._offers.setdefault(peer, {})
        for key in drop:
            gone = offers.pop(key, None)
            if gone is not None:
                self._detach(peer, gone, "withdrawn")
        for offer in add:
            offers[offer.key] = offer
            for core in self._cores:
                self._attach(core, peer, offer)

    def gone(self, peer: str, reason: str) -> None:
        """A peer is gone, and with it all that it offered."""
        for offer in self._offers.pop(peer, {}).values():
            self._detach(peer, offer, reason)

    def moved(self, peer: str) -> None:
        """A peer is reached at another address from now on: so is all that it offers."""
        for offer in self._offers.get(peer, {}).values():
            self._detach(peer, offer, "moved")
            for core in self._cores:
                self._attach(core, peer, offer)

    def _attach(self, core: Core, peer: str, offer: Offer) -> None:
        if _seeks(core, offer) and (endpoint := self._endpoint_of(peer, offer)) is not None:
            with suppress(Closed):  # its user closed it just now; the others are told all the same
                core.attach(node_number(peer), offer, endpoint)

    def _detach(self, peer: str, offer: Offer, reason: str) -> None:
        for core in self._cores:
            if _seeks(core, offer):
                with suppress(Closed):
                    core.detach(node_number(peer), offer.key, reason)


def _seeks(core: Core, offer: Offer) -> bool:
    return core.seeks == offer.kind and matches(core.channel, offer.channel)
