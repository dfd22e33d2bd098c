"""What peers tell each other once they are up: offers, marks, moves."""

from __future__ import annotations

import msgspec
import pytest

from mesh import limits
from mesh.peering import Effect, PeerMoved, PeerOffers
from mesh.sockets.control import (
    Card,
    Confirm,
    Marked,
    Moved,
    Offer,
    Offers,
    encode_control,
)
from tests.support.members import ELSEWHERE, Raw, met, offer
from tests.support.network import Network


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
        Offer(9, "pull", "a", ("tcp://*:1", "/etc/passwd")),
        Offer(9, "pull", "a", ("tcp://10.0.0.1:1",)),
        Offer(9, "pull", "a", ("tcp://*:0",)),
        Offer(9, "pull", "a", ("tcp://*:65536",)),
        Offer(9, "pull", "a", ("ipc:///run/docker.sock",)),
        Offer(9, "pull", "a", (f"ipc:///{'x' * 150}/{'f' * 16}.pull",)),
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


def test_who_dialled_us_and_moved_is_reached_where_it_is_now(network: Network) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    link = raw.join()
    new = ("tcp://10.9.9.8:1", "tcp://10.9.9.9:2")
    peer = a.membership.peers[raw.card.id]

    def moves(*endpoints: str) -> list[Effect]:
        moved = Moved(msgspec.structs.replace(raw.card, endpoints=endpoints))
        return a.membership.received(link, moved, network.now)

    assert moves(*new) == [PeerMoved(peer)]
    assert peer.address == "tcp://10.9.9.9:2", "the host that its link comes from"
    assert moves(*new, "tcp://10.9.9.7:1") == [], "what it is reached by is as it was"
    assert moves(new[0]) == [PeerMoved(peer)]
    assert peer.data_endpoint(("tcp://*:5",)) == "tcp://10.9.9.8:5"


def test_nobody_moves_as_somebody_else(network: Network) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    link = raw.join()
    effects = a.membership.received(link, Moved(Card("e" * 16, "x", ())), network.now)
    assert effects == []
    assert a.membership.dropped["unexpected"] == 1
    assert a.membership.peers[raw.card.id].card == raw.card
    raw.say(link, Moved(msgspec.structs.replace(raw.card, name="other")))
    assert a.membership.peers[raw.card.id].card.name == "other"
