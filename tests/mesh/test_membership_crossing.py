"""Two nodes that dial each other at once, with their messages in every order."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest

from mesh import limits
from mesh.discovery.source import Sighting
from mesh.peering import Dial, Effect, HangUp, Send
from tests.support.members import ELSEWHERE, are_peers, offer
from tests.support.network import Network, check_invariants


def every_order(play: Callable[[Callable[[int], int]], None]) -> int:
    """Call `play` once for every sequence of choices it can make; how many there were."""
    path: list[tuple[int, int]] = []
    plays = 0
    while True:
        step = 0

        def choose(options: int) -> int:
            nonlocal step
            if step == len(path):
                path.append((0, options))
            choice, there = path[step]
            assert there == options, "not deterministic"
            step += 1
            return choice

        play(choose)
        plays += 1
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return plays
        path[-1] = (path[-1][0] + 1, path[-1][1])


class Wires:
    """Two memberships whose links are queues, delivered in the order that `choose` picks."""

    def __init__(self) -> None:
        network = Network()
        self.nodes = [
            network.spawn("small", node_id="1" * 16, ipc=False),
            network.spawn("large", ELSEWHERE, node_id="2" * 16, ipc=False),
        ]
        self.now = network.now
        self.queues: dict[tuple[int, int, int], list[object]] = {}
        """By (who dialled, its link, where to)."""
        self.closed: set[tuple[int, int]] = set()
        self.log: list[tuple[int, str]] = []

    def apply(self, at: int, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Dial(link, _):
                    self.queues[at, link, 0] = []
                    self.queues[at, link, 1] = []
                case Send(int() as link, message):
                    self.queues[at, link, 1 - at].append(message)
                case Send(bytes() as link, message):
                    if (1 - at, int(link)) not in self.closed:
                        self.queues[1 - at, int(link), at ^ 1].append(message)
                case HangUp(int() as link):
                    self.closed.add((at, link))
                    self.queues[at, link, at].clear()
                case HangUp():
                    pass
                case _:
                    self.log.append((at, type(effect).__name__))

    def sight(self, at: int) -> None:
        seen = self.nodes[1 - at].membership
        sighting = Sighting("mdns", seen.announcement(seen.card), present=True)
        self.apply(at, self.nodes[at].membership.sighted(sighting, self.now))
        self.apply(at, self.nodes[at].membership.tick(self.now))

    def ready(self) -> list[tuple[int, int, int]]:
        return [key for key, queue in self.queues.items() if queue]

    def deliver(self, key: tuple[int, int, int]) -> None:
        dialler, link, to = key
        message = self.queues[key].pop(0)
        mine = link if to == dialler else b"%d" % link
        membership = self.nodes[to].membership
        self.apply(to, membership.received(mine, message, self.now))  # type: ignore[arg-type]
        check_invariants(membership)

    def play(self, choose: Callable[[int], int], *meanwhile: Callable[[], None]) -> None:
        """Deliver everything, both nodes seeing each other and `meanwhile` at any point of it."""
        to_do = [lambda: self.sight(0), lambda: self.sight(1), *meanwhile]
        while (ready := self.ready()) or to_do:
            choice = choose(len(ready) + len(to_do))
            if choice < len(ready):
                self.deliver(ready[choice])
            else:
                to_do.pop(choice - len(ready))()

    def wait(self, seconds: float) -> None:
        for _ in range(int(seconds * 4)):
            self.now += 0.25
            for at in (0, 1):
                self.apply(at, self.nodes[at].membership.tick(self.now))
            while ready := self.ready():
                self.deliver(ready[0])


def assert_joined(wires: Wires) -> None:
    """Both are up, once, over the same link, and stay so."""
    small, large = (node.membership for node in wires.nodes)
    a, b = small.peers[large.card.id], large.peers[small.card.id]
    same = a.link == int(b.link) if a.dialled else b.link == int(a.link)
    assert a.dialled != b.dialled
    assert same, f"{a.link!r} here and {b.link!r} there"
    wires.wait(5.0)
    assert sorted(wires.log) == [(0, "PeerUp"), (1, "PeerUp")]


@pytest.mark.slow
def test_simultaneous_dials_end_in_one_link_in_every_order_of_messages() -> None:
    def play(choose: Callable[[int], int]) -> None:
        wires = Wires()
        wires.play(choose)
        assert_joined(wires)

    assert every_order(play) > 400


ORDERS = [random.Random(seed) for seed in range(300)]


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_who_leaves_in_the_middle_of_it_is_gone(who: int) -> None:
    for luck in ORDERS:
        wires = Wires()
        leaving, other = wires.nodes[who].membership, wires.nodes[1 - who].membership
        wires.play(luck.randrange, lambda: wires.apply(who, leaving.leave("")))  # noqa: B023
        assert not other.peers
        wires.wait(5.0)
        log = [name for at, name in wires.log if at != who]
        assert log in ([], ["PeerUp", "PeerDown"])


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_who_moves_or_offers_in_the_middle_of_it_is_understood(who: int) -> None:
    for luck in ORDERS:
        wires = Wires()
        speaker, other = wires.nodes[who].membership, wires.nodes[1 - who].membership
        card = msgspec.structs.replace(speaker.card, topics=("tcp://*:2",))
        wires.apply(who, speaker.offer((offer(1), offer(2)), ()))
        wires.play(
            luck.randrange,
            lambda: wires.apply(who, speaker.moved(card)),  # noqa: B023
            lambda: wires.apply(who, speaker.offer((offer(3),), (1,))),  # noqa: B023
        )
        peer = other.peers[speaker.card.id]
        assert peer.card == card
        assert peer.offers.keys() == {2, 3}


def test_links_that_were_one_too_many_end_without_being_called_failures() -> None:
    """Many nodes that see each other at once dial each other: users are not to read of that."""
    network = Network(latency_s=(0.001, 0.02))
    nodes = [network.spawn(f"n{i}", f"10.0.0.{i}") for i in range(1, 9)]
    network.all_see_all("mdns")
    network.run(limits.HANDSHAKE_S + 1)
    assert are_peers(*nodes)
    assert sum(node.membership.dropped["handshake timeout"] for node in nodes) == 0
    assert all(len(node.membership._links.table) == 7 for node in nodes)
