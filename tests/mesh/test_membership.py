"""Who becomes a peer, who stays one, who is one no more: memberships joined in memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise

import msgspec
import pytest

from mesh import limits
from mesh.discovery.source import Announcement, Sighting
from mesh.message import Untrusted
from mesh.peering import Dial, Effect, HangUp, Peer, PeerMoved, PeerOffers, Send, host_of
from mesh.sockets.control import (
    PROTOCOL,
    Bye,
    Card,
    Confirm,
    Hello,
    Introduction,
    Marked,
    Moved,
    Offer,
    Offers,
    Peers,
    Ping,
    Pong,
    Refuse,
    Welcome,
    encode_control,
)
from tests.support.network import Network, SimNode, check_invariants

KEY = b"k" * 32
ELSEWHERE = "10.0.0.2"


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    yield network
    for node in network.nodes.values():
        check_invariants(node.membership)


def are_peers(*nodes: SimNode) -> bool:
    return all(n.peers == {other.id for other in nodes if other is not n} for n in nodes)


def met(network: Network, *nodes: SimNode, source: str = "mdns") -> None:
    """All of `nodes` see each other and become peers."""
    for seer in nodes:
        for seen in nodes:
            if seer is not seen:
                network.see(seer, seen, source)
    network.run_until(lambda: are_peers(*nodes), 1.0)


def offer(key: int, channel: str = "jobs", endpoint: str = "tcp://10.0.0.1:9") -> Offer:
    return Offer(key, "pull", channel, (endpoint,), prefetch=4)


def replies(effects: list[Effect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


class Raw:
    """Somebody who speaks the protocol by hand, over accepted links of `node`."""

    def __init__(self, node: SimNode, node_id: str = "f" * 16, name: str = "raw") -> None:
        self.node = node
        self.card = Card(node_id, name, ("tcp://10.9.9.9:1",))
        self.links = 0

    def connect(self) -> bytes:
        self.links += 1
        return b"raw%d" % self.links

    def say(self, link: bytes, message: object) -> list[object]:
        now = self.node.network.now
        effects = self.node.membership.received(link, message, now, address="10.9.9.9")  # type: ignore[arg-type]
        self.node._apply(effects)
        return replies(effects)

    def hello(self, link: bytes, **changes: object) -> list[object]:
        fields: dict[str, object] = {
            "protocol": PROTOCOL,
            "realm": "default",
            "card": self.card,
            "nonce": b"r" * 16,
        }
        return self.say(link, Hello(**(fields | changes)))  # type: ignore[arg-type]

    def join(self) -> bytes:
        link = self.connect()
        self.hello(link)
        self.say(link, Confirm())
        assert self.card.id in self.node.peers
        return link


# Arriving


@pytest.mark.parametrize("key", [None, KEY], ids=["open", "secret"])
def test_two_nodes_that_see_each_other_become_peers_once(
    network: Network, key: bytes | None
) -> None:
    a, b = network.spawn("a", key=key), network.spawn("b", ELSEWHERE, key=key)
    network.all_see_all("mdns")
    network.run(10)
    assert a.log.up == [b.id]
    assert b.log.up == [a.id]
    assert a.log.down == b.log.down == []


def test_one_side_seeing_the_other_is_enough(network: Network) -> None:
    a, b = network.spawn("a", key=KEY), network.spawn("b", ELSEWHERE, key=KEY)
    network.see(a, b, "mdns")
    assert network.run_until(lambda: are_peers(a, b), 1.0) < 0.01


def test_the_handshake_takes_the_messages_that_are_drawn(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    network.see(a, b, "mdns")
    network.run(0.5)
    expected = {"Hello": 1, "Welcome": 1, "Confirm": 1, "Offers": 2}
    assert network.sent == expected


def test_every_endpoint_is_dialled_at_once_and_one_link_is_kept(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b")
    network.see(a, b, "local")
    network.run(0)
    assert set(a.log.dials) == set(b.membership.card.endpoints)
    network.run(5)
    assert len(a.dialled) == 1
    assert a.log.up == [b.id]
    assert b.log.up == [a.id]


def test_a_sighting_from_the_network_does_not_lead_to_a_socket_of_this_machine(
    network: Network,
) -> None:
    a, b = network.spawn("a"), network.spawn("b")
    network.see(a, b, "mdns")
    network.run(1)
    assert a.log.dials == [b.endpoint]


def test_a_missing_socket_file_leaves_the_other_addresses(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    network.see(a, b, "local")
    network.run_until(lambda: are_peers(a, b), 1.0)


def test_same_host_uses_ipc_and_other_hosts_the_address_that_answered(network: Network) -> None:
    a, b, c = network.spawn("a"), network.spawn("b"), network.spawn("c", ELSEWHERE)
    met(network, a, b, c)
    offered = ("ipc:///run/x", "tcp://10.0.0.1:5", "tcp://10.0.0.2:5")
    near, far = a.membership.peers[b.id], a.membership.peers[c.id]
    assert (near.transport, near.same_host) == ("ipc", True)
    assert near.data_endpoint(offered) == "ipc:///run/x"
    assert (far.transport, far.same_host) == ("tcp", False)
    assert far.data_endpoint(offered) == "tcp://10.0.0.2:5"
    assert far.data_endpoint(("ipc:///run/x",)) is None
    assert far.data_endpoint(("tcp://192.168.7.7:5",)) == "tcp://192.168.7.7:5"
    seen_from_c = c.membership.peers[a.id]
    assert host_of(seen_from_c.address) == "10.0.0.1"


def test_what_users_see_of_a_peer(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("camera", ELSEWHERE)
    met(network, a, b)
    info = a.membership.peers[b.id].info
    assert (info.id, info.name, info.transport, info.same_host) == (b.id, "camera", "tcp", False)
    assert info.address == b.endpoint


def test_round_trips_are_measured_by_pings() -> None:
    network = Network(latency_s=(0.02, 0.02))
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b)
    network.run(1.5)
    assert a.membership.round_trip_s == {b.id: pytest.approx(0.04)}


def test_a_pong_that_answers_no_ping_is_counted_and_measures_nothing(network: Network) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    link = raw.join()
    raw.say(link, Pong(12345))
    assert a.membership.dropped["pong"] == 1
    assert a.membership.round_trip_s == {}


# Who is refused, and who learns of it


def test_another_secret_is_untrusted_on_both_sides_and_dialled_no_more(network: Network) -> None:
    """Over addresses that come without a tag; those with one are not even dialled."""
    a, b = network.spawn("a", key=KEY), network.spawn("b", ELSEWHERE, key=b"x" * 32)
    c = network.spawn("c", key=KEY)
    met(network, a, c)
    a.received(
        a.membership.peers[c.id].link,
        Peers((Introduction(b.id, "b", b.membership.card.endpoints),)),
        "",
    )
    network.run(120)
    assert a.membership.untrusted[b.id] == Untrusted(b.id, "b", b.endpoint, "secret")
    assert b.membership.untrusted[a.id].reason == "secret"
    assert not b.peers
    assert a.log.dials.count(b.endpoint) == 1


@pytest.mark.parametrize(("ours", "theirs"), [(KEY, None), (None, KEY)])
def test_both_sides_must_agree_on_having_a_secret(
    network: Network, ours: bytes | None, theirs: bytes | None
) -> None:
    a, b = network.spawn("a", key=ours), network.spawn("b", ELSEWHERE, key=theirs)
    a.seed(b.endpoint)
    network.run(2)
    assert not a.peers | b.peers
    assert a.membership.untrusted[b.id].reason == "secret"
    assert b.membership.untrusted[a.id].reason == "secret"


@pytest.mark.parametrize(("ours", "theirs"), [(KEY, None), (None, KEY), (KEY, b"x" * 32)])
def test_announcements_without_our_tag_are_listed_and_never_dialled(
    network: Network, ours: bytes | None, theirs: bytes | None
) -> None:
    a, b = network.spawn("a", key=ours), network.spawn("b", ELSEWHERE, key=theirs)
    network.see(a, b, "mdns")
    network.see(a, b, "mdns")
    network.run(60)
    assert a.log.dials == []
    assert a.membership.untrusted == {
        b.id: Untrusted(b.id, "b", b.membership.card.endpoints[0], "secret")
    }
    assert a.log.untrusted == ["secret"]
    network.see(a, b, "mdns", present=False)
    assert a.membership.untrusted == {}


def test_a_tag_is_over_id_realm_and_port(network: Network) -> None:
    a, b = network.spawn("a", key=KEY), network.spawn("b", ELSEWHERE, key=KEY)
    real = b.membership.announcement(b.membership.card)
    forged = [
        msgspec.structs.replace(real, id="e" * 16),
        msgspec.structs.replace(real, endpoints=("tcp://10.0.0.66:1",)),
        msgspec.structs.replace(real, tag=real.tag[:-1]),
        msgspec.structs.replace(real, tag="ü"),
    ]
    for announcement in forged:
        a.sighted(Sighting("mdns", announcement, present=True))
    network.run(1)
    assert a.log.dials == []
    assert a.membership.dropped["secret"] == len(forged)


def test_an_untagged_address_needs_to_come_from_the_user(network: Network) -> None:
    """An empty id means "only an address is known", which no announcement may claim."""
    a = network.spawn("a", key=KEY)
    a.sighted(Sighting("mdns", Announcement("", "x", "default", ("tcp://10.0.0.66:1",)), True))
    network.run(1)
    assert a.log.dials == []
    assert a.membership.dropped["sighting"] == 1


def test_another_realm_is_ignored_when_seen_and_remembered_when_met(network: Network) -> None:
    a, b = network.spawn("a", realm="lab"), network.spawn("b", ELSEWHERE, realm="factory")
    network.see(a, b, "mdns")
    network.run(1)
    assert a.log.dials == []
    assert a.membership.dropped["realm"] == 1
    forged = msgspec.structs.replace(b.membership.announcement(b.membership.card), realm="lab")
    a.sighted(Sighting("mdns", forged, present=True))
    network.run(120)
    assert not a.peers | b.peers
    assert a.log.dials == [b.endpoint]
    assert a.membership.untrusted == {}


def test_another_protocol_version_is_said_and_listed(network: Network) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    answers = raw.hello(raw.connect(), protocol=PROTOCOL + 1)
    assert answers == [Refuse("version", f"protocol {PROTOCOL}")]
    assert a.membership.untrusted[raw.card.id].reason == "version"


def test_who_is_refused_for_its_version_waits_for_news_before_it_dials_again(
    network: Network,
) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    network.partition([ELSEWHERE])
    network.see(a, b, "mdns")
    network.run(0)
    a.received(next(iter(a.dialled)), Refuse("version", "protocol 9"), "")
    network.heal()
    network.see(a, b, "mdns")
    network.run(300)
    assert a.log.dials == [b.endpoint]
    assert a.membership.untrusted[b.id].reason == "version"
    announcement = b.membership.announcement(b.membership.card)
    moved = msgspec.structs.replace(announcement, endpoints=(b.endpoint, "tcp://10.0.0.2:1"))
    a.sighted(Sighting("mdns", moved, present=True))
    network.run_until(lambda: are_peers(a, b), 1.0)
    assert a.membership.untrusted == {}


def test_a_seed_that_names_this_node_is_dialled_once(network: Network) -> None:
    a = network.spawn("a")
    a.seed(a.endpoint)
    network.run(300)
    assert a.log.dials == [a.endpoint]
    assert not a.peers
    b = network.spawn("b", ELSEWHERE)
    a.move(msgspec.structs.replace(a.membership.card, endpoints=("tcp://10.0.0.1:99",)))
    network._listening[a.log.dials[0]] = b
    network.run(1)
    assert b.id in a.peers, "once its own address is another, that seed may be somebody else"


def test_a_full_node_says_so_and_is_asked_again_later(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = (network.spawn(n, f"10.0.0.{i}") for i, n in enumerate("abc", 1))
    met(network, a, b)
    monkeypatch.setattr(limits, "PEERS_MAX", 1)
    network.see(c, a, "mdns")
    network.run(5)
    assert not c.peers
    assert a.membership.dropped["full"] >= 1
    b.leave()
    network.run_until(lambda: are_peers(a, c), 60.0)


def test_a_name_with_control_characters_is_not_let_in(network: Network) -> None:
    a = network.spawn("a")
    raw = Raw(a, name="\x1b[2J")
    assert raw.hello(raw.connect()) == []
    assert a.membership.dropped["card"] == 1


def test_a_proof_of_one_role_or_meeting_is_worth_nothing_in_another(network: Network) -> None:
    a = network.spawn("a", key=KEY)
    raw = Raw(a)
    link = raw.connect()
    (welcome,) = raw.hello(link)
    assert isinstance(welcome, Welcome)
    assert raw.say(link, Confirm(welcome.proof)) == [Refuse("secret")]
    assert raw.say(link, Confirm(welcome.proof)) == [Refuse("unknown")]
    assert not a.peers
    assert a.membership.untrusted[raw.card.id].reason == "secret"


def test_a_failed_curve_handshake_is_listed_and_tried_again_only_slowly(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    network.partition([ELSEWHERE])
    network.see(a, b, "mdns")
    network.run(0)
    a.link_failed(next(iter(a.dialled)), "handshake")
    assert a.membership.untrusted[b.id].reason == "handshake"
    network.heal()
    network.run(limits.REDIAL_S_MAX / 2 - 1)
    assert len(a.log.dials) == 1
    network.run(limits.REDIAL_S_MAX)
    assert are_peers(a, b)
    assert a.membership.untrusted == {}


# Two who dial each other at once


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
        wires.play(luck.randrange, lambda: wires.apply(who, leaving.leave("", wires.now)))  # noqa: B023
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
        card = msgspec.structs.replace(speaker.card, topics=("tcp://10.0.0.1:2",))
        wires.apply(who, speaker.offer((offer(1), offer(2)), ()))
        wires.play(
            luck.randrange,
            lambda: wires.apply(who, speaker.moved(card)),  # noqa: B023
            lambda: wires.apply(who, speaker.offer((offer(3),), (1,))),  # noqa: B023
        )
        peer = other.peers[speaker.card.id]
        assert peer.card == card
        assert peer.offers.keys() == {2, 3}


# Leaving, dying, falling silent


def test_bye_ends_a_peer_at_once_and_no_stale_hint_brings_it_back(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b)
    b.leave()
    network.run(0.1)
    assert a.log.down == [(b.id, "bye")]
    dials = len(a.log.dials)
    network.see(a, b, "mdns")
    network.see(a, b, "local")
    network.run(700)
    assert len(a.log.dials) == dials
    assert a.log.up == [b.id]


def test_an_introduction_does_not_bring_back_who_ended(network: Network) -> None:
    a, b, c = (network.spawn(n, f"10.0.0.{i}") for i, n in enumerate("abc", 1))
    met(network, a, b, c)
    b.leave()
    network.run(0.1)
    dials = len(a.log.dials)
    introduction = Introduction(b.id, "b", b.membership.card.endpoints)
    a.received(a.membership.peers[c.id].link, Peers((introduction,)), "")
    network.run(1)
    assert len(a.log.dials) == dials


def test_a_late_confirm_of_who_ended_makes_no_ghost(network: Network) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    early = raw.connect()
    raw.hello(early)
    link = raw.join()
    raw.say(link, Bye())
    raw.say(early, Confirm())
    raw.hello(raw.connect())
    assert not a.peers
    assert a.log.up == [raw.card.id]
    assert a.membership.dropped["gone"] == 2


def test_the_death_of_a_process_on_this_host_ends_a_peer(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b")
    met(network, a, b)
    b.crash()
    network.run(0.2)
    assert a.log.down == [(b.id, "died")]
    network.see(a, b, "local")
    network.run(60)
    assert a.log.up == [b.id]


@pytest.mark.parametrize(
    ("host", "heartbeats"), [(ELSEWHERE, limits.SILENT_HEARTBEATS), ("10.0.0.1", 10)]
)
def test_silence_is_noticed_after_so_many_heartbeats(
    network: Network, host: str, heartbeats: int
) -> None:
    a, b = network.spawn("a", heartbeat_s=0.5), network.spawn("b", host)
    met(network, a, b)
    network.run(3)
    b.crash(noticed=False)
    took = network.run_until(lambda: not a.peers, 20.0)
    assert a.log.down == [(b.id, "silent")]
    assert (heartbeats - 1) * 0.5 - 0.01 <= took <= heartbeats * 0.5 + 0.01


def test_any_message_counts_as_life(network: Network) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    link = raw.join()
    for _ in range(20):
        network.run(1.0)
        raw.say(link, Marked("x"))
    assert a.log.down == []


def test_a_node_that_was_held_up_listens_before_it_calls_others_silent(network: Network) -> None:
    """Their messages may wait in its sockets; on a stopped process they surely do."""
    a = network.spawn("a")
    raw = Raw(a)
    link = raw.join()
    network.run(1.5)
    a._tick_at = -1.0  # nothing calls it from here on
    network.run(60)
    a._tick_at = None
    a._apply(a.membership.tick(network.now))
    assert a.peers == {raw.card.id}
    raw.say(link, Pong(0))
    network.run(2.5)
    assert a.peers == {raw.card.id}
    network.run(1.0)
    assert a.log.down == [(raw.card.id, "silent")]


def test_the_same_incarnation_comes_back_after_a_partition(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b)
    a.offer(offer(1))
    network.run(1)
    network.partition([ELSEWHERE])
    network.run(5)
    assert a.log.down == [(b.id, "silent")]
    assert b.log.down == [(a.id, "silent")]
    a.offer(offer(2), drop=(1,))
    network.heal()
    assert network.run_until(lambda: are_peers(a, b), 10.0) < 5.0
    network.run(10)
    assert a.log.up == [b.id, b.id]
    assert b.log.up == [a.id, a.id]
    assert set(b.offers[a.id]) == {2}


def test_a_partition_shorter_than_the_patience_is_not_noticed(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b)
    network.run(1)
    network.partition([ELSEWHERE])
    network.run(1.5)
    network.heal()
    network.run(10)
    assert a.log.down == b.log.down == []


def test_who_noticed_a_loss_alone_is_taken_back_as_new(network: Network) -> None:
    """One side fell silent for the other only: what was agreed on is agreed on again."""
    a, b = network.spawn("a", heartbeat_s=30.0), network.spawn("b", ELSEWHERE, heartbeat_s=1.0)
    met(network, a, b)
    a.offer(offer(1))
    network.run(1)
    network.partition([ELSEWHERE])
    network.run(5)
    assert b.log.down == [(a.id, "silent")]
    assert a.log.down == []
    network.heal()
    network.run_until(lambda: are_peers(a, b) and b.offers[a.id] != {}, 10.0)
    network.run(10)
    assert [reason for _, reason in a.log.down] == ["reset"]
    assert are_peers(a, b)


def test_a_connection_that_broke_is_made_again(network: Network) -> None:
    """What arrives over the new one is from nobody known, who is told so and starts over."""
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b)
    network.run(0.5)
    network.break_connections(1.0)
    network.run(4)
    assert are_peers(a, b)
    assert len(a.log.up) == len(b.log.up) == 2
    assert {reason for _, reason in a.log.down + b.log.down} == {"reset"}


def test_redials_grow_apart_and_end_after_ten_minutes(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b)
    b.crash()
    network.run_until(lambda: not a.peers, 5.0)
    start = network.now
    at: list[float] = []
    while network.now < start + 2 * limits.FORGET_S:
        dials = len(a.log.dials)
        network.run(0.05)
        at += [network.now - start] * (len(a.log.dials) - dials)
    assert at[0] <= 0.55
    gaps = [later - earlier for earlier, later in pairwise(at)]
    longest = limits.REDIAL_S_MAX + limits.HANDSHAKE_S + 0.1
    assert max(gaps) <= longest
    assert gaps[-1] > gaps[0]
    assert limits.FORGET_S - longest < at[-1] <= limits.FORGET_S
    assert len(at) < 50


def test_a_withdrawal_ends_the_redialling(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b)
    b.crash()
    network.run(5)
    network.see(a, b, "mdns", present=False)
    dials = len(a.log.dials)
    network.run(60)
    assert len(a.log.dials) == dials


def test_a_forged_removal_or_address_changes_nothing_about_a_live_peer(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b)
    dials, address = len(a.log.dials), a.membership.peers[b.id].address
    real = b.membership.announcement(b.membership.card)
    forged = msgspec.structs.replace(real, endpoints=("tcp://10.0.0.66:1",))
    a.sighted(Sighting("mdns", forged, present=True))
    a.sighted(Sighting("mdns", forged, present=False))
    network.run(30)
    assert are_peers(a, b)
    assert a.log.down == []
    assert (len(a.log.dials), a.membership.peers[b.id].address) == (dials, address)


def test_a_lost_peer_is_redialled_though_its_announcement_was_withdrawn_before(
    network: Network,
) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b)
    network.see(a, b, "mdns", present=False)
    network.partition([ELSEWHERE])
    network.run(5)
    network.heal()
    network.run_until(lambda: are_peers(a, b), 10.0)


def test_a_restart_under_the_same_name_and_address_is_another_node(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE, port=5000)
    met(network, a, b)
    b.crash()
    again = network.spawn("b", ELSEWHERE, port=5000)
    network.see(a, again, "mdns")
    network.run(5)
    assert a.log.up == [b.id, again.id]
    assert [node_id for node_id, _ in a.log.down] == [b.id]


def test_leaving_says_goodbye_once_and_then_nothing_happens(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b)
    network.run(5)
    link = a.membership.peers[b.id].link
    effects = a.membership.leave("maintenance", network.now)
    assert effects == [Send(link, Bye("maintenance")), HangUp(link)]
    assert a.membership.leave("again", network.now) == []
    assert a.membership.received(link, Ping(1), network.now) == []
    network.see(a, b)
    assert a.membership.tick(network.now + 60) == []
    assert a.membership.next_deadline() is None


# Seeds and introductions


def test_a_seed_is_dialled_until_somebody_is_there_and_again_when_they_go(
    network: Network,
) -> None:
    a = network.spawn("a")
    a.seed("tcp://10.0.0.2:5000")
    network.run(3600)
    first = network.spawn("first", ELSEWHERE, port=5000)
    network.run_until(lambda: are_peers(a, first), limits.REDIAL_S_MAX + 1)
    dials = len(a.log.dials)
    network.run(120)
    assert len(a.log.dials) == dials, "redialled while it is up"
    first.leave()
    second = network.spawn("second", ELSEWHERE, port=5000)
    network.run_until(lambda: are_peers(a, second), 5.0)


def test_a_seed_whose_node_is_a_peer_already_makes_no_second_link(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b)
    network.run(1)
    a.seed(b.endpoint)
    network.run(60)
    assert a.log.up == [b.id]
    assert len(a.dialled) + len(b.dialled) == 1
    assert a.log.dials.count(b.endpoint) <= 2


def test_a_seed_that_refused_is_asked_again_slowly(network: Network) -> None:
    a = network.spawn("a", key=KEY)
    wrong = network.spawn("wrong", ELSEWHERE, port=5000, key=b"x" * 32)
    a.seed(wrong.endpoint)
    network.run(5)
    assert len(a.log.dials) == 1
    wrong.crash()
    right = network.spawn("right", ELSEWHERE, port=5000, key=KEY)
    network.run_until(lambda: are_peers(a, right), limits.REDIAL_S_MAX + 1)


@pytest.mark.parametrize("key", [None, KEY], ids=["open", "secret"])
def test_one_seed_is_enough_for_a_whole_mesh(network: Network, key: bytes | None) -> None:
    nodes = [network.spawn(f"n{i}", f"10.0.0.{i}", key=key) for i in range(1, 9)]
    for node in nodes[1:]:
        node.seed(nodes[0].endpoint)
    network.run_until(lambda: are_peers(*nodes), 2.0)
    assert all(sorted(node.log.up) == sorted(set(node.log.up)) for node in nodes)


def test_who_joins_at_once_through_different_members_meets(network: Network) -> None:
    nodes = [network.spawn(f"n{i}", f"10.0.0.{i}") for i in range(1, 5)]
    met(network, *nodes)
    late = [network.spawn(f"late{i}", f"10.0.1.{i}") for i in range(4)]
    for node, through in zip(late, nodes, strict=True):
        node.seed(through.endpoint)
    network.run_until(lambda: are_peers(*nodes, *late), 2.0)


def test_two_meshes_become_one_when_any_two_of_them_meet(network: Network) -> None:
    left = [network.spawn(f"l{i}", f"10.0.0.{i}") for i in range(4)]
    right = [network.spawn(f"r{i}", f"10.0.1.{i}") for i in range(4)]
    met(network, *left)
    met(network, *right)
    left[2].seed(right[3].endpoint)
    network.run_until(lambda: are_peers(*left, *right), 2.0)


def test_only_those_are_introduced_whom_the_other_does_not_know(network: Network) -> None:
    nodes = [network.spawn(f"n{i}", f"10.0.0.{i}") for i in range(6)]
    network.all_see_all("mdns")
    network.run_until(lambda: are_peers(*nodes), 2.0)
    assert network.sent["introductions"] == 0


def test_introductions_to_this_node_itself_and_to_peers_are_no_news(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b)
    dials = len(a.log.dials)
    them = [Introduction(n.id, "x", ("tcp://10.0.0.66:1",)) for n in (a, b)]
    a.received(a.membership.peers[b.id].link, Peers(tuple(them)), "")
    network.run(1)
    assert len(a.log.dials) == dials


def test_introductions_cannot_fill_the_table_of_contacts(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SIGHTINGS_MAX", 20)
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    raw = Raw(a)
    link = raw.join()
    made_up = [Introduction(f"{i:016x}", "x", (f"tcp://10.6.6.{i}:1",)) for i in range(50)]
    raw.say(link, Peers(tuple(made_up)))
    assert len(a.membership._contacts.known) == 10
    assert a.membership.dropped["contacts full"] == 40
    network.see(a, b, "mdns")
    network.run_until(lambda: b.id in a.peers, 1.0)


def test_a_flood_of_addresses_is_dialled_a_few_at_a_time(network: Network) -> None:
    a = network.spawn("a")
    for i in range(1000):
        announcement = Announcement(f"{i:016x}", "x", "default", (f"tcp://10.6.6.6:{i}",))
        a.sighted(Sighting("mdns", announcement, present=True))
    network.run(0)
    assert len(a.dialled) == limits.DIALS_MAX
    network.run(1000 / limits.DIALS_MAX * limits.HANDSHAKE_S + 60)
    assert len(set(a.log.dials)) == 1000


# What peers offer


def test_a_new_peer_learns_all_offers_and_then_each_change(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    a.offer(offer(1, "one"), offer(2, "two"))
    met(network, a, b)
    network.run(0.1)
    assert b.offers[a.id] == {1: offer(1, "one"), 2: offer(2, "two")}
    a.offer(offer(3, "three"), drop=(1,))
    network.run(0.1)
    assert set(b.offers[a.id]) == {2, 3}


def test_what_came_and_went_before_anybody_looked_is_not_told(network: Network) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    link = raw.join()
    effects = a.membership.received(link, Offers((offer(1), offer(2)), (1, 7)), network.now)
    assert effects == [PeerOffers(raw.card.id, (offer(2),), ())]


def test_no_offers_message_is_over_the_limit_of_a_control_message(network: Network) -> None:
    a = network.spawn("a")
    many = tuple(offer(i, f"{i}/" + "x" * 240, "tcp://" + "1" * 240) for i in range(5000))
    a.offer(*many)
    raw = Raw(a)
    link = raw.connect()
    raw.hello(link)
    messages = [m for m in raw.say(link, Confirm()) if isinstance(m, Offers)]
    assert len(messages) > 2
    assert max(len(encode_control(m)) for m in messages) <= limits.CONTROL_BYTES_MAX
    assert [o for m in messages for o in m.add] == list(many)


@pytest.mark.parametrize(
    "bad",
    [
        Offer(9, "pull", ""),
        Offer(9, "pull", "a//b"),
        Offer(9, "serve", "a/*"),
        Offer(9, "pull", "a", ("inproc://x",)),
        Offer(9, "pull", "a", ("tcp://10.0.0.1:1", "/etc/passwd")),
        Offer(9, "pull", "a", prefetch=limits.PREFETCH_MAX + 1),
    ],
)
def test_unsound_offers_are_dropped_and_sound_ones_beside_them_kept(
    network: Network, bad: Offer
) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    raw.say(raw.join(), Offers((offer(1), bad, offer(2))))
    assert set(a.offers[raw.card.id]) == {1, 2}
    assert a.membership.dropped["offer"] == 1


def test_a_repeated_offer_is_ignored_and_too_many_are_refused(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CHANNELS_PER_NODE_MAX", 2)
    a = network.spawn("a")
    raw = Raw(a)
    link = raw.join()
    raw.say(link, Offers((offer(1, "one"), offer(1, "other"), offer(2), offer(3))))
    assert a.offers[raw.card.id] == {1: offer(1, "one"), 2: offer(2)}
    assert a.membership.dropped["offer repeated"] == 1
    assert a.membership.dropped["offers full"] == 1


def test_a_mark_received_is_told_with_who_received_it(network: Network) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    link = raw.join()
    (effect,) = a.membership.received(link, Marked("sub/7", True), network.now)
    assert (effect.peer_id, effect.address) == (raw.card.id, "sub/7")  # type: ignore[union-attr]


def test_a_peer_that_moved_keeps_its_link(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b)
    card = msgspec.structs.replace(b.membership.card, endpoints=("tcp://10.0.0.9:1",))
    b.move(card)
    network.run(0.1)
    assert a.membership.peers[b.id].card == card
    assert a.log.down == []


def test_nobody_moves_as_somebody_else(network: Network) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    link = raw.join()
    effects = a.membership.received(link, Moved(Card("e" * 16, "x", ())), network.now)
    assert effects == []
    assert a.membership.dropped["unexpected"] == 1
    assert a.membership.peers[raw.card.id].card == raw.card
    moved = msgspec.structs.replace(raw.card, name="other")
    (effect,) = a.membership.received(link, Moved(moved), network.now)
    assert isinstance(effect, PeerMoved)


# Who speaks out of turn


@pytest.mark.parametrize(
    "message", [Ping(1), Pong(1), Offers(), Confirm(), Marked("x"), Peers(())], ids=repr
)
def test_a_stranger_is_told_once_that_he_is_unknown(network: Network, message: object) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    link = raw.connect()
    assert raw.say(link, message) == [Refuse("unknown")]
    assert raw.say(link, message) == []
    assert a.membership.dropped["unexpected"] == 2


@pytest.mark.parametrize("message", [Bye(), Refuse("unknown"), Refuse("full")], ids=repr)
def test_a_farewell_is_never_answered(network: Network, message: object) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    assert raw.say(raw.connect(), message) == []


def test_half_open_links_are_bounded_and_end(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKES_MAX", 3)
    a = network.spawn("a")
    raw = Raw(a)
    answers = [type(raw.hello(raw.connect())[0]) for _ in range(5)]
    assert answers == [Welcome] * 3 + [Refuse] * 2
    network.run(limits.HANDSHAKE_S + 0.1)
    assert isinstance(raw.hello(raw.connect())[0], Welcome)
    assert a.membership.dropped["handshake timeout"] == 3


def test_the_table_of_the_untrusted_is_bounded(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "UNTRUSTED_MAX", 3)
    a = network.spawn("a", key=KEY)
    for i in range(5):
        announcement = Announcement(f"{i:016x}", "x", "default", ("tcp://10.0.0.9:1",))
        a.sighted(Sighting("mdns", announcement, present=True))
    assert len(a.membership.untrusted) == 3
    assert a.membership.dropped["untrusted full"] == 2


def test_the_memory_of_the_gone_is_bounded(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "GONE_MAX", 3)
    a = network.spawn("a")
    for i in range(5):
        a.process_died(f"{i:016x}")
    assert list(a.membership._contacts.gone) == [f"{i:016x}" for i in (2, 3, 4)]


def test_data_endpoint_is_exactly_one() -> None:
    card = Card("1" * 16, "x", ("tcp://10.0.0.1:1",))
    peer = Peer(card, 1, True, "tcp://10.0.0.1:1", "tcp", False, "", heard=0)
    both = ("ipc:///x", "tcp://10.0.0.2:5", "tcp://10.0.0.1:5", "tcp://10.0.0.1:6")
    assert peer.data_endpoint(both) == "tcp://10.0.0.1:5"
    assert peer.data_endpoint(()) is None
