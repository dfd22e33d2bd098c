"""The control thread's own rules, driven by hand: all that is around it only notes."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from mesh import host
from mesh.control_loop import _DYING_S, ControlLoop
from mesh.discovery.source import Announcement, Sighting
from mesh.errors import Closed
from mesh.message import PeerEvent, PeerInfo
from mesh.options import SubscriberOptions
from mesh.peering import (
    Acknowledged,
    Dial,
    HangUp,
    Peer,
    PeerDown,
    PeerMoved,
    PeerOffers,
    PeerUp,
    Send,
)
from mesh.presence import Presence
from mesh.sockets.control import Card, Offer, Ping
from mesh.sockets.control_link import Heard
from mesh.sockets.home import Counters, Unhurried
from mesh.sockets.subscription import Subscription
from tests.support.homes import Homes
from tests.support.waiting import until

OWN, PEER = "0" * 16, "1" * 16
CARD = Card(OWN, "own", ("ipc:///own",), topics=("ipc:///topics",))


@dataclass(eq=False)
class Notes:
    """Whatever is called is noted under its name, in one list for all; some of it raises."""

    log: list[tuple[Any, ...]] = field(default_factory=list)
    raising: set[str] = field(default_factory=set)

    def __call__(self, name: str, *arguments: object) -> None:
        self.log.append((name, *arguments))
        if name in self.raising:
            raise OSError(f"{name} failed")

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        return [entry for entry in self.log if entry[0] in names]


class Membership:
    def __init__(self, note: Notes) -> None:
        self.note = note
        self.dropped: Counter[str] = Counter()
        self.peers: dict[str, Peer] = {}
        self.effects: list[Any] = []
        """What the next call of `received` returns."""

    def announcement(self, card: Card) -> Announcement:
        return Announcement(card.id, card.name, "r", card.endpoints)

    def next_deadline(self) -> float | None:
        return None

    def tick(self, now: float) -> list[Any]:
        self.note("tick")
        return []

    def received(self, link: object, message: object, now: float, *, address: str) -> list[Any]:
        self.note(f"received {link!r}")
        return self.effects

    def sighted(self, sighting: Sighting, now: float) -> list[Any]:
        self.note(f"sighted {sighting.announcement.name}")
        return []

    def link_failed(self, link: object, reason: str, now: float) -> list[Any]:
        self.note("link failed", link)
        return []

    def process_died(self, peer: str, now: float) -> list[Any]:
        self.note("process died", peer)
        return []

    def offer(self, add: tuple[Offer, ...], drop: tuple[int, ...]) -> list[Any]:
        self.note("offer", tuple(offer.key for offer in add), tuple(drop))
        return []

    def moved(self, card: Card) -> list[Any]:
        self.note("moved", card)
        return []

    def leave(self, reason: str) -> list[Any]:
        self.note("bye")
        return []


class Control:
    def __init__(self, note: Notes) -> None:
        self.note = note
        self.dropped: Counter[str] = Counter()
        self.failed: list[tuple[Any, str]] = []
        self.noticed = False
        self.linger_ms = 1000
        self.heard: list[Heard] = []
        self.floods = False
        self.fd = os.eventfd(0)

    def fileno(self) -> int:
        return self.fd

    def receive(self) -> list[Heard]:
        self.note("receive")
        self.noticed = self.floods
        heard, self.heard = self.heard, []
        return heard

    def send(self, link: object, message: object) -> None:
        self.note(f"send {link!r}")

    def dial(self, link: int, endpoint: str) -> None:
        self.note("dial", link)

    def hang_up(self, link: object) -> None:
        self.note("hang up", link)

    def close(self) -> None:
        self.note("control closed")


class Source:
    name = "local"
    interval_s = 1000.0
    ignored = 3

    def __init__(self, note: Notes) -> None:
        self.note = note
        self.seen: list[Sighting] = []

    def start(self, own: Announcement) -> None:
        self.note("source started")

    def fileno(self) -> int:
        return -1

    def sightings(self) -> list[Sighting]:
        seen, self.seen = self.seen, []
        return seen

    def update(self, own: Announcement) -> None:
        self.note("source updated", own.endpoints)

    def close(self) -> None:
        self.note("source closed")


class Core:
    kind = "queue"
    seeks = "pull"
    channel = "jobs"

    def __init__(self, note: Notes) -> None:
        self.note = note
        self.counters = Counters(sent=1)
        self.link = SimpleNamespace(
            what="core",
            closed=False,
            lock=threading.Lock(),
            abandon=lambda: note("abandoned"),
        )

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        self.note("attach", offer.key, endpoint)

    def detach(self, peer: int, key: int, reason: str) -> None:
        self.note("detach", key, reason)

    def tick(self) -> None:
        self.note("core ticked")

    def close(self, linger_ms: int) -> None:
        self.note("core closed", linger_ms)
        self.link.closed = True


class Topics:
    kind = "topic"
    waits = False

    def __init__(self, note: Notes) -> None:
        self.note = note
        self.counters = Counters()
        self.fd = os.eventfd(0)
        self.link = SimpleNamespace(
            fileno=lambda: self.fd,
            lock=threading.Lock(),
            abandon=lambda: note("abandoned"),
        )

    def look(self) -> None: ...

    def wait_drained(self, until: Callable[[], float]) -> None:
        self.note("topics drained", until())

    def tick(self) -> None:
        self.note("topics ticked")

    def marked(self, peer: int, address: str) -> None:
        self.note("marked", address)

    def lost(self, peer: int) -> None:
        self.note("lost")

    def close(self, linger_ms: int) -> None:
        self.note("topics closed", linger_ms)


class Bench:
    """A control loop and all that is around it. It runs only where a test starts it."""

    def __init__(self) -> None:
        self.note = Notes()
        self.card = CARD
        self.presence = Presence()
        self.membership = Membership(self.note)
        self.control = Control(self.note)
        self.topics = Topics(self.note)
        self.sources = [Source(self.note), Source(self.note)]
        self.loop = ControlLoop(
            name="n",
            membership=self.membership,  # type: ignore[arg-type]
            control=self.control,  # type: ignore[arg-type]
            topics=(self.topics,),  # type: ignore[arg-type]
            sources=self.sources,
            card=lambda: self.card,
            presence=self.presence,
            transport=SimpleNamespace(close=lambda: self.note("context ended")),  # type: ignore[arg-type]
            on_end=lambda: self.note("ended"),
        )

    def forget(self) -> None:
        for each in (self.control, self.topics):
            os.close(each.fd)

    def core(self, *offers: Offer) -> Core:
        core = Core(self.note)
        self.loop.add(core, *offers)  # type: ignore[arg-type]
        return core

    def round(self) -> None:
        """One round: what is posted, and what is due."""
        self.loop._next_tick = 0.0
        self.loop._round()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    if not bench.loop.ended:
        bench.loop.give_up()
    bench.forget()


def a_peer(**card: Any) -> Peer:
    return Peer(
        Card(PEER, "peer", ("ipc:///peer",), **card),
        7,
        dialled=True,
        address="ipc:///peer",
        transport="ipc",
        same_host=True,
        remote_host="",
        heard=0.0,
    )


def pull(key: int) -> Offer:
    return Offer(key, "pull", "jobs", ("ipc:///x",))


# -- One fault costs one thing


def test_each_effect_is_carried_out_whatever_becomes_of_the_others(bench: Bench) -> None:
    bench.note.raising = {"send 1", "dial", "hang up", "marked", "lost"}
    bench.presence.observers.append(lambda event: 1 / 0)
    bench.core()
    bench.round()
    peer = bench.membership.peers[PEER] = a_peer()
    bench.loop._apply(
        [
            Send(1, Ping(1)),
            Send(2, Ping(1)),
            Dial(3, "ipc:///x"),
            HangUp(4),
            Acknowledged(PEER, "address", False),
            PeerUp(peer),
            PeerOffers(PEER, (pull(5),), ()),
            PeerDown(peer, "died"),
        ]
    )
    names = [entry[0] for entry in bench.note.log if entry[0] not in ("tick", "topics ticked")]
    assert names[-8:] == [
        *("send 1", "send 2", "dial", "hang up", "marked", "attach", "detach", "lost")
    ]
    assert (bench.loop.errors, dict(bench.presence.peers)) == (5, {})


def test_what_one_message_does_keeps_none_of_the_others_from_being_heard(bench: Bench) -> None:
    bench.note.raising = {"received 1"}
    bench.control.heard = [Heard(link, Ping(1), "") for link in (1, 2)]
    bench.control.failed = [(3, "reset"), (4, "reset")]
    bench.loop._hear()
    assert bench.note.named("received 2", "link failed") == [
        ("received 2",),
        ("link failed", 4),
        ("link failed", 3),
    ]


def test_what_one_sighting_does_keeps_none_of_the_others_from_being_told(bench: Bench) -> None:
    bench.note.raising = {"sighted 1"}
    bench.sources[0].seen = [
        Sighting("local", Announcement("", name, "r", ()), True) for name in ("1", "2")
    ]
    bench.loop._look_at(bench.sources[0])
    assert bench.note.named("sighted 2")


def test_the_loop_survives_what_it_is_asked_to_do_and_tells_it(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.loop.start()
    bench.loop.post(lambda: 1 / 0)
    assert bench.loop.call(lambda: "still here", 5) == "still here"
    assert bench.loop.call(bench.loop.dropped, 5)["internal error"] == 1
    assert "unexpected error in its control thread" in caplog.text


def test_closing_goes_on_whatever_raises_meanwhile(bench: Bench) -> None:
    bench.note.raising = {"core closed", "topics closed", "bye", "control closed", "source closed"}
    bench.presence.observers.append(lambda event: 1 / 0)
    bench.core()
    bench.loop.give_up()
    assert bench.loop.ended
    last = [entry[0] for entry in bench.note.log[-3:]]
    assert last == ["context ended", "topics drained", "ended"]
    assert len(bench.note.named("source closed")) == 2


# -- Everything gets its turn


def test_a_flood_of_messages_keeps_nothing_else_from_its_turn(bench: Bench) -> None:
    bench.control.noticed = bench.control.floods = True
    bench.core()
    for _ in range(3):
        bench.round()
    assert len(bench.note.named("receive")) == 3, "one round of it at a time"
    assert len(bench.note.named("tick")) == 3
    assert len(bench.note.named("core ticked")) == 3
    assert bench.loop._sleep_s() == 0, "and it goes on at once"


def test_actions_that_post_each_other_keep_nothing_else_from_its_turn(bench: Bench) -> None:
    def again() -> None:
        bench.note("again")
        bench.loop.post(again)

    bench.loop.post(again)
    for _ in range(3):
        bench.round()
    assert len(bench.note.named("again")) == len(bench.note.named("tick")) == 3
    bench.loop._inbox.clear()


# -- Cores and what is offered for them


def test_a_core_that_closed_by_itself_is_no_longer_offered_and_its_counts_stay(
    bench: Bench,
) -> None:
    core = bench.core(pull(1), pull(2))
    bench.round()
    core.link.closed = True
    bench.round()
    assert bench.note.named("offer") == [("offer", (1, 2), ()), ("offer", (), (1, 2))]
    assert bench.loop.wiring.cores == ()
    bench.loop.remove(core)  # type: ignore[arg-type]  # and its handle is given back later
    bench.round()
    assert len(bench.note.named("offer")) == 2
    assert bench.loop.counters()["queue"].sent == 1


def test_what_is_given_back_is_withdrawn_before_it_is_closed(bench: Bench) -> None:
    core = bench.core(pull(1))
    bench.loop.remove(core)  # type: ignore[arg-type]
    bench.round()
    assert bench.note.named("offer", "core closed") == [
        ("offer", (1,), ()),
        ("offer", (), (1,)),
        ("core closed", 1000),
    ]


def test_what_cores_have_counted_is_kept_in_one_place_however_many_there_were(
    bench: Bench,
) -> None:
    cores = weakref.WeakSet(bench.core() for _ in range(10))
    for core in list(cores):
        bench.loop.remove(core)  # type: ignore[arg-type]
    del core
    bench.round()
    gc.collect()
    assert (len(cores), bench.loop.counters()["queue"].sent) == (0, 10)


def test_a_subscription_that_is_given_back_is_no_longer_watched(bench: Bench, homes: Homes) -> None:
    """It still expects a mark, of a publisher that is not there."""
    core = Subscription(homes.make(1), "t", SubscriberOptions())
    bench.loop.add(core)
    bench.membership.peers[PEER] = a_peer()
    bench.loop.wiring.offered(PEER, [Offer(1, "publish", "t", ("ipc:///nobody",))], ())
    bench.round()
    assert core.link.fileno() in bench.loop._watched
    bench.loop.remove(core)
    bench.round()
    assert core.link.fileno() not in bench.loop._watched


def test_links_that_failed_are_tried_again(bench: Bench) -> None:
    bench.note.raising = {"attach"}
    bench.core()
    bench.round()
    bench.membership.peers[PEER] = a_peer()
    bench.loop._apply([PeerOffers(PEER, (pull(1),), ())])
    bench.note.raising = set()
    bench.round()
    assert len(bench.note.named("attach")) == 2
    assert bench.loop.dropped()["link failed"] == 1


def test_a_forked_child_finds_cores_abandoned_that_the_loop_has_not_seen_yet(bench: Bench) -> None:
    bench.core()
    bench.loop.abandon()
    assert len(bench.note.named("abandoned")) == 2, "the core, and the topics"
    with pytest.raises(Closed):
        bench.loop.call(lambda: None, 5)


# -- Addresses


def test_a_peer_that_moved_has_its_offers_attached_anew(bench: Bench) -> None:
    bench.core()
    bench.round()
    peer = bench.membership.peers[PEER] = a_peer()
    bench.loop._apply([PeerOffers(PEER, (pull(1),), ()), PeerMoved(peer)])
    assert [entry[0] for entry in bench.note.named("attach", "detach")] == [
        *("attach", "detach", "attach")
    ]


def test_sources_and_peers_are_told_of_new_addresses_once(bench: Bench) -> None:
    bench.round()
    assert not bench.note.named("moved", "source updated")
    bench.card = Card(OWN, "own", ("ipc:///own", "tcp://10.0.0.9:1"))
    bench.note.raising = {"source updated"}
    bench.round()
    bench.round()
    assert bench.note.named("moved") == [("moved", bench.card)]
    assert bench.note.named("source updated") == [("source updated", bench.card.endpoints)] * 2


# -- Processes


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Any]]:
    """What `host.open_process` does, by pid."""
    answers: dict[int, Any] = {}

    def open_process(pid: int, started: int) -> int | None:
        if isinstance(answers[pid], Exception):
            raise answers[pid]
        assert answers[pid] is None or isinstance(answers[pid], int)
        return answers[pid]  # type: ignore[no-any-return]

    monkeypatch.setattr(host, "open_process", open_process)
    return answers  # type: ignore[return-value]


def test_a_peer_whose_process_cannot_be_asked_for_is_not_taken_for_dead(
    bench: Bench, processes: dict[int, Any]
) -> None:
    processes[5] = None
    bench.loop._apply([PeerUp(a_peer(pid=5))])
    bench.round()
    assert not bench.note.named("process died")
    assert PEER in bench.presence.peers


def test_a_peer_whose_process_is_dead_already_is_told_as_such(
    bench: Bench, processes: dict[int, Any]
) -> None:
    processes[5] = ProcessLookupError()
    bench.loop._apply([PeerUp(a_peer(pid=5))])
    bench.round()
    assert bench.note.named("process died") == [("process died", PEER)]


def test_a_process_that_ends_is_told_and_its_descriptor_given_up(
    bench: Bench, processes: dict[int, Any]
) -> None:
    fd = processes[5] = os.eventfd(0)
    bench.loop._apply([PeerUp(a_peer(pid=5))])
    bench.round()
    assert not bench.note.named("process died")
    os.eventfd_write(fd, 1)
    bench.round()
    assert bench.note.named("process died") == [("process died", PEER)]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_connection_that_broke_waits_for_the_kernels_word_before_it_is_a_lost_link(
    bench: Bench, processes: dict[int, Any]
) -> None:
    """A process that dies closes its connections first: it died, and is not to be redialled."""
    processes[5] = os.eventfd(0)
    peer = a_peer(pid=5)
    bench.membership.peers[PEER] = peer
    bench.loop._apply([PeerUp(peer)])
    bench.control.failed = [(peer.link, "no route to host"), (b"other", "no route to host")]
    bench.round()
    assert bench.note.named("link failed") == [("link failed", b"other")], "nobody is watched there"
    now = time.monotonic()
    bench.loop._clear_up(now)
    assert len(bench.note.named("link failed")) == 1, "it has a moment"
    assert bench.loop._sleep_s() <= _DYING_S + 0.001
    bench.loop._clear_up(now + _DYING_S)
    assert bench.note.named("link failed")[1:] == [("link failed", peer.link)]
    assert not bench.loop._suspects


# -- Its end


def test_that_the_node_closes_is_told_to_each_core_that_goes_on_whatever_another_does(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    class Finishing(Core, Unhurried):  # type: ignore[misc]
        def __init__(self, error: Exception | None) -> None:
            super().__init__(bench.note)
            self.error = error

        def close(self, linger_ms: int) -> None:
            super().close(linger_ms)
            if self.error is not None:
                raise self.error

        def go_on(self) -> bool:
            return False

    # The second could start no thread: the interpreter ends.
    cores = [Finishing(error) for error in (ValueError("no"), RuntimeError("no thread"), None)]
    for core in cores:
        bench.loop.add(core)  # type: ignore[arg-type]
    bench.round()
    bench.loop.leave(10)
    assert len(bench.note.named("core closed")) == 3
    assert caplog.text.count("unexpected error") == 1


def test_the_goodbye_takes_no_longer_than_it_was_given(bench: Bench) -> None:
    bench.core()
    bench.loop.post(lambda: bench.loop.leave(0.3))
    bench.loop.run()
    (_, core_ms), (_, topics_ms) = bench.note.named("core closed", "topics closed")
    for linger_ms in (core_ms, topics_ms, bench.control.linger_ms):
        assert 50 <= linger_ms <= 300


@pytest.mark.parametrize(("timeout", "least", "most"), [(0, 50, 50), (3e9, 2e9, (1 << 31) - 1)])
def test_linger_is_what_sends_at_all_and_what_an_int_holds(
    bench: Bench, timeout: float, least: int, most: int
) -> None:
    bench.core()
    bench.loop.post(lambda: bench.loop.leave(timeout))
    bench.loop.run()
    ((_, linger_ms),) = bench.note.named("core closed")
    assert least <= linger_ms <= most
    assert bench.control.linger_ms <= 1000, "a goodbye never takes longer"


def test_sockets_are_closed_before_the_nodes_file_is_given_up_and_the_context_ends_last(
    bench: Bench,
) -> None:
    """Whoever is killed in between leaves a file by which the rest is found."""
    bench.core()
    bench.loop.give_up()
    order = [entry[0] for entry in bench.note.log if entry[0] not in ("tick", "receive")]
    assert order == [
        *("core closed", "topics closed", "bye", "control closed"),
        *("source closed", "source closed", "context ended", "topics drained", "ended"),
    ]


def test_it_runs_once_in_whichever_thread_comes_first(bench: Bench) -> None:
    bench.loop.post(lambda: bench.loop.leave(0))
    bench.loop.run()
    bench.loop.run()
    bench.loop.start()
    bench.loop._thread.join(5)
    assert len(bench.note.named("ended")) == 1


def test_the_end_is_told_to_who_waits(bench: Bench) -> None:
    told: list[tuple[PeerEvent | None, bool]] = []
    bench.presence.observers.append(lambda event: told.append((event, bench.loop.ended)))
    bench.loop.start()
    bench.loop.post(lambda: bench.loop.leave(0))
    assert bench.presence.wait_until(lambda: bench.loop.ended, 5)
    until(lambda: len(told) == 2)
    assert told == [(None, False), (None, True)]


def test_who_asks_a_loop_that_has_ended_or_ends_is_told_so(bench: Bench) -> None:
    bench.loop.give_up()
    with pytest.raises(Closed, match="'n' is closing"):
        bench.loop.call(lambda: None, 5)
    held = Bench()
    with pytest.raises(Closed, match="'n' is closing"):
        held.loop.call(lambda: None, 0.01)  # it never started
    held.loop.give_up()
    held.forget()


def test_who_asks_gets_what_it_asked_for_or_what_that_raised(bench: Bench) -> None:
    bench.loop.start()
    assert bench.loop.call(lambda: threading.current_thread().name, 5) == "mesh control n"
    with pytest.raises(TimeoutError, match="the action's own"):
        bench.loop.call(_times_out, 5)
    assert bench.loop.call(lambda: bench.loop.call(lambda: "within", 0), 5) == "within"


def _times_out() -> None:
    raise TimeoutError("the action's own")


def test_statistics_tell_what_sources_ignored(bench: Bench) -> None:
    assert bench.loop.dropped()["local ignored"] == 6


def test_observers_are_told_who_came_and_who_went(bench: Bench) -> None:
    told: list[PeerEvent | None] = []
    bench.presence.observers += [lambda event: 1 / 0, told.append]
    peer = a_peer()
    info = PeerInfo(PEER, "peer", "ipc", "ipc:///peer", 0, True)
    bench.loop._apply([PeerUp(peer)])
    assert bench.presence.peers == {PEER: info}
    bench.loop._apply([PeerDown(peer, "bye")])
    assert bench.presence.peers == {}
    assert told == [PeerEvent("joined", info, ""), PeerEvent("left", info, "bye")]
