"""Whom this node might dial: what sources, seeds and introductions said, and when to try again.

A contact is a node that somebody spoke of (by its id) or an address that the user gave (a seed).
It is dialled in rounds, each over all of its endpoints, the first at once and then with growing
pauses, until it is reached. It stays for as long as a source holds it, since sources tell only of
changes; what peers said is forgotten after a while; a seed never is. A node that is known to have
ended is remembered, so that stale hints do not bring back a ghost.

Much of what is said may be made up. Whoever was a peer, a seed, or seen by this machine goes before
all others; of those, the newest keep their place in a full table, and none is dialled at many
endpoints while others wait. No I/O, and nothing of handshakes: membership dials, and tells how it
went.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import inf

import msgspec

from mesh import limits
from mesh.deadlines import Deadlines

PEERS = "peers"
"""The source of what peers said, of others or of themselves."""

FORGEABLE = frozenset({PEERS, "mdns"})
"""Sources through which a stranger, or any one peer, can make up nodes."""

LASTING = frozenset({"version", "realm", "secret", "self"})
"""Refusals that would only be repeated."""


class Contact(msgspec.Struct, eq=False):
    """A node id or a seed's endpoint, and how dialling it goes."""

    key: str
    name: str = ""
    seed: bool = False
    forget_at: float = inf
    endpoints: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    """Where it may be, by source."""
    links: dict[int, str] = msgspec.field(default_factory=dict)
    """Endpoints being dialled, by link."""
    untried: list[str] = msgspec.field(default_factory=list)
    """Endpoints of this round that have not been dialled yet."""
    attempts: int = 0
    refusal: str = ""
    """What somebody said who answered at one of its endpoints, while others are still tried."""
    stopped: str = ""
    """The refusal for which it is not dialled until a source says something new."""
    met: bool = False
    """Whether it has been a peer."""
    reached: str = ""
    """For a seed: id of the node that answered there."""

    @property
    def credible(self) -> bool:
        """Whether more than what anybody could make up says that it is there."""
        return self.met or self.seed or not self.endpoints.keys() <= FORGEABLE

    @property
    def held(self) -> bool:
        """Whether a source sees it, which will say so when that ends."""
        return not self.endpoints.keys() <= {PEERS}

    def answered(self, node_id: str) -> None:
        """A node of that id is where this was dialled."""
        if self.seed:
            self.reached = node_id

    def begin_round(self) -> None:
        """Every endpoint is to be tried that is not being dialled already."""
        found = dict.fromkeys(e for endpoints in self.endpoints.values() for e in endpoints)
        busy = set(self.links.values())
        self.untried = [e for e in found if e not in busy][: limits.ENDPOINTS_MAX]

    def next_endpoints(self, count: int) -> list[str]:
        """Up to `count` that are to be dialled now."""
        count = max(0, min(count, limits.DIALS_EACH_MAX - len(self.links)))
        endpoints, self.untried = self.untried[:count], self.untried[count:]
        return endpoints


class Turns:
    """Contacts whose turn to be dialled has come, the likeliest first.

    Those that are credible; then news, of which the newest and the oldest take turns, so that one
    newcomer does not wait behind a flood, nor is kept waiting by one; then what was in vain before.
    """

    def __init__(self) -> None:
        self._credible: dict[str, Contact] = {}
        self._news: dict[str, Contact] = {}
        self._others: dict[str, Contact] = {}
        self._newest = False

    def __len__(self) -> int:
        return len(self._credible) + len(self._news) + len(self._others)

    def __contains__(self, key: str) -> bool:
        return any(key in turns for turns in (self._credible, self._news, self._others))

    def add(self, contact: Contact, *, news: bool) -> None:
        """Unless it waits already."""
        if contact.key in self:
            return
        if contact.credible:
            self._credible[contact.key] = contact
        elif news:
            self._news[contact.key] = contact
        else:
            self._others[contact.key] = contact

    def remove(self, key: str) -> None:
        for turns in (self._credible, self._news, self._others):
            turns.pop(key, None)

    def take(self) -> Contact:
        """The next one, which does not wait any more. There has to be one."""
        turns = self._credible or self._news or self._others
        if turns is self._news:
            self._newest = not self._newest
            if self._newest:
                return turns.popitem()[1]
        return turns.pop(next(iter(turns)))


