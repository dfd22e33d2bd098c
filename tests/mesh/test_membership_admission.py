"""Who is let in, who is refused, and who speaks out of turn."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from mesh import limits
from mesh.discovery.source import Announcement, Sighting
from mesh.message import Untrusted
from mesh.peering import Peer
from mesh.realm import Encounter, Realm, Role
from mesh.sockets.control import (
    PROTOCOL,
    Bye,
    Card,
    Confirm,
    Introduction,
    Marked,
    Moved,
    Offers,
    Peers,
    Ping,
    Pong,
    Refuse,
    Welcome,
)
from tests.support.members import ELSEWHERE, KEY, Raw, are_peers, met
from tests.support.network import Network


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


def test_whoever_finds_itself_full_says_so_at_any_step(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PEERS_MAX", 1)
    a, b, c = (network.spawn(n, f"10.0.0.{i}") for i, n in enumerate("abc", 1))
    first, second = Raw(a, "e" * 16), Raw(a, "f" * 16)
    links = first.connect(), second.connect()
    assert isinstance(second.hello(links[1])[0], Welcome)
    assert isinstance(first.hello(links[0])[0], Welcome)
    first.say(links[0], Confirm())
    assert second.say(links[1], Confirm()) == [Refuse("full")]
    assert a.peers == {first.card.id}
    met(network, b, c)
    d = network.spawn("d", "10.0.0.4")
    network.see(b, d, "mdns")
    network.run(1)
    assert (b.peers, d.peers) == ({c.id}, set())


@pytest.mark.parametrize(
    ("said", "told"),
    [("unknown", "reset"), ("full", "full"), ("secret", "secret"), ("\x1b[2J", "refused")],
)
def test_a_peer_that_changes_its_mind_is_down_for_the_reason_it_gave(
    network: Network, said: str, told: str
) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    raw.say(raw.join(), Refuse(said))
    assert a.log.down == [(raw.card.id, told)]


ELSEWHERES: dict[str, dict[str, object]] = {
    "a name that a terminal obeys": {"name": "\x1b[2J"},
    "a name that a terminal obeys as one character": {"name": "\x9b2J"},
    "a name that reads otherwise": {"name": "cam\u202e1-are"},
    "topics on another host": {"topics": ("tcp://10.0.0.66:22",)},
    "topics at no port": {"topics": ("tcp://*:0",)},
    "topics at no port of tcp": {"topics": ("tcp://*:65536",)},
    "topics at a socket of another program": {"topics": ("ipc:///run/docker.sock",)},
    "topics at a socket of another node": {"topics": ("ipc:///run/eeeeeeeeeeeeeeee.topics",)},
    "topics at a path Linux has no room for": {"topics": (f"ipc:///{'x' * 150}/{'f' * 16}.t",)},
    "itself by a name that DNS would be asked for": {"endpoints": ("tcp://host.example:1",)},
    "itself at every address": {"endpoints": ("tcp://*:1",)},
    "itself at a socket of another program": {"endpoints": ("ipc:///run/docker.sock",)},
    "itself inside our process": {"endpoints": ("inproc://zeromq.zap.01",)},
}


@pytest.mark.parametrize("changed", ELSEWHERES.values(), ids=ELSEWHERES)
def test_a_card_that_leads_elsewhere_makes_no_peer_whoever_dialled(
    network: Network, changed: dict[str, object]
) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    good, raw.card = raw.card, msgspec.structs.replace(raw.card, **changed)
    assert raw.hello(raw.connect()) == []
    assert a.membership.dropped["card"] == 1
    a.sighted(Sighting("mdns", Realm("default", None).announce(good), present=True))
    network.run(0)
    a.received(next(iter(a.dialled)), Welcome(raw.card, b"r" * 16), "")
    assert not a.peers
    assert a.membership.dropped["card"] == 2


@pytest.mark.parametrize("changed", ELSEWHERES.values(), ids=ELSEWHERES)
def test_nobody_moves_elsewhere(network: Network, changed: dict[str, object]) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    link = raw.join()
    raw.say(link, Moved(msgspec.structs.replace(raw.card, **changed)))
    assert a.membership.peers[raw.card.id].card == raw.card
    assert a.membership.dropped["card"] == 1


def test_the_sockets_of_a_node_bear_its_id(network: Network) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    sockets = tuple(f"ipc:///tmp/a b/{raw.card.id}.{label}" for label in ("control1", "topics2"))
    raw.card = msgspec.structs.replace(raw.card, endpoints=sockets[:1], topics=sockets[1:])
    raw.join()


def test_an_introduction_leads_to_addresses_only(network: Network) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    link = raw.join()
    where = ("tcp://host.example:22", "tcp://*:1", "tcp://10.0.0.9:70000", "tcp://10.0.0.9:7")
    raw.say(link, Peers((Introduction("e" * 16, "e", where),)))
    network.run(1)
    assert a.log.dials == ["tcp://10.0.0.9:7"]


def test_the_untrusted_are_listed_in_text_that_no_terminal_obeys(network: Network) -> None:
    a = network.spawn("a")
    raw = Raw(a, name="\x1b[2J\x9bK\u202e" + "x" * 300)
    raw.card = msgspec.structs.replace(raw.card, endpoints=("tcp://\r\n\x07:1",))
    raw.hello(raw.connect(), protocol=PROTOCOL + 1)
    listed = a.membership.untrusted[raw.card.id]
    assert listed.name == ("\\x1b[2J\\x9bK\\u202e" + "x" * 300)[:255]
    assert listed.address == "tcp://\\r\\n\\x07:1"


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


def test_a_recorded_proof_is_worth_nothing_at_the_next_meeting(network: Network) -> None:
    a = network.spawn("a", key=KEY)
    raw, realm = Raw(a), Realm("default", KEY)
    link, again = raw.connect(), raw.connect()
    (welcome,) = raw.hello(link)
    assert isinstance(welcome, Welcome)
    meeting = Encounter(raw.card.id, a.id, b"r" * 16, welcome.nonce)
    confirm = Confirm(realm.proof(Role.DIALLER, meeting))
    raw.hello(again)
    assert raw.say(again, confirm) == [Refuse("secret")]
    raw.say(link, confirm)
    assert a.peers == {raw.card.id}


def test_a_proof_is_over_all_that_makes_the_meeting() -> None:
    realm, meeting = Realm("lab", KEY), Encounter("1" * 16, "2" * 16, b"d" * 16, b"a" * 16)
    proofs = {
        realm.proof(Role.DIALLER, meeting),
        realm.proof(Role.ACCEPTOR, meeting),
        Realm("factory", KEY).proof(Role.DIALLER, meeting),
        Realm("lab", b"x" * 32).proof(Role.DIALLER, meeting),
        realm.proof(Role.DIALLER, replace(meeting, dialler_id="3" * 16)),
        realm.proof(Role.DIALLER, replace(meeting, acceptor_id="3" * 16)),
        realm.proof(Role.DIALLER, replace(meeting, dialler_nonce=b"x" * 16)),
        realm.proof(Role.DIALLER, replace(meeting, acceptor_nonce=b"x" * 16)),
    }
    assert len(proofs) == 8
    assert {len(proof) for proof in proofs} == {32}
    assert Realm("lab", None).proof(Role.DIALLER, meeting) == b""


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


def test_a_guest_who_speaks_before_it_confirmed_has_to_start_over(network: Network) -> None:
    a = network.spawn("a")
    raw = Raw(a)
    link = raw.connect()
    raw.hello(link)
    assert raw.say(link, Ping(1)) == [Refuse("unknown")]
    assert raw.say(link, Confirm()) == []
    assert not a.peers


def test_the_memory_of_strangers_is_bounded(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKES_MAX", 3)
    a = network.spawn("a")
    raw = Raw(a)
    for _ in range(5):
        assert raw.say(raw.connect(), Ping(1)) == [Refuse("unknown")]
    assert len(a.membership._admission._told_unknown) == 3


def test_an_announcement_without_a_usable_address_is_kept_for_a_better_one(
    network: Network,
) -> None:
    a, b = network.spawn("a"), network.spawn("b", ELSEWHERE)
    real = b.membership.announcement(b.membership.card)
    useless = msgspec.structs.replace(real, endpoints=("ipc:///run/x", "http://x"))
    a.sighted(Sighting("mdns", useless, present=True))
    network.run(1)
    assert a.log.dials == []
    network.see(a, b, "mdns")
    network.run_until(lambda: are_peers(a, b), 1.0)


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
    both = ("ipc:///x", "tcp://*:5", "tcp://*:6")
    assert peer.data_endpoint(both) == "tcp://10.0.0.1:5"
    assert peer.data_endpoint(()) is None
