"""Who becomes a peer and who stays one: memberships joined in memory."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest

from mesh import limits
from mesh.discovery.source import Sighting
from mesh.peering import HangUp, Send, host_of
from mesh.sockets.control import (
    Bye,
    Confirm,
    Introduction,
    Marked,
    Offers,
    Peers,
    Ping,
    Pong,
)
from tests.support.members import ELSEWHERE, KEY, Raw, are_peers, met, offer
from tests.support.network import Network


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
    network.run_until(lambda: are_peers(a, b), 1.0)
    assert len(a.dialled) == 1
    network.run(5)
    assert a.log.up == [b.id]
    assert b.log.up == [a.id]


def test_dials_that_nobody_answered_end_with_the_first_that_was(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    real = b.membership.announcement(b.membership.card)
    both = msgspec.structs.replace(real, endpoints=("tcp://10.0.0.99:1", b.endpoint))
    a.sighted(Sighting("mdns", both, present=True))
    network.run_until(lambda: are_peers(a, b), 1.0)
    assert len(a.dialled) == 1


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
    offered = ("ipc:///run/x*", "tcp://*:5")
    near, far = a.membership.peers[b.id], a.membership.peers[c.id]
    assert (near.transport, near.same_host) == ("ipc", True)
    assert near.data_endpoint(offered) == "ipc:///run/x*"
    assert (far.transport, far.same_host) == ("tcp", False)
    assert far.data_endpoint(offered) == "tcp://10.0.0.2:5"
    assert far.data_endpoint(("ipc:///run/x",)) is None
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
    dials = len(a.log.dials)
    network.see(a, b, "local")
    network.run(60)
    assert len(a.log.dials) == dials


def test_who_dies_while_it_is_dialled_is_dialled_no_more(network: Network) -> None:
    a, b = network.spawn("a"), network.spawn("b")
    network.see(a, b)
    network.run(0)
    assert a.dialled
    b.crash()
    a.process_died(b.id)
    assert not a.dialled
    network.see(a, b)
    network.run(60)
    assert a.log.up == []


def test_a_broken_link_is_dialled_again(network: Network) -> None:
    """The shell may know it before silence tells: nobody is left at the other end."""
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b)
    network.run(1)
    a.link_failed(a.membership.peers[b.id].link, "no route to host")
    assert a.log.down == [(b.id, "reset")]
    network.run_until(lambda: are_peers(a, b), 3.0)
    network.run(5)
    assert are_peers(a, b)


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


@pytest.mark.parametrize("source", ["mdns", "local"])
def test_a_cut_of_an_hour_heals_while_the_sources_still_see_both(
    network: Network, source: str
) -> None:
    """They tell of changes only, so nothing is said when the cut ends."""
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b, source=source)
    network.partition([ELSEWHERE])
    network.run(3600)
    assert a.log.down == [(b.id, "silent")]
    network.heal()
    network.run_until(lambda: are_peers(a, b), limits.REDIAL_S_MAX + limits.HANDSHAKE_S)


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
    assert a.log.down == [(b.id, "reset")]
    assert b.log.down == [(a.id, "silent")]
    assert are_peers(a, b)


def test_who_comes_again_has_forgotten_what_was_said_before(network: Network) -> None:
    """Its link was up at both ends, and it dials: nothing of what it offered then holds."""
    a = network.spawn("a")
    raw = Raw(a)
    raw.say(raw.join(), Offers((offer(1),)))
    assert a.offers[raw.card.id]
    link = raw.join()
    assert a.log.down == [(raw.card.id, "reset")]
    assert a.log.up == [raw.card.id, raw.card.id]
    assert a.membership.peers[raw.card.id].link == link
    assert not a.offers[raw.card.id]


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


def test_redials_grow_apart_and_end_after_ten_minutes_if_no_source_sees_it(
    network: Network,
) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    met(network, a, b)
    network.see(a, b, "mdns", present=False)
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
    effects = a.membership.leave("maintenance")
    assert effects == [Send(link, Bye("maintenance")), HangUp(link)]
    assert a.membership.leave("again") == []
    assert a.membership.received(link, Ping(1), network.now) == []
    network.see(a, b)
    assert a.membership.tick(network.now + 60) == []
    assert a.membership.next_deadline() is None
