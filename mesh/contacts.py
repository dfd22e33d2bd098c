"""Whom this node might dial: what sources, seeds and introductions said, and when to try again.

A contact is a node that somebody spoke of (by its id) or an address that the user gave (a seed).
It is dialled at once, then again with growing pauses, until it is reached, withdrawn by the source
that saw it, or forgotten; a seed is never forgotten. A node that is known to have ended is
remembered, so that stale hints do not bring back a ghost. No I/O, and nothing of handshakes:
membership dials, and tells how it went.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from math import inf

from mesh import limits
from mesh.deadlines import Deadlines

PEERS = "peers"
"""The source of what peers said, of others or of themselves."""

LASTING = frozenset({"version", "realm", "secret", "self"})
"""Refusals that would only be repeated."""


@dataclass(slots=True, eq=False)
class Contact:
    """A node id or a seed's endpoint, and how dialling it goes."""

    key: str
    name: str = ""
    seed: bool = False
    forget_at: float = inf
    endpoints: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Where it may be, by source."""
    links: dict[int, str] = field(default_factory=dict)
    """Endpoints being dialled, by link."""
    attempts: int = 0
    refusal: str = ""
    """What somebody said who answered at one of its endpoints, while others are still tried."""
    stopped: str = ""
    """The refusal for which it is not dialled until a source says something new."""
    reached: str = ""
    """For a seed: id of the node that answered there."""

    def answered(self, node_id: str) -> None:
        """A node of that id is where this was dialled."""
        if self.seed:
            self.reached = node_id

    def addresses(self) -> list[str]:
        """Endpoints that are not being dialled already."""
        found = dict.fromkeys(e for endpoints in self.endpoints.values() for e in endpoints)
        busy = set(self.links.values())
        return list(islice((e for e in found if e not in busy), limits.ENDPOINTS_MAX - len(busy)))


class Contacts:
    """The table of contacts, bounded, and the queue of those whose turn to be dialled has come."""

    def __init__(self, jitter: Callable[[], float], dropped: Counter[str]) -> None:
        """`jitter` returns 0 to 1; what is refused is counted in `dropped`."""
        self.known: dict[str, Contact] = {}
        self.seeds: dict[str, Contact] = {}
        """Those of the known that are addresses."""
        self.waiting: dict[str, Contact] = {}
        """To be dialled as soon as there is room, first come first served."""
        self.deadlines: Deadlines[str] = Deadlines()
        self.gone: dict[str, None] = {}
        """Ids of nodes that ended, oldest first."""
        self._jitter = jitter
        self._dropped = dropped

    def seen(
        self,
        key: str,
        source: str,
        endpoints: tuple[str, ...],
        now: float,
        *,
        name: str = "",
        seed: bool = False,
    ) -> None:
        """A source says where `key` is; what it says for the first time is worth a dial."""
        contact = self._contact(key, source, name, seed)
        if contact is None:
            return
        if not seed:
            contact.forget_at = now + limits.FORGET_S
        if contact.endpoints.get(source) != endpoints:
            contact.endpoints[source] = endpoints
            self._dial(contact)

    def withdrawn(self, key: str, source: str) -> None:
        """The source sees it no longer; what peers said of it ends with that."""
        contact = self.known.get(key)
        if contact is None or contact.endpoints.pop(source, None) is None:
            return
        if not contact.endpoints.keys() - {PEERS}:
            self._forget(contact)

    def introduced(self, key: str, name: str, endpoints: tuple[str, ...], now: float) -> None:
        """A peer spoke of another node; only of an unknown one is that worth anything."""
        if key not in self.known and key not in self.gone and endpoints:
            self.seen(key, PEERS, endpoints, now, name=name)

    def up(self, key: str) -> None:
        """It is a peer now, and not dialled while it is one."""
        if (contact := self.known.get(key)) is not None:
            contact.attempts = 0
            contact.stopped = contact.refusal = ""
            self._rest(contact)

    def lost(self, key: str, name: str, endpoints: tuple[str, ...], now: float) -> None:
        """It was a peer until now: it may come back where it was."""
        contact = self._contact(key, PEERS, name, seed=False)
        if contact is not None:
            contact.endpoints[PEERS] = endpoints
            contact.forget_at = now + limits.FORGET_S
            contact.attempts = 0
            self.retry(contact, now)
        self._retry_seeds(key, now)

    def ended(self, key: str, now: float) -> None:
        """That node is no more, whatever anybody says of it later."""
        if (contact := self.known.get(key)) is not None:
            self._forget(contact)
        self.gone.pop(key, None)
        self.gone[key] = None
        while len(self.gone) > limits.GONE_MAX:
            del self.gone[next(iter(self.gone))]
        self._retry_seeds(key, now)

    def failed(self, contact: Contact, now: float, refusal: str = "") -> None:
        """A dial came to nothing. The last one of its round decides how to go on.

        Somebody who refused would refuse again. But a seed is an address, where another node may
        be tomorrow; and a failure of CURVE (``handshake``) may have been one of the network.
        """
        contact.refusal = refusal or contact.refusal
        if contact.links or self.known.get(contact.key) is not contact:
            return
        lasting = contact.refusal in LASTING and not contact.seed
        if lasting or contact.refusal == "self":
            contact.stopped = contact.refusal
            self._rest(contact)
            if not contact.endpoints.keys() - {PEERS}:
                self.deadlines.set(contact.key, contact.forget_at)
        else:
            self.retry(contact, now, slow=bool(contact.refusal))
        contact.refusal = ""

    def retry(self, contact: Contact, now: float, *, slow: bool = False) -> None:
        """Dial it again after a pause, which doubles each time."""
        pause = min(limits.REDIAL_S_MIN * 2.0 ** min(contact.attempts, 30), limits.REDIAL_S_MAX)
        contact.attempts += 1
        if slow:
            pause = limits.REDIAL_S_MAX
        self._rest(contact)
        self.deadlines.set(contact.key, now + pause * (0.5 + 0.5 * self._jitter()))

    def due(self, now: float) -> None:
        """Queue those whose pause is over, and forget those nobody speaks of any more."""
        while (key := self.deadlines.take(now)) is not None:
            contact = self.known[key]
            if now >= contact.forget_at:
                self._forget(contact)
            elif not contact.stopped:
                self.waiting[key] = contact

    def resume(self, reason: str) -> None:
        """Dial again those that were stopped for that reason, which may no longer hold."""
        for contact in self.known.values():
            if contact.stopped == reason:
                self._dial(contact)

    def clear(self) -> None:
        for contact in list(self.known.values()):
            self._forget(contact)

    def _contact(self, key: str, source: str, name: str, seed: bool) -> Contact | None:
        contact = self.known.get(key)
        if contact is None:
            # What peers make up must not keep out what sources see.
            room = limits.SIGHTINGS_MAX // (2 if source == PEERS else 1)
            if len(self.known) >= room:
                self._dropped["contacts full"] += 1
                return None
            contact = self.known[key] = Contact(key, name, seed)
            if seed:
                self.seeds[key] = contact
        return contact

    def _dial(self, contact: Contact) -> None:
        contact.attempts = 0
        contact.stopped = ""
        self._rest(contact)
        self.waiting[contact.key] = contact

    def _rest(self, contact: Contact) -> None:
        self.waiting.pop(contact.key, None)
        self.deadlines.clear(contact.key)

    def _forget(self, contact: Contact) -> None:
        self._rest(contact)
        self.seeds.pop(contact.key, None)
        del self.known[contact.key]

    def _retry_seeds(self, node_id: str, now: float) -> None:
        for contact in self.seeds.values():
            if contact.reached == node_id and not contact.links:
                contact.reached = ""
                contact.attempts = 0
                self.retry(contact, now)
