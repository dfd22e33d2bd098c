"""A network in memory with a clock of its own, for nodes that are nothing but their membership.

Connections behave as those of ZeroMQ do: messages of one arrive in order; what is sent into a
partition waits and arrives when it heals; a connection that breaks loses what was under way and
comes back by itself as another link (a new routing id); a dial to nobody stays silent, except of a
socket file that is not there. Deterministic: all luck is drawn from one seeded generator.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import ceil

from mesh import limits
from mesh.discovery.source import Announcement, Sighting
from mesh.links import State
from mesh.membership import Membership
from mesh.peering import (
    Dial,
    Effect,
    HangUp,
    Link,
    Peer,
    PeerDown,
    PeerOffers,
    PeerUp,
    Send,
    UntrustedSeen,
)
from mesh.sockets.control import Card, ControlMessage, Offer, Peers

PORT = 7000


class Network:
    """Hosts, the nodes on them, and the time they share."""

    def __init__(
        self,
        seed: int = 0,
        *,
        latency_s: tuple[float, float] = (0.001, 0.001),
        tick_s: float = 0.0,
    ) -> None:
        """Nodes are called when they want to be, or at the next multiple of `tick_s`."""
        self.tick_s = tick_s
        self.now = 1000.0
        self.random = random.Random(seed)
        self.nodes: dict[str, SimNode] = {}
        """Those that live, by id."""
        self.sent: Counter[str] = Counter()
        """Messages by class, and ``introductions``: the entries of all `Peers`."""
        self._latency_s = latency_s
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._routing_ids = count(1)
        self._listening: dict[str, SimNode] = {}
        self._connections: dict[Connection, None] = {}
        self._island: dict[str, int] = {}
        self._next_port: Counter[str] = Counter()

    def spawn(
        self,
        name: str,
        host: str = "10.0.0.1",
        *,
        realm: str = "default",
        key: bytes | None = None,
        heartbeat_s: float = 1.0,
        port: int | None = None,
        node_id: str | None = None,
        ipc: bool = True,
    ) -> SimNode:
        """Start a node. It knows of nobody, and nobody knows of it."""
        if port is None:
            self._next_port[host] += 1
            port = PORT + self._next_port[host]
        node_id = node_id or f"{self.random.getrandbits(64):016x}"
        tcp = f"tcp://{host}:{port}"
        endpoints = (f"ipc:///run/{node_id}.control", tcp) if ipc else (tcp,)
        card = Card(node_id, name, endpoints, boot=f"boot of {host}", pid=1)
        node = SimNode(self, card, host, realm=realm, key=key, heartbeat_s=heartbeat_s)
        self.nodes[node_id] = node
        for endpoint in endpoints:
            self._listening[endpoint] = node
        return node

    def stop_listening(self, node: SimNode) -> None:
        """It is gone, and its addresses are free."""
        self.nodes.pop(node.id, None)
        for endpoint in node.membership.card.endpoints:
            if self._listening.get(endpoint) is node:
                del self._listening[endpoint]
        for connection in node.dialled.values():
            self._connections.pop(connection, None)

    # Time

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        heappush(self._events, (self.now + delay_s, next(self._order), action))

    def run(self, seconds: float) -> None:
        """Let that much time pass."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, action = heappop(self._events)
            action()
        self.now = end

    def run_until(self, condition: Callable[[], bool], deadline_s: float = 60.0) -> float:
        """Let time pass until `condition` holds; how long it took."""
        start = self.now
        while not condition():
            if not self._events or self._events[0][0] > start + deadline_s:
                raise AssertionError(f"not within {deadline_s} s")
            self.now, _, action = heappop(self._events)
            action()
        return self.now - start

    # Faults

    def partition(self, *islands: Iterable[str]) -> None:
        """Hosts reach those on their own island only; hosts not named are on one together."""
        self._island = {host: i for i, hosts in enumerate(islands, 1) for host in hosts}
        for connection in self._connections:
            connection.release()

    def heal(self) -> None:
        self.partition()

    def reaches(self, host: str, other: str) -> bool:
        island = self._island
        return not island or island.get(host, 0) == island.get(other, 0)

    def break_connections(self, share: float) -> None:
        """That share of all connections loses what is under way, and comes back."""
        for connection in self._connections:
            if self.random.random() < share:
                connection.reset()

    # What nodes do

    def dial(self, node: SimNode, link: int, endpoint: str) -> None:
        there = self._listening.get(endpoint)
        missing = there is None or there.host != node.host
        if endpoint.startswith("ipc://") and missing:
            self.at(0.0, lambda: node.link_failed(link, "no such socket"))
            return
        connection = Connection(self, node, link, endpoint)
        node.dialled[link] = connection
        self._connections[connection] = None

    def listener(self, endpoint: str) -> SimNode | None:
        return self._listening.get(endpoint)

    def routing_id(self) -> bytes:
        return next(self._routing_ids).to_bytes(5, "big")

    def latency(self) -> float:
        low, high = self._latency_s
        return low if low == high else low + (high - low) * self.random.random()

    def close(self, connection: Connection) -> None:
        self._connections.pop(connection, None)

    # What tests say

    def see(
        self, seer: SimNode, seen: SimNode, source: str = "local", present: bool = True
    ) -> None:
        announcement = seen.membership.announcement(seen.membership.card)
        seer.sighted(Sighting(source, announcement, present))

    def all_see_all(self, source: str = "local") -> None:
        for seer in list(self.nodes.values()):
            for seen in list(self.nodes.values()):
                if seer is not seen:
                    self.see(seer, seen, source)