class Contacts:
    """The table of contacts, bounded, and the queue of those whose turn to be dialled has come."""

    def __init__(self, jitter: Callable[[], float], dropped: Counter[str]) -> None:
        """`jitter` returns 0 to 1; what is refused is counted in `dropped`."""
        self.known: dict[str, Contact] = {}
        self.seeds: dict[str, Contact] = {}
        """Those of the known that are addresses."""
        self.waiting = Turns()
        """To be dialled as soon as there is room."""
        self.deadlines: Deadlines[str] = Deadlines()
        self.gone: dict[str, None] = {}
        """Ids of nodes that ended, oldest first."""
        self._strangers: dict[str, Contact] = {}
        """Those that were not credible when they came, nor since; oldest first."""
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
        contact = self.known.get(key) or self._make(key, name, seed)
        if contact is None:
            return
        if not seed:
            contact.forget_at = now + limits.FORGET_S
        if contact.endpoints.get(source) != endpoints:
            contact.endpoints[source] = endpoints
            self._look_at_credibility(contact)
            self._dial(contact)

    def withdrawn(self, key: str, source: str) -> None:
        """The source sees it no longer; what peers said of it ends with that."""
        contact = self.known.get(key)
        if contact is None or contact.endpoints.pop(source, None) is None:
            return
        if not contact.held:
            self._forget(contact)

    def introduced(self, key: str, name: str, endpoints: tuple[str, ...], now: float) -> None:
        """A peer spoke of another node; only of an unknown one is that worth anything."""
        if key in self.known or key in self.gone or not endpoints:
            return
        if len(self.known) >= limits.SIGHTINGS_MAX // 2:
            # What peers make up must not keep out what sources see.
            self._dropped["contacts full"] += 1
        else:
            self.seen(key, PEERS, endpoints, now, name=name)

    def up(self, key: str) -> None:
        """It is a peer now, and not dialled while it is one."""
        if (contact := self.known.get(key)) is not None:
            contact.attempts = 0
            contact.stopped = contact.refusal = ""
            contact.met = True
            self._look_at_credibility(contact)
            self._rest(contact)

    def lost(self, key: str, name: str, endpoints: tuple[str, ...], now: float) -> None:
        """It was a peer until now: it may come back where it was."""
        contact = self.known.get(key) or self._make(key, name, seed=False)
        if contact is not None:
            contact.endpoints[PEERS] = endpoints
            contact.met = True
            self._look_at_credibility(contact)
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
        """A dial came to nothing. The last one of the round decides how to go on.

        Somebody who refused would refuse again. But a seed is an address, where another node may
        be tomorrow; and a failure of CURVE (``handshake``) may have been one of the network.
        """
        contact.refusal = refusal or contact.refusal
        if contact.links or self.known.get(contact.key) is not contact:
            return
        if contact.untried:
            self.waiting.add(contact, news=False)
            return
        lasting = contact.refusal in LASTING and not contact.seed
        if lasting or contact.refusal == "self":
            contact.stopped = contact.refusal
            self._rest(contact)
            if not contact.held:
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
            if now >= contact.forget_at and not contact.held:
                self._forget(contact)
            elif not contact.stopped:
                contact.begin_round()
                self.waiting.add(contact, news=False)

    def resume(self, reason: str) -> None:
        """Dial again those that were stopped for that reason, which may no longer hold."""
        for contact in self.known.values():
            if contact.stopped == reason:
                self._dial(contact)

    def clear(self) -> None:
        for contact in list(self.known.values()):
            self._forget(contact)

    def _make(self, key: str, name: str, seed: bool) -> Contact | None:
        """A new contact. In a full table it takes the place of the oldest that nobody vouches for:
        a source that went on to make nodes up would else keep out all that come later."""
        if len(self.known) >= limits.SIGHTINGS_MAX:
            self._dropped["contacts full"] += 1
            oldest = next((c for c in self._strangers.values() if not c.links), None)
            if oldest is None:
                return None
            self._forget(oldest)
        contact = self.known[key] = Contact(key, name, seed)
        if seed:
            self.seeds[key] = contact
        else:
            self._strangers[key] = contact
        return contact

    def _look_at_credibility(self, contact: Contact) -> None:
        if contact.credible:
            self._strangers.pop(contact.key, None)

    def _dial(self, contact: Contact) -> None:
        contact.attempts = 0
        contact.stopped = ""
        self._rest(contact)
        contact.begin_round()
        self.waiting.add(contact, news=True)

    def _rest(self, contact: Contact) -> None:
        contact.untried = []
        self.waiting.remove(contact.key)
        self.deadlines.clear(contact.key)

    def _forget(self, contact: Contact) -> None:
        self._rest(contact)
        self.seeds.pop(contact.key, None)
        self._strangers.pop(contact.key, None)
        del self.known[contact.key]

    def _retry_seeds(self, node_id: str, now: float) -> None:
        for contact in self.seeds.values():
            if contact.reached == node_id and not contact.links:
                contact.reached = ""
                contact.attempts = 0
                self.retry(contact, now)
