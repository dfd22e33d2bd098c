"""The peers that are up: what they offer, what is offered to them, and whether they still live.

Part of `mesh.membership`, which decides who comes and goes. Everything asked of the shell is
appended to one list of effects, in order. No I/O, no clock, no discovery.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mesh import limits
from mesh.deadlines import Deadlines
from mesh.links import KnownLink
from mesh.peering import (
    Acknowledged,
    Effect,
    Peer,
    PeerDown,
    PeerMoved,
    PeerOffers,
    PeerUp,
    Send,
    address_of,
    in_messages,
    is_sound_card,
    is_sound_offer,
)
from mesh.sockets.control import (
    Card,
    ControlMessage,
    Marked,
    Moved,
    Offer,
    Offers,
    Peers,
    Ping,
    Pong,
)


class Roster:
    """Peers by node id, each with one control link."""

    def __init__(
        self, heartbeat_s: float, effects: list[Effect], dropped: Counter[str], now: float
    ) -> None:
        self.peers: dict[str, Peer] = {}
        self.deadlines: Deadlines[str] = Deadlines()
        """When to look at a peer: its next ping is due, or its silence gets too long."""
        self._heartbeat_s = heartbeat_s
        self._effects = effects
        self._dropped = dropped
        self._offers: dict[int, Offer] = {}
        self._all_offers: list[Offers] | None = None
        self._listening_since = now

    def add(self, peer: Peer, knows: frozenset[str], now: float) -> None:
        """It is up: tell the shell, then tell it everything, except of the peers it `knows`."""
        self.peers[peer.id] = peer
        self._effects.append(PeerUp(peer))
        self._greet(peer, knows)
        peer.ping_at = now + self._heartbeat_s
        self.deadlines.set(peer.id, peer.ping_at)

    def change_over(self, peer: Peer, link: KnownLink, now: float) -> None:
        """It took another link than this side thought. Nothing had come over the old one, so
        nothing that was sent there has been read either."""
        assert link.card is not None
        peer.link, peer.dialled, peer.remote_host, peer.heard = link.key, False, link.endpoint, now
        if peer.card != link.card:
            self._moved(peer, link.card)
        self._greet(peer, link.knows)

    def remove(self, peer: Peer, reason: str) -> None:
        del self.peers[peer.id]
        self.deadlines.clear(peer.id)
        self._effects.append(PeerDown(peer, reason))

    def clear(self) -> None:
        for node_id in self.peers:
            self.deadlines.clear(node_id)
        self.peers.clear()

    def tell_all(self, messages: Sequence[ControlMessage]) -> None:
        for peer in self.peers.values():
            self._effects += [Send(peer.link, message) for message in messages]

    def offer(self, add: tuple[Offer, ...], drop: tuple[int, ...]) -> None:
        """This node's own offers changed."""
        self._offers.update((offer.key, offer) for offer in add)
        for key in drop:
            self._offers.pop(key, None)
        self._all_offers = None
        messages = [Offers(add=part) for part in in_messages(add) if part]
        self.tell_all(messages + [Offers(drop=part) for part in in_messages(drop) if part])

    # What peers say

    def heard(self, peer: Peer, message: ControlMessage, now: float) -> bool:
        """Take a message from a peer; False if it is not about what this table holds."""
        peer.heard = now
        peer.proven = True
        match message:
            case Ping(stamp):
                self._effects.append(Send(peer.link, Pong(stamp)))
            case Pong(stamp):
                self._answered(peer, stamp, now)
            case Offers(add, drop):
                self._offered(peer, add, drop)
            case Marked(address, waits):
                self._effects.append(Acknowledged(peer.id, address, waits))
            case Moved(card) if card.id == peer.id:
                self._moved(peer, card)
            case _:
                return False
        return True

    def _moved(self, peer: Peer, card: Card) -> None:
        if not is_sound_card(card):
            self._dropped["card"] += 1
            return
        peer.card = card
        if peer.dialled or peer.address in card.endpoints:
            return  # an address that is lost takes the link with it
        peer.address = address_of(card, peer.same_host, peer.remote_host)
        self._effects.append(PeerMoved(peer))

    def _answered(self, peer: Peer, stamp: int, now: float) -> None:
        if stamp != peer.ping_stamp:
            self._dropped["pong"] += 1
            return
        peer.ping_stamp = -1
        peer.round_trip_s = max(0.0, now - stamp / 1e9)

    def _offered(self, peer: Peer, add: tuple[Offer, ...], drop: tuple[int, ...]) -> None:
        added = {}
        for offer in add:
            if not is_sound_offer(offer, peer.id):
                self._dropped["offer"] += 1
            elif offer.key in peer.offers:
                self._dropped["offer repeated"] += 1
            elif len(peer.offers) >= limits.CHANNELS_PER_NODE_MAX:
                self._dropped["offers full"] += 1
            else:
                added[offer.key] = peer.offers[offer.key] = offer
        known = [key for key in dict.fromkeys(drop) if peer.offers.pop(key, None) is not None]
        # What came and went in one message has not been there for anybody.
        dropped = tuple(key for key in known if added.pop(key, None) is None)
        if added or dropped:
            self._effects.append(PeerOffers(peer.id, tuple(added.values()), dropped))

    # Whether they live

    def resume(self, now: float) -> None:
        """This process was held up until now: what peers said meanwhile may wait in our sockets,
        and silence counts only while somebody listens."""
        self._listening_since = now

    def silent(self, now: float) -> list[Peer]:
        """Ping those whose turn it is, and return those that have been silent for too long."""
        silent = []
        while (node_id := self.deadlines.take(now)) is not None:
            peer = self.peers[node_id]
            heartbeats = (
                limits.SILENT_HEARTBEATS_SAME_HOST if peer.same_host else limits.SILENT_HEARTBEATS
            )
            gone_at = max(peer.heard, self._listening_since) + heartbeats * self._heartbeat_s
            if now >= gone_at:
                silent.append(peer)
                continue
            if now >= peer.ping_at:
                peer.expects = frozenset()  # a heartbeat later it has met them, or will not
                peer.ping_stamp = int(now * 1e9)
                peer.ping_at = now + self._heartbeat_s
                self._effects.append(Send(peer.link, Ping(peer.ping_stamp)))
            self.deadlines.set(node_id, min(peer.ping_at, gone_at))
        return silent

    def _greet(self, peer: Peer, knows: frozenset[str]) -> None:
        """Say at least one thing at once: it tells the other side that the link is up here."""
        peer.expects = knows - self.peers.keys()
        if self._all_offers is None:
            self._all_offers = [Offers(add=part) for part in in_messages(self._offers.values())]
        self._effects += [Send(peer.link, message) for message in self._all_offers]
        others = [
            p
            for i, p in self.peers.items()
            if i not in knows and peer.id not in p.expects and i != peer.id
        ]
        for part in in_messages(p.introduction() for p in others):
            if part:
                self._effects.append(Send(peer.link, Peers(part)))