class Connection:
    """One that `dialler` made, towards whoever listens at `endpoint` at the time."""

    def __init__(self, network: Network, dialler: SimNode, link: int, endpoint: str) -> None:
        self.network = network
        self.dialler = dialler
        self.link = link
        self.endpoint = endpoint
        self._acceptor: SimNode | None = None
        self._routing_id = b""
        self._held: list[tuple[bool, ControlMessage]] = []
        self._arrived = [0.0, 0.0]
        self._hung_up = False

    def send(self, to_acceptor: bool, message: ControlMessage) -> None:
        there = self.network.listener(self.endpoint)
        if there is not self._acceptor:
            self.reset()
        if there is None:
            return
        if not self._passes(there):
            self._held.append((to_acceptor, message))
            return
        if self._acceptor is None:
            self._acceptor, self._routing_id = there, self.network.routing_id()
            there.accepted[self._routing_id] = self
        routing_id, acceptor = self._routing_id, there

        def arrive() -> None:
            if to_acceptor and acceptor.accepted.get(routing_id) is self:
                host = "" if self.endpoint.startswith("ipc://") else self.dialler.host
                acceptor.received(routing_id, message, host)
            elif not to_acceptor and self._routing_id == routing_id and not self._hung_up:
                self.dialler.received(self.link, message, "")

        at = max(self.network.now + self.network.latency(), self._arrived[to_acceptor])
        self._arrived[to_acceptor] = at
        self.network.at(at - self.network.now, arrive)

    def reset(self) -> None:
        """The connection is lost, with what was under way; the dialler will make another."""
        if self._acceptor is not None:
            self._acceptor.accepted.pop(self._routing_id, None)
            self._acceptor.broken.add(self._routing_id)
        self._acceptor, self._routing_id = None, b""
        self._held.clear()

    def hang_up(self) -> None:
        self._hung_up = True
        self.network.close(self)

    def release(self) -> None:
        held, self._held = self._held, []
        for to_acceptor, message in held:
            self.send(to_acceptor, message)

    def _passes(self, there: SimNode) -> bool:
        return self.network.reaches(self.dialler.host, there.host)


@dataclass(slots=True)
class Log:
    """What the shell of a node was told."""

    up: list[str] = field(default_factory=list)
    down: list[tuple[str, str]] = field(default_factory=list)
    dials: list[str] = field(default_factory=list)
    untrusted: list[str] = field(default_factory=list)


