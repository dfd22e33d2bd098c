"""Who is a peer: the state machine behind discovery, control links and liveness.

Takes events and `now` (monotonic seconds), returns effects (`mesh.peering`) for the shell to carry
out in order. No sockets, files, clock or threads; luck comes from the injected `nonce`.

Promises: discovery is a hint, and changes nothing about a live peer. A node is a peer once both
sides proved over the control link to be of the realm, and until that link, or the kernel, says
otherwise. Each peer has one link, the same at both ends, however many were dialled; its arrival is
told once. Nothing that a peer sends raises, and every table it can fill is bounded.

The parts: `mesh.contacts` (whom to dial), `mesh.links` and `mesh.admission` (the handshake),
`mesh.realm` (its proofs), `mesh.roster` (peers that are up).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from mesh import limits
from mesh.admission import REFUSALS, Admission
from mesh.discovery.plausible import is_node_id
from mesh.discovery.source import Announcement, Sighting
from mesh.links import State
from mesh.message import Untrusted
from mesh.peering import Effect, Link, Peer, reachable
from mesh.realm import Realm
from mesh.roster import Roster
from mesh.sockets.control import (
    Bye,
    Card,
    Confirm,
    ControlMessage,
    Hello,
    Moved,
    Offer,
    Peers,
    Refuse,
    Welcome,
)


class Membership:
    """This node's view of the others.

    The shell calls it from one thread, with a `now` that never goes back, and carries out what it
    returns before the next call. `same_host` says whether the node of a card can be reached over
    ipc; `nonce` returns 16 random bytes.
    """

    def __init__(
        self,
        card: Card,
        *,
        realm: str,
        key: bytes | None,
        heartbeat_s: float,
        nonce: Callable[[], bytes],
        same_host: Callable[[Card], bool],
        now: float,
    ) -> None:
        self.dropped: Counter[str] = Counter()
        """What was refused or thrown away, by reason."""
        self._heartbeat_s = heartbeat_s
        self._effects: list[Effect] = []
        self._realm = Realm(realm, key)
        self._roster = Roster(heartbeat_s, self._effects, self.dropped, now)
        self._admission = Admission(
            card,
            self._realm,
            self._roster,
            nonce=nonce,
            same_host=same_host,
            effects=self._effects,
            dropped=self.dropped,
        )
        self._links = self._admission.links
        self._contacts = self._admission.contacts
        self._now = now
        self._left = False

    # What can be asked

    @property
    def card(self) -> Card:
        """This node's own."""
        return self._admission.card

    @property
    def peers(self) -> Mapping[str, Peer]:
        """Peers that are up, by node id."""
        return self._roster.peers

    @property
    def untrusted(self) -> Mapping[str, Untrusted]:
        """Those that showed they do not know the secret or the protocol, by id or address."""
        return self._admission.untrusted

    @property
    def round_trip_s(self) -> dict[str, float]:
        """The last ping's round trip to each peer that answered one, by node id."""
        peers = self._roster.peers.items()
        return {i: p.round_trip_s for i, p in peers if p.round_trip_s is not None}

    def announcement(self, card: Card) -> Announcement:
        """What sources are to announce of `card`, this node's own."""
        return self._realm.announce(card)

    def next_deadline(self) -> float | None:
        """When `tick` has something to do next; it may be called earlier."""
        if self._admission.may_dial():
            return self._now
        return self._next_timer()

    # Events

    def sighted(self, sighting: Sighting, now: float) -> list[Effect]:
        """A discovery source saw somebody, or no longer does."""
        if self._left:
            return []
        a, source = sighting.announcement, sighting.source
        if source == "seeds":
            self._sighted_seed(sighting, now)
        elif not is_node_id(a.id):
            self.dropped["sighting"] += 1
        elif a.id == self.card.id:
            pass  # what somebody says of this node is no news
        elif not sighting.present:
            self._admission.untrusted.pop(a.id, None)
            self._contacts.withdrawn(a.id, source)
        elif a.realm != self._realm.name:
            self.dropped["realm"] += 1
        elif a.id in self._contacts.gone:
            self.dropped["gone"] += 1
        elif not self._realm.trusts(a):
            self.dropped["secret"] += 1
            self._admission.distrust(a.id, a.name, next(iter(a.endpoints), ""), "secret")
        else:
            endpoints = reachable(a.endpoints, ipc=source == "local")
            self._contacts.seen(a.id, source, endpoints, now, name=a.name)
        return self._done(now)

    def received(
        self, link: Link, message: ControlMessage, now: float, *, address: str = ""
    ) -> list[Effect]:
        """A message came over `link`; `address` is the remote IP of an accepted tcp link."""
        if self._left:
            return []
        known = self._links.table.get(link)
        if known is None:
            if isinstance(message, Hello) and isinstance(link, bytes):
                self._admission.said_hello(link, message, now, address)
            else:
                self._admission.unexpected(link, message)
            return self._done(now)
        match known.state, message:
            case State.UP, _:
                self._said(self.peers[known.node_id], message, now)
            case State.DIALLING, Welcome() as welcome:
                self._admission.said_welcome(known, welcome, now)
            case State.WELCOMED, Confirm() as confirm:
                self._admission.said_confirm(known, confirm, now)
            case State.DIALLING | State.WELCOMED, Refuse(reason):
                self._admission.refused(known, reason, now)
            case State.SPARE, _:
                self.dropped["second link"] += 1
            case _:
                self._admission.unexpected(link, message)
        return self._done(now)

    def link_failed(self, link: Link, reason: str, now: float) -> list[Effect]:
        """A dial failed or a link broke; ``handshake``: CURVE did, perhaps for want of a common
        secret, since libzmq does not tell."""
        known = self._links.table.get(link)
        if self._left or known is None:
            return []
        if known.state is State.UP:
            self._admission.down(self.peers[known.node_id], "reset", now)
        elif reason == "handshake":
            self._admission.refused(known, "handshake", now)
        else:
            self._admission.failed(known, now)
        return self._done(now)

    def process_died(self, peer_id: str, now: float) -> list[Effect]:
        """The kernel says that the process of that node has ended."""
        if self._left:
            return []
        peer = self.peers.get(peer_id)
        if peer is not None:
            self._admission.down(peer, "died", now)
        else:
            self._admission.bury(peer_id, now)
        return self._done(now)

    def offer(self, add: tuple[Offer, ...], drop: tuple[int, ...]) -> list[Effect]:
        """This node's own offers changed: tell all peers, and in full whoever becomes one."""
        self._roster.offer(add, drop)
        return self._take()

    def moved(self, card: Card) -> list[Effect]:
        """This node's own endpoints changed. A seed that named it may be another node now."""
        self._admission.card = card
        self._contacts.resume("self")
        self._roster.tell_all([Moved(card)])
        return self._take()

    def tick(self, now: float) -> list[Effect]:
        """Time has passed: to be called at `next_deadline`, or a little later.

        All dialling starts here and not with what is seen, so that a dial can tell of everybody
        whom the same batch of sightings brought, and nobody introduces them again.
        """
        if self._left:
            return []
        due = self._next_timer()
        if due is not None and now - due > self._heartbeat_s:
            self._roster.resume(now)
        for peer in self._roster.silent(now):
            self._admission.down(peer, "silent", now)
        while (key := self._links.deadlines.take(now)) is not None:
            link = self._links.table[key]
            if link.node_id not in self.peers:
                self.dropped["handshake timeout"] += 1
            self._admission.failed(link, now)
        self._contacts.due(now)
        self._admission.dial_waiting(now)
        return self._done(now)

    def leave(self, reason: str) -> list[Effect]:
        """This node goes: tell all peers. Nothing happens after this."""
        if not self._left:
            self._left = True
            self._admission.leave(reason[:255])
        return self._take()

    # What they mean

    def _sighted_seed(self, sighting: Sighting, now: float) -> None:
        for endpoint in reachable(sighting.announcement.endpoints, ipc=True):
            if sighting.present:
                self._contacts.seen(endpoint, sighting.source, (endpoint,), now, seed=True)
            else:
                self._contacts.withdrawn(endpoint, sighting.source)

    def _said(self, peer: Peer, message: ControlMessage, now: float) -> None:
        if self._roster.heard(peer, message, now):
            return
        match message:
            case Bye():
                self._admission.down(peer, "bye", now)
            case Refuse("unknown"):
                self._admission.down(peer, "reset", now)
            case Refuse(reason):
                self._admission.down(peer, reason if reason in REFUSALS else "refused", now)
            case Peers(introductions):
                for i in introductions[: limits.INTRODUCTIONS_MAX]:
                    if i.id != self.card.id and i.id not in self.peers:
                        endpoints = reachable(i.endpoints, ipc=peer.transport == "ipc")
                        self._contacts.introduced(i.id, i.name, endpoints, now)
            case _:
                self.dropped["unexpected"] += 1

    def _next_timer(self) -> float | None:
        tables = (self._roster.deadlines, self._links.deadlines, self._contacts.deadlines)
        times = [at for table in tables if (at := table.next()) is not None]
        return min(times) if times else None

    def _done(self, now: float) -> list[Effect]:
        self._now = now
        return self._take()

    def _take(self) -> list[Effect]:
        effects = self._effects.copy()
        self._effects.clear()
        return effects
