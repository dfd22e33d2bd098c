"""Seeds and introductions: whom a node dials, and when again."""

from __future__ import annotations

import msgspec
import pytest

from mesh import limits
from mesh.discovery.source import Announcement, Sighting
from mesh.sockets.control import (
    Introduction,
    Peers,
)
from tests.support.members import ELSEWHERE, KEY, Raw, are_peers, met
from tests.support.network import Network, SimNode, check_invariants


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


def test_a_withdrawal_needs_no_more_than_the_id(network: Network) -> None:
    """The source may have forgotten the rest."""
    a = network.spawn("a")
    forge(a, 1)
    network.run(1)
    a.sighted(Sighting("mdns", Announcement(f"{0:016x}", "", "", ()), present=False))
    dials = len(a.log.dials)
    network.run(120)
    assert len(a.log.dials) == dials


def forge(a: SimNode, count: int, *, first: int = 0, endpoints: int = 1) -> None:
    """Announcements of nodes that are not there, at addresses that swallow everything."""
    for i in range(first, first + count):
        where = tuple(f"tcp://10.{6 + i // 256}.{i % 256}.{j + 1}:5555" for j in range(endpoints))
        announcement = Announcement(f"{i:016x}", "x", "default", where)
        a.sighted(Sighting("mdns", announcement, present=True))


@pytest.fixture
def small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SIGHTINGS_MAX", 300)


@pytest.mark.usefixtures("small_table")
def test_a_full_table_takes_in_newcomers_and_lets_go_of_the_oldest_forgery(
    network: Network,
) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    forge(a, 350)
    assert len(a.membership._contacts.known) == 300
    assert a.membership.dropped["contacts full"] == 50
    network.see(a, b, "mdns")
    network.run_until(lambda: are_peers(a, b), 2 * limits.HANDSHAKE_S)


@pytest.mark.usefixtures("small_table")
def test_a_flood_costs_nobody_a_dial_who_was_a_peer_or_is_seen_by_this_machine(
    network: Network,
) -> None:
    a, b, c = (network.spawn(n, f"10.0.0.{i}") for i, n in enumerate("abc", 1))
    met(network, a, b)
    network.partition(["10.0.0.2"], ["10.0.0.3"])
    network.see(a, c, "local")
    network.run(5)
    assert not a.peers
    forge(a, 300)
    for i in range(60 * 30):
        network.at(i / 30, lambda i=i: forge(a, 1, first=1000 + i))  # type: ignore[misc]
    a.log.dials.clear()
    network.run(60)
    assert {b.id, c.id} <= a.membership._contacts.known.keys()
    # Pauses of 0.5 to 30 s, at most, and as long as a handshake may take.
    assert a.log.dials.count(b.endpoint) >= 4
    assert a.log.dials.count(c.endpoint) >= 4


@pytest.mark.usefixtures("small_table")
def test_what_sources_said_of_a_live_peer_outlasts_a_flood(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b)
    forge(a, 500)
    assert "mdns" in a.membership._contacts.known[b.id].endpoints


@pytest.mark.usefixtures("small_table")
def test_a_lost_peer_that_no_source_told_of_finds_room_in_a_full_table(network: Network) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    link = raw.join()
    forge(a, 350)
    a.link_failed(link, "reset")
    network.run(limits.REDIAL_S_MIN + limits.HANDSHAKE_S)
    assert raw.card.endpoints[0] in a.log.dials


@pytest.mark.usefixtures("small_table")
def test_who_is_being_dialled_keeps_its_place(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    network.partition([ELSEWHERE])
    network.see(a, b, "mdns")
    network.run(0)
    forge(a, 500)
    assert b.id in a.membership._contacts.known
    network.heal()
    network.run_until(lambda: are_peers(a, b), 1.0)


def test_a_newcomer_is_dialled_within_seconds_while_forgeries_swallow_every_dial(
    network: Network,
) -> None:
    """True announcements of nodes that ended, sent again with other addresses."""
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    forge(a, 200, endpoints=limits.ENDPOINTS_MAX)
    network.run(1)
    assert len(a.dialled) == limits.DIALS_MAX
    network.see(a, b, "mdns")
    network.run_until(lambda: are_peers(a, b), 2 * limits.HANDSHAKE_S)


def test_a_newcomer_is_not_kept_waiting_by_forgeries_that_go_on(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    forge(a, 60, endpoints=8)
    network.see(a, b, "mdns")
    forge(a, 60, first=100, endpoints=8)
    for i in range(600):
        network.at(i / 30, lambda i=i: forge(a, 1, first=1000 + i, endpoints=8))  # type: ignore[misc]
    network.run_until(lambda: are_peers(a, b), 20.0)


def test_of_one_node_a_few_addresses_are_dialled_at_a_time_and_all_before_it_rests(
    network: Network,
) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    real = b.membership.announcement(b.membership.card)
    where = (*(f"tcp://10.9.9.{i}:1" for i in range(1, 20)), b.endpoint)
    a.sighted(Sighting("mdns", msgspec.structs.replace(real, endpoints=where), present=True))
    network.run(0)
    assert len(a.dialled) == limits.DIALS_EACH_MAX
    took = network.run_until(lambda: are_peers(a, b), 10.0)
    assert took == pytest.approx(2 * limits.HANDSHAKE_S, abs=0.1)
    assert sorted(a.log.dials) == sorted(where)


def test_news_of_whom_all_dials_are_at_does_not_make_it_wait_twice(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DIALS_MAX", 1)
    a = network.spawn("a")
    forge(a, 1, endpoints=2)
    network.run(0)
    forge(a, 1, endpoints=3)
    a._apply(a.membership.link_failed(next(iter(a.dialled)), "gone", network.now))
    check_invariants(a.membership)
    assert len(a.membership._contacts.waiting) == 1


def test_a_flood_of_addresses_is_dialled_a_few_at_a_time(network: Network) -> None:
    a = network.spawn("a")
    for i in range(1, 1001):
        announcement = Announcement(f"{i:016x}", "x", "default", (f"tcp://10.6.6.6:{i}",))
        a.sighted(Sighting("mdns", announcement, present=True))
    network.run(0)
    assert len(a.dialled) == limits.DIALS_MAX
    network.run(1000 / limits.DIALS_MAX * limits.HANDSHAKE_S + 60)
    assert len(set(a.log.dials)) == 1000