class SimNode:
    """The shell around one membership: carries out effects, and checks that they make sense."""

    def __init__(
        self,
        network: Network,
        card: Card,
        host: str,
        *,
        realm: str,
        key: bytes | None,
        heartbeat_s: float,
    ) -> None:
        self.network = network
        self.id = card.id
        self.host = host
        self.alive = True
        self.log = Log()
        self.dialled: dict[int, Connection] = {}
        self.accepted: dict[bytes, Connection] = {}
        self.broken: set[Link] = set()
        self.offers: dict[str, dict[int, Offer]] = defaultdict(dict)
        self.watched: dict[str, Peer] = {}
        self._tick_at: float | None = None
        luck = random.Random(card.id)
        self.membership = Membership(
            card,
            realm=realm,
            key=key,
            heartbeat_s=heartbeat_s,
            nonce=lambda: luck.randbytes(16),
            same_host=lambda other: other.boot == card.boot,
            now=network.now,
        )

    @property
    def peers(self) -> set[str]:
        return set(self.membership.peers)

    @property
    def endpoint(self) -> str:
        """Of its control link on the network."""
        return next(e for e in self.membership.card.endpoints if e.startswith("tcp://"))

    # Events

    def sighted(self, sighting: Sighting) -> None:
        self._apply(self.membership.sighted(sighting, self.network.now))

    def seed(self, *endpoints: str) -> None:
        self.sighted(Sighting("seeds", Announcement("", "", "", endpoints), present=True))

    def received(self, link: Link, message: ControlMessage, address: str) -> None:
        if self.alive:
            now = self.network.now
            self._apply(self.membership.received(link, message, now, address=address))

    def link_failed(self, link: Link, reason: str) -> None:
        if self.alive:
            self._apply(self.membership.link_failed(link, reason, self.network.now))

    def process_died(self, node_id: str) -> None:
        if self.alive:
            self._apply(self.membership.process_died(node_id, self.network.now))

    def offer(self, *add: Offer, drop: tuple[int, ...] = ()) -> None:
        self._apply(self.membership.offer(add, drop))

    def move(self, card: Card) -> None:
        self._apply(self.membership.moved(card))

    def leave(self) -> None:
        """Say goodbye and end."""
        self._apply(self.membership.leave(""))
        self.crash()

    def crash(self, *, noticed: bool = True) -> None:
        """End without a word. With `noticed`, the kernel tells those on the same host."""
        self.alive = False
        self.network.stop_listening(self)
        for other in self.network.nodes.values():
            if noticed and (peer := other.watched.get(self.id)) is not None and peer.same_host:
                self.network.at(0.01, lambda other=other: other.process_died(self.id))  # type: ignore[misc]

    # Effects

    def _apply(self, effects: list[Effect]) -> None:
        network = self.network
        for effect in effects:
            match effect:
                case Send(link, message):
                    self._send(link, message)
                case Dial(link, endpoint):
                    self.log.dials.append(endpoint)
                    network.dial(self, link, endpoint)
                case HangUp(link):
                    if isinstance(link, int) and (connection := self.dialled.pop(link, None)):
                        connection.hang_up()
                case PeerUp(peer):
                    assert peer.id not in self.watched, "up twice"
                    self.log.up.append(peer.id)
                    self.watched[peer.id] = peer
                    if peer.same_host and peer.id not in network.nodes:
                        network.at(0.01, lambda peer=peer: self.process_died(peer.id))  # type: ignore[misc]
                case PeerDown(peer, reason):
                    assert self.watched.pop(peer.id) is peer, "down without having been up"
                    self.log.down.append((peer.id, reason))
                    self.offers.pop(peer.id, None)
                case PeerOffers(peer_id, add, drop):
                    self.offers[peer_id].update((offer.key, offer) for offer in add)
                    for key in drop:
                        del self.offers[peer_id][key]
                case UntrustedSeen(untrusted):
                    self.log.untrusted.append(untrusted.reason)
                case _:
                    pass
        self._schedule()

    def _send(self, link: Link, message: ControlMessage) -> None:
        self.network.sent[type(message).__name__] += 1
        if isinstance(message, Peers):
            self.network.sent["introductions"] += len(message.peers)
        connection = self.dialled.get(link) if isinstance(link, int) else self.accepted.get(link)
        if connection is not None:
            connection.send(isinstance(link, int), message)
        elif link in self.broken:
            self.network.at(0.0, lambda: self.link_failed(link, "no route to host"))

    def _schedule(self) -> None:
        at = self.membership.next_deadline()
        if not self.alive or at is None:
            return
        if tick_s := self.network.tick_s:
            at = max(at, ceil(at / tick_s) * tick_s)  # rounding may leave it a little too early
        if self._tick_at is None or at < self._tick_at:
            self._tick_at = at
            self.network.at(at - self.network.now, lambda: self._tick(at))

    def _tick(self, at: float) -> None:
        if self.alive and self._tick_at == at:
            self._tick_at = None
            self._apply(self.membership.tick(self.network.now))


def check_invariants(membership: Membership) -> None:
    """What holds after any event, whatever the others said."""
    links, contacts, peers = membership._links, membership._contacts, membership.peers
    up = {link.key for link in links.table.values() if link.state is State.UP}
    assert up == {peer.link for peer in peers.values()}, "one link for each peer"
    for peer in peers.values():
        assert links.table[peer.link].node_id == peer.id
        assert peer.id in membership._roster.deadlines
        assert len(peer.offers) <= limits.CHANNELS_PER_NODE_MAX
    assert membership.card.id not in peers
    assert not peers.keys() & contacts.gone.keys(), "a ghost"
    for state in State:
        have = [link for link in links.table.values() if link.state is state]
        assert sorted(map(id, have)) == sorted(map(id, links.in_state(state)))
    for link in links.table.values():
        assert (link.key in links.deadlines) == (link.state is not State.UP), "a link for ever"
        if link.state is State.DIALLING:
            assert link.contact is not None
            assert link.key in link.contact.links
    assert links.count(State.DIALLING) <= limits.DIALS_MAX
    assert links.count(State.WELCOMED) + links.count(State.SPARE) <= limits.HANDSHAKES_MAX
    for contact in contacts.known.values():
        reached = (contact.reached if contact.seed else contact.key) in peers
        goes_on = contact.key in contacts.deadlines or contact.key in contacts.waiting
        assert goes_on or contact.links or contact.stopped or reached, "a contact forgotten"
        assert len(contact.links) <= limits.DIALS_EACH_MAX
    waiting = contacts.waiting
    keys = [*waiting._credible, *waiting._news, *waiting._others]
    assert len(set(keys)) == len(keys) == len(waiting), "waits twice"
    assert contacts.known.keys() >= set(keys)
    for key, contact in contacts._strangers.items():
        assert contacts.known[key] is contact
        assert not contact.credible, "could be forgotten"
    assert len(peers) <= limits.PEERS_MAX
    assert len(contacts.known) <= limits.SIGHTINGS_MAX
    assert len(contacts.gone) <= limits.GONE_MAX
    assert len(membership.untrusted) <= limits.UNTRUSTED_MAX
    assert len(membership._admission._told_unknown) <= limits.HANDSHAKES_MAX
    assert not membership._effects, "an effect was kept back"
