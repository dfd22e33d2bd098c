"""Who is a peer: the state machine behind discovery, control links and liveness.

Takes events and `now` (monotonic seconds), returns effects (`mesh.peering`) for the shell to carry
out in order. No sockets, files, clock or threads; luck comes from the injected `nonce`.

Promises: discovery is a hint, and changes nothing about a live peer. A node is a peer once both
sides proved to be of the realm over the control link, and until that link, or the kernel, says
otherwise. Each peer has one link, the same at both ends, however many were dialled; its arrival is
told once. Nothing that a peer sends raises, and every table it can fill is bounded.

A link's states, and what moves it (everything else is counted and, on an accepted link, refused)::

    dialled     ── Dial ─▶ DIALLING ── Welcome ─▶ UP
    accepted    ── Hello ▶ WELCOMED ── Confirm ─▶ UP, or SPARE where another link is up

When two nodes dial each other at once, the one with the smaller id decides: it takes the link whose
handshake ends first. If that is its own, the other may think for a moment that its own was taken;
nothing came over that one (it is not `proven`), so it changes over without anybody noticing. A
Confirm from a peer whose link *was* proven when the new one was dialled says that the peer has
lost it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import chain, islice

from mesh import limits
from mesh.contacts import Contacts
from mesh.discovery.source import Announcement, Sighting
from mesh.errors import InvalidName
from mesh.handshake import Role, announce, is_tagged_by, proof, proves
from mesh.links import ControlLink, Links, State
from mesh.message import Untrusted
from mesh.names import check_node_name
from mesh.peering import (
    Effect,
    Link,
    Peer,
    Send,
    UntrustedSeen,
    address_of,
    reachable,
)
from mesh.roster import Roster
from mesh.sockets.control import (
    PROTOCOL,
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

_NODE_ID = re.compile("[0-9a-f]{16}")
_LASTING = frozenset({"version", "realm", "secret", "self"})
"""Refusals that would only be repeated."""
_REFUSALS = _LASTING | {"full", "unknown"}


class Membership:
    """This node's view of the others.

    The shell calls it from one thread, with a `now` that never goes back, and carries out what it
    returns. `same_host` says whether the node of a card can be reached over ipc.
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
        self.card = card
        self.dropped: Counter[str] = Counter()
        """What was refused or thrown away, by reason."""
        self._realm = realm
        self._key = key
        self._heartbeat_s = heartbeat_s
        self._nonce = nonce
        self._same_host = same_host
        self._effects: list[Effect] = []
        self._roster = Roster(heartbeat_s, self._effects, self.dropped, now)
        self._contacts = Contacts(lambda: nonce()[0] / 255, self.dropped)
        self._untrusted: dict[str, Untrusted] = {}
        self._links = Links(self._effects)
        self._told_unknown: dict[Link, None] = {}
        self._left = False

    # What can be asked

    @property
    def peers(self) -> Mapping[str, Peer]:
        """Peers that are up, by node id."""
        return self._roster.peers

    @property
    def untrusted(self) -> Mapping[str, Untrusted]:
        """Those that showed they do not know the secret or the protocol, by id or address."""
        return self._untrusted

    @property
    def round_trip_s(self) -> dict[str, float]:
        """The last ping's round trip to each peer that answered one, by node id."""
        peers = self._roster.peers.items()
        return {i: p.round_trip_s for i, p in peers if p.round_trip_s is not None}

    def announcement(self, card: Card) -> Announcement:
        """What sources are to announce of `card`, this node's own."""
        return announce(card, self._realm, self._key)

    def next_deadline(self) -> float | None:
        """When `tick` has something to do next; it may be called earlier."""
        tables = (self._roster.deadlines, self._links.deadlines, self._contacts.deadlines)
        return min((at for at in (table.next() for table in tables) if at is not None), default=None)

    # Events

    def sighted(self, sighting: Sighting, now: float) -> list[Effect]:
        """A discovery source saw somebody, or no longer does."""
        if self._left:
            return []
        a, source = sighting.announcement, sighting.source
        if source == "seeds":
            for endpoint in reachable(a.endpoints, ipc=True):
                if sighting.present:
                    self._contacts.seen(endpoint, source, (endpoint,), now, seed=True)
                else:
                    self._contacts.withdrawn(endpoint, source)
        elif not _NODE_ID.fullmatch(a.id):
            self.dropped["sighting"] += 1
        elif a.realm != self._realm:
            self.dropped["realm"] += 1
        elif a.id == self.card.id:
            pass
        elif not sighting.present:
            self._untrusted.pop(a.id, None)
            self._contacts.withdrawn(a.id, source)
        elif a.id in self._contacts.gone:
            self.dropped["gone"] += 1
        elif not is_tagged_by(self._key, a):
            self._distrust(a.id, a.name, next(iter(a.endpoints), ""), "secret")
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
                self._said_hello(link, message, now, address)
            else:
                self._unexpected(link, message)
            return self._done(now)
        match known.state, message:
            case State.DIALLING, Welcome() as welcome:
                self._said_welcome(known, welcome, now)
            case State.WELCOMED, Confirm() as confirm:
                self._said_confirm(known, confirm, now)
            case (State.DIALLING | State.WELCOMED), Refuse() as refuse:
                self._refused(known, refuse.reason, now)
            case State.UP, _:
                self._said(self.peers[known.node_id], message, now)
            case State.SPARE, _:
                self.dropped["spare link"] += 1
            case _:
                self._unexpected(link, message)
        return self._done(now)

    def link_failed(self, link: Link, reason: str, now: float) -> list[Effect]:
        """A dial failed, or a link broke; ``handshake``: CURVE refused, so there is no common
        secret."""
        known = self._links.table.get(link)
        if known is None:
            return []
        if known.state is State.UP:
            self._down(self.peers[known.node_id], "reset", now)
        elif reason == "handshake":
            self._refused(known, "secret", now)
        else:
            self._failed(known, now)
        return self._done(now)

    def process_died(self, peer_id: str, now: float) -> list[Effect]:
        """The kernel says that the process of that node has ended."""
        peer = self.peers.get(peer_id)
        if peer is not None:
            self._down(peer, "died", now)
        else:
            self._bury(peer_id, now)
        return self._done(now)

    def offer(self, add: tuple[Offer, ...], drop: tuple[int, ...]) -> list[Effect]:
        """This node's own offers changed: tell all peers, and in full whoever becomes one."""
        self._roster.offer(add, drop)
        return self._take()

    def moved(self, card: Card) -> list[Effect]:
        """This node's own endpoints changed."""
        self.card = card
        self._contacts.resume("self")
        self._roster.tell_all([Moved(card)])
        return self._take()

    def tick(self, now: float) -> list[Effect]:
        """Time has passed: to be called at `next_deadline`, or a little later."""
        if self._left:
            return []
        due = self.next_deadline()
        if due is not None and now - due > self._heartbeat_s:
            self._roster.resume(now)
        for peer in self._roster.silent(now):
            self._down(peer, "silent", now)
        while (key := self._links.deadlines.take(now)) is not None:
            link = self._links.table[key]
            if link.state is not State.SPARE:
                self.dropped["handshake timeout"] += 1
            self._failed(link, now)
        self._contacts.due(now)
        return self._done(now)

    def leave(self, reason: str, now: float) -> list[Effect]:
        """This node goes: tell all peers. Nothing happens after this."""
        if not self._left:
            self._left = True
            self._roster.tell_all([Bye(reason[:255])])
            self._roster.clear()
            self._contacts.clear()
            for key in list(self._links.table):
                self._links.hang_up(key)
        return self._take()

    # The handshake

    def _said_hello(self, key: bytes, hello: Hello, now: float, host: str) -> None:
        card = hello.card
        refusal = self._objection(hello)
        if refusal == "version":
            address = next(iter(card.endpoints), host)
            self._distrust(card.id, card.name, address, "version")
        if refusal:
            self.dropped[refusal] += 1
            detail = f"protocol {PROTOCOL}" if refusal == "version" else ""
            self._effects.append(Send(key, Refuse(refusal, detail)))
            return
        if card.id in self._contacts.gone or not _is_label(card.name):
            self.dropped["gone" if card.id in self._contacts.gone else "card"] += 1
            return
        peer = self.peers.get(card.id)
        if peer is not None and not peer.proven and self._decides(peer):
            return  # our own link to it is about to be up there too
        self._told_unknown.pop(key, None)
        link = self._links.accept(key, card, host, self._nonce(), now)
        link.knows = frozenset(hello.knows)
        link.instead_of = peer.link if peer is not None and peer.proven else None
        link.expected = self._proof(Role.DIALLER, hello.nonce, link.nonce, card.id, self.card.id)
        ours = self._proof(Role.ACCEPTOR, hello.nonce, link.nonce, card.id, self.card.id)
        self._effects.append(Send(key, Welcome(self.card, link.nonce, ours, self._knows())))

    def _objection(self, hello: Hello) -> str:
        if hello.protocol != PROTOCOL:
            return "version"
        if hello.realm != self._realm:
            return "realm"
        if hello.card.id == self.card.id:
            return "self"
        half_open = self._links.count(State.WELCOMED) + self._links.count(State.SPARE)
        if half_open >= limits.HANDSHAKES_MAX or self._is_full_for(hello.card.id):
            return "full"
        return ""

    def _said_welcome(self, link: ControlLink, welcome: Welcome, now: float) -> None:
        card, contact = welcome.card, link.contact
        assert contact is not None
        link.card, link.knows = card, frozenset(welcome.knows)
        args = (link.nonce, welcome.nonce, self.card.id, card.id)
        if card.id == self.card.id:
            self._refused(link, "self", now)
        elif not proves(welcome.proof, self._proof(Role.ACCEPTOR, *args)):
            self._effects.append(Send(link.key, Refuse("secret")))
            self._refused(link, "secret", now)
        elif card.id in self._contacts.gone or not _is_label(card.name):
            self.dropped["gone" if card.id in self._contacts.gone else "card"] += 1
            self._failed(link, now)
        elif self._is_full_for(card.id):
            self._effects.append(Send(link.key, Refuse("full")))
            self.dropped["full"] += 1
            self._failed(link, now)
        elif card.id in self.peers:
            contact.answered(card.id)
            self._failed(link, now)
        else:
            contact.answered(card.id)
            self._effects.append(Send(link.key, Confirm(self._proof(Role.DIALLER, *args))))
            self._up(link, now)

    def _said_confirm(self, link: ControlLink, confirm: Confirm, now: float) -> None:
        peer = self.peers.get(link.node_id)
        if not proves(confirm.proof, link.expected):
            self._effects.append(Send(link.key, Refuse("secret")))
            self._refused(link, "secret", now)
        elif link.node_id in self._contacts.gone:
            self.dropped["gone"] += 1
            self._links.hang_up(link.key)
        elif self._is_full_for(link.node_id):
            self.dropped["full"] += 1
            self._effects.append(Send(link.key, Refuse("full")))
            self._links.hang_up(link.key)
        elif peer is None:
            self._up(link, now)
        elif not peer.proven and not self._decides(peer):
            self._links.hang_up(peer.link)
            self._links.up(link)
            self._roster.change_over(peer, link.key, link.knows, now)
        elif peer.proven and link.instead_of == peer.link:
            self._down(peer, "reset", now)
            self._up(link, now)
        else:
            self._links.spare(link, now)

    def _refused(self, link: ControlLink, reason: str, now: float) -> None:
        """One side said, or found out, that this link makes no peers."""
        contact = link.contact
        self.dropped[f"refused: {reason if reason in _REFUSALS else 'other'}"] += 1
        if reason in ("secret", "version"):
            card_id, name, address = link.node_id, "", link.endpoint
            if link.card is not None:
                name = link.card.name
                address = address if contact else next(iter(link.card.endpoints), address)
            elif contact is not None and not contact.seed:
                card_id, name = contact.key, contact.name
            self._distrust(card_id, name, address, reason)
        self._failed(link, now, reason if reason in _LASTING else "")

    def _failed(self, link: ControlLink, now: float, refusal: str = "") -> None:
        self._links.hang_up(link.key)
        if link.contact is not None:
            self._contacts.failed(link.contact, now, refusal)

    def _start_dials(self, now: float) -> None:
        waiting = self._contacts.waiting
        while waiting:
            key, contact = next(iter(waiting.items()))
            addresses = contact.addresses()
            busy = self._links.count(State.DIALLING)
            if busy and busy + len(addresses) > limits.DIALS_MAX:
                return  # until one of them ends
            del waiting[key]
            if (contact.reached if contact.seed else key) in self.peers:
                continue
            for endpoint in addresses:
                link = self._links.dial(contact, endpoint, self._nonce(), now)
                hello = Hello(PROTOCOL, self._realm, self.card, link.nonce, self._knows())
                self._effects.append(Send(link.key, hello))
            if not contact.links:
                self._contacts.retry(contact, now)

    # Peers

    def _up(self, link: ControlLink, now: float) -> None:
        assert link.card is not None
        node_id = link.card.id
        self._links.up(link)
        if (contact := self._contacts.known.get(node_id)) is not None:
            for other in list(contact.links):
                self._links.hang_up(other)
        self._contacts.up(node_id)
        if link.contact is not None:
            if link.contact.seed:
                self._contacts.up(link.contact.key)
            elif link.contact.key != node_id:
                self._contacts.failed(link.contact, now)  # somebody else lives there now
        self._untrusted.pop(node_id, None)
        peer = _peer(link, self._same_host(link.card), now)
        self._roster.add(peer, link.knows, now)

    def _down(self, peer: Peer, reason: str, now: float) -> None:
        self._roster.remove(peer, reason)
        self._links.hang_up(peer.link)
        if reason in ("bye", "died"):
            self._bury(peer.id, now)
        else:
            endpoints = reachable(peer.endpoints, ipc=peer.transport == "ipc")
            self._contacts.lost(peer.id, peer.card.name, endpoints, now)

    def _bury(self, node_id: str, now: float) -> None:
        if (contact := self._contacts.known.get(node_id)) is not None:
            for link in list(contact.links):
                self._links.hang_up(link)
        self._contacts.ended(node_id, now)

    def _said(self, peer: Peer, message: ControlMessage, now: float) -> None:
        peer.heard = now
        peer.proven = True
        match message:
            case Bye():
                self._down(peer, "bye", now)
            case Refuse("unknown"):
                self._down(peer, "reset", now)
            case Refuse(reason):
                self._down(peer, reason if reason in _REFUSALS else "refused", now)
            case Peers(introductions):
                for i in introductions[: limits.INTRODUCTIONS_MAX]:
                    if i.id != self.card.id:
                        endpoints = reachable(i.endpoints, ipc=peer.transport == "ipc")
                        self._contacts.introduced(i.id, i.name, endpoints, now)
            case _ if not self._roster.heard(peer, message, now):
                self.dropped["unexpected"] += 1

    # What several of them need

    def _unexpected(self, key: Link, message: ControlMessage) -> None:
        """Nothing that may be said on that link; who believes it is up must learn otherwise."""
        self.dropped["unexpected"] += 1
        if isinstance(key, int) or isinstance(message, Bye | Refuse) or key in self._told_unknown:
            return
        if key in self._links.table:
            self._links.hang_up(key)
        self._told_unknown[key] = None
        if len(self._told_unknown) > limits.HANDSHAKES_MAX:
            del self._told_unknown[next(iter(self._told_unknown))]
        self._effects.append(Send(key, Refuse("unknown")))

    def _distrust(self, node_id: str, name: str, address: str, reason: str) -> None:
        seen = Untrusted(node_id, name[:255], address[:255], reason)
        key = node_id or address
        if self._untrusted.get(key) == seen or node_id in self.peers:
            return
        if key not in self._untrusted and len(self._untrusted) >= limits.UNTRUSTED_MAX:
            self.dropped["untrusted full"] += 1
            return
        self._untrusted[key] = seen
        self._effects.append(UntrustedSeen(seen))

    def _decides(self, peer: Peer) -> bool:
        """Whether we dialled it and our choice holds, should both have dialled."""
        return peer.dialled and self.card.id < peer.id

    def _is_full_for(self, node_id: str) -> bool:
        return len(self.peers) >= limits.PEERS_MAX and node_id not in self.peers

    def _knows(self) -> tuple[str, ...]:
        contacts = (c.key for c in self._contacts.known.values() if not c.seed)
        arriving = (li.node_id for li in self._links.table.values() if li.state is State.WELCOMED)
        ids = dict.fromkeys(chain(self.peers, contacts, arriving))
        return tuple(islice(ids, limits.INTRODUCTIONS_MAX))

    def _proof(
        self, role: Role, dialler_nonce: bytes, acceptor_nonce: bytes, dialler: str, acceptor: str
    ) -> bytes:
        return proof(
            self._key,
            role,
            realm=self._realm,
            dialler_id=dialler,
            acceptor_id=acceptor,
            dialler_nonce=dialler_nonce,
            acceptor_nonce=acceptor_nonce,
        )

    def _done(self, now: float) -> list[Effect]:
        self._start_dials(now)
        return self._take()

    def _take(self) -> list[Effect]:
        effects = self._effects.copy()
        self._effects.clear()
        return effects


def _peer(link: ControlLink, same_host: bool, now: float) -> Peer:
    assert link.card is not None
    dialled = link.contact is not None
    host = "" if dialled else link.endpoint
    address = (
        link.endpoint
        if dialled
        else address_of(link.card, same_host=same_host, remote_host=host)
    )
    ipc = same_host or address.startswith("ipc://")
    return Peer(
        link.card,
        link.key,
        dialled,
        address,
        "ipc" if ipc else "tcp",
        same_host,
        host,
        heard=now,
        ping_at=now,
    )


def _is_label(name: str) -> bool:
    try:
        check_node_name(name)
    except InvalidName:
        return False
    return True
