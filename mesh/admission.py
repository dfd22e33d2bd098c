"""How a node becomes a peer, and stops being one: dialling, the handshake, refusals.

Part of `mesh.membership`, which says when. Everything asked of the shell is appended to one list
of effects, in order. No I/O, no clock.

A link's states, and what moves it::

    dialled   ── Dial ──▶ DIALLING ── Welcome ──▶ UP
    accepted  ── Hello ─▶ WELCOMED ── Confirm ──▶ UP, or SPARE where another link is up

Two nodes may dial each other at once. Then the one with the smaller id decides: it takes the link
whose handshake ends first. If that is its own, the other may have thought for a moment that its
own was taken; nothing came over that one (it is not `proven`), so it changes over and nobody
notices. A Confirm from a peer whose link *was* proven when the new one was dialled says something
else: that the peer has lost it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice

from mesh import limits
from mesh.contacts import Contacts
from mesh.links import KnownLink, Links, State
from mesh.message import Untrusted
from mesh.names import printable
from mesh.peering import Effect, Link, Peer, Send, UntrustedSeen, is_sound_card, reachable
from mesh.realm import Encounter, Realm, Role, proves
from mesh.roster import Roster
from mesh.sockets.control import (
    PROTOCOL,
    Bye,
    Card,
    Confirm,
    ControlMessage,
    Hello,
    Moved,
    Refuse,
    Welcome,
)

REFUSALS = frozenset({"version", "realm", "secret", "self", "full", "unknown", "handshake"})


class Admission:
    """Moves nodes between the tables: contacts, links, peers and the untrusted."""

    def __init__(
        self,
        card: Card,
        realm: Realm,
        roster: Roster,
        *,
        nonce: Callable[[], bytes],
        same_host: Callable[[Card], bool],
        effects: list[Effect],
        dropped: Counter[str],
    ) -> None:
        self.card = card
        self.links = Links(effects)
        self.contacts = Contacts(lambda: nonce()[0] / 255, dropped)
        self.untrusted: dict[str, Untrusted] = {}
        self._realm = realm
        self._roster = roster
        self._nonce = nonce
        self._same_host = same_host
        self._effects = effects
        self._dropped = dropped
        self._told_unknown: dict[Link, None] = {}

    # The handshake

    def may_dial(self) -> bool:
        """Whether it is the turn of a contact, and there is room for its link."""
        return len(self.contacts.waiting) > 0 and self._free_dials() > 0

    def dial_waiting(self, now: float) -> None:
        """Dial each contact whose turn it is, as far as there is room.

        Where that is scarce they share it. Those who are there answer at once, and give it back;
        an address that swallows everything costs its place for as long as a handshake may take.
        """
        knows = self._knows() if self.may_dial() else ()
        while self.may_dial():
            contact = self.contacts.waiting.take()
            if (contact.reached if contact.seed else contact.key) in self._roster.peers:
                continue
            free = self._free_dials()
            share = max(limits.DIALS_EACH_MIN, free // (len(self.contacts.waiting) + 1))
            for endpoint in contact.next_endpoints(min(free, share)):
                link = self.links.dial(contact, endpoint, self.card, self._nonce(), now)
                hello = Hello(PROTOCOL, self._realm.name, self.card, link.nonce, knows)
                self._effects.append(Send(link.key, hello))
            if not contact.links:
                self.contacts.retry(contact, now)

    def said_hello(self, key: bytes, hello: Hello, now: float, host: str) -> None:
        card = hello.card
        if refusal := self._objection(hello):
            self._dropped[refusal] += 1
            if refusal == "version":
                self.distrust(card.id, card.name, next(iter(card.endpoints), host), refusal)
            self._effects.append(Send(key, Refuse(refusal, f"protocol {PROTOCOL}")))
            return
        if not self._may_be_peer(card):
            return
        peer = self._roster.peers.get(card.id)
        link = self.links.accept(key, card, host, self.card, self._nonce(), now)
        link.knows = frozenset(hello.knows)
        if peer is not None and peer.proven:
            link.instead_of = peer.link
        encounter = Encounter(card.id, self.card.id, hello.nonce, link.nonce)
        link.expected = self._realm.proof(Role.DIALLER, encounter)
        proof = self._realm.proof(Role.ACCEPTOR, encounter)
        self._effects.append(Send(key, Welcome(self.card, link.nonce, proof, self._knows())))

    def said_welcome(self, link: KnownLink, welcome: Welcome, now: float) -> None:
        card, contact = welcome.card, link.contact
        assert contact is not None
        link.card, link.knows = card, frozenset(welcome.knows)
        encounter = Encounter(self.card.id, card.id, link.nonce, welcome.nonce)
        if card.id == self.card.id:
            self.refused(link, "self", now)
        elif not proves(welcome.proof, self._realm.proof(Role.ACCEPTOR, encounter)):
            self._refuse(link, "secret", now)
        elif not self._may_be_peer(card):
            self.failed(link, now)
        elif self._is_full_for(card.id):
            self._refuse(link, "full", now)
        elif card.id in self._roster.peers:
            contact.answered(card.id)
            self.failed(link, now)
        else:
            contact.answered(card.id)
            confirm = Confirm(self._realm.proof(Role.DIALLER, encounter))
            self._effects.append(Send(link.key, confirm))
            self._up(link, now)

    def said_confirm(self, link: KnownLink, confirm: Confirm, now: float) -> None:
        assert link.card is not None
        peer = self._roster.peers.get(link.node_id)
        if not proves(confirm.proof, link.expected):
            self._refuse(link, "secret", now)
        elif not self._may_be_peer(link.card):
            self.failed(link, now)
        elif self._is_full_for(link.node_id):
            self._refuse(link, "full", now)
        elif peer is None:
            self._up(link, now)
        elif not peer.proven and not self._decides(peer):
            self.links.hang_up(peer.link)
            self.links.up(link)
            self._roster.change_over(peer, link, now)
            self._settle(link)
        elif peer.proven and link.instead_of == peer.link:
            self.down(peer, "reset", now)
            self._up(link, now)
        else:
            self.links.spare(link, now)

    def refused(self, link: KnownLink, reason: str, now: float) -> None:
        """One side found out that this link makes no peers."""
        self._dropped[reason if reason in REFUSALS else "refused"] += 1
        if reason in ("secret", "version", "handshake"):
            contact, card = link.contact, link.card
            if card is not None:
                address = link.endpoint if contact else next(iter(card.endpoints), "")
                self.distrust(card.id, card.name, address, reason)
            elif contact is not None:
                node_id = "" if contact.seed else contact.key
                self.distrust(node_id, contact.name, link.endpoint, reason)
        self.failed(link, now, reason if reason in REFUSALS - {"full", "unknown"} else "")

    def failed(self, link: KnownLink, now: float, refusal: str = "") -> None:
        """A link that was never up comes to nothing."""
        self.links.hang_up(link.key)
        if link.contact is not None:
            self.contacts.failed(link.contact, now, refusal)

    def unexpected(self, key: Link, message: ControlMessage) -> None:
        """That may not be said on that link: who believes it is up must learn otherwise, once."""
        self._dropped["unexpected"] += 1
        if isinstance(key, int) or isinstance(message, Bye | Refuse) or key in self._told_unknown:
            return
        if key in self.links.table:
            self.links.hang_up(key)
        self._told_unknown[key] = None
        if len(self._told_unknown) > limits.HANDSHAKES_MAX:
            del self._told_unknown[next(iter(self._told_unknown))]
        self._effects.append(Send(key, Refuse("unknown")))

    def distrust(self, node_id: str, name: str, address: str, reason: str) -> None:
        """Remember that somebody is not of the realm; nothing else is done with them.

        Name and address are whatever they said.
        """
        name, address = printable(name)[:255], printable(address)[:255]
        seen = Untrusted(node_id, name, address, reason)
        key = node_id or address
        if self.untrusted.get(key) == seen or node_id in self._roster.peers:
            return
        if key not in self.untrusted and len(self.untrusted) >= limits.UNTRUSTED_MAX:
            self._dropped["untrusted full"] += 1
            return
        self.untrusted[key] = seen
        self._effects.append(UntrustedSeen(seen))

    # Peers

    def leave(self, reason: str) -> None:
        """Say goodbye to peers, and to those that may be about to take this node for one."""
        for link in list(self.links.table.values()):
            if link.state in (State.UP, State.WELCOMED):
                self._effects.append(Send(link.key, Bye(reason)))
            self.links.hang_up(link.key)
        self.contacts.clear()
        self._roster.clear()

    def down(self, peer: Peer, reason: str, now: float) -> None:
        """A peer is one no more; it may come back unless it ended."""
        self._roster.remove(peer, reason)
        self.links.hang_up(peer.link)
        if reason in ("bye", "died"):
            self.bury(peer.id, now)
        else:
            endpoints = reachable(peer.endpoints, ipc=peer.transport == "ipc")
            self.contacts.lost(peer.id, peer.card.name, endpoints, now)

    def bury(self, node_id: str, now: float) -> None:
        """That node ended."""
        if (contact := self.contacts.known.get(node_id)) is not None:
            for link in list(contact.links):
                self.links.hang_up(link)
        self.contacts.ended(node_id, now)

    def _up(self, link: KnownLink, now: float) -> None:
        assert link.card is not None
        node_id = link.card.id
        self.links.up(link)
        if (contact := self.contacts.known.get(node_id)) is not None:
            for other in list(contact.links):
                self.links.hang_up(other)
        self.contacts.up(node_id)
        if link.contact is not None:
            if link.contact.seed:
                self.contacts.up(link.contact.key)
            elif link.contact.key != node_id:
                self.contacts.failed(link.contact, now)  # somebody else lives there now
            self.untrusted.pop(link.endpoint, None)
        self.untrusted.pop(node_id, None)
        peer = link.peer(same_host=self._same_host(link.card), now=now)
        self._roster.add(peer, link.knows, now)
        self._settle(link)

    def _settle(self, link: KnownLink) -> None:
        """The handshake is over; this node may have moved meanwhile."""
        link.knows = frozenset()
        if link.told != self.card:
            self._effects.append(Send(link.key, Moved(self.card)))

    # Questions

    def _objection(self, hello: Hello) -> str:
        """Why who says this cannot be a peer, or nothing."""
        if hello.protocol != PROTOCOL:
            return "version"
        if hello.realm != self._realm.name:
            return "realm"
        if hello.card.id == self.card.id:
            return "self"
        half_open = self.links.count(State.WELCOMED) + self.links.count(State.SPARE)
        if half_open >= limits.HANDSHAKES_MAX or self._is_full_for(hello.card.id):
            return "full"
        return ""

    def _refuse(self, link: KnownLink, reason: str, now: float) -> None:
        self._effects.append(Send(link.key, Refuse(reason)))
        self.refused(link, reason, now)

    def _may_be_peer(self, card: Card) -> bool:
        if card.id in self.contacts.gone:
            self._dropped["gone"] += 1
            return False
        if not is_sound_card(card):
            self._dropped["card"] += 1
            return False
        return True

    def _decides(self, peer: Peer) -> bool:
        """Whether we dialled it and our choice holds, should both have dialled."""
        return peer.dialled and self.card.id < peer.id

    def _free_dials(self) -> int:
        return limits.DIALS_MAX - self.links.count(State.DIALLING)

    def _is_full_for(self, node_id: str) -> bool:
        peers = self._roster.peers
        return len(peers) >= limits.PEERS_MAX and node_id not in peers

    def _knows(self) -> tuple[str, ...]:
        """Whom we need no introduction to: peers, and those who are about to be."""
        arriving = dict.fromkeys(link.node_id for link in self.links.in_state(State.WELCOMED))
        ids: dict[str, object] = {**self._roster.peers, **self.contacts.known, **arriving}
        for address in self.contacts.seeds:
            del ids[address]
        return tuple(islice(ids, limits.INTRODUCTIONS_MAX))
