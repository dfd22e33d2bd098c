"""Seeds and introductions: whom a node dials, and when again."""

from __future__ import annotations

import pytest

from mesh import limits
from mesh.discovery.source import Announcement, Sighting
from mesh.sockets.control import (
    Introduction,
    Peers,
)
from tests.support.members import ELSEWHERE, KEY, Raw, are_peers, met
from tests.support.network import Network


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
