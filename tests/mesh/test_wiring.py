"""Who is attached to what, of cores that only note what they are told."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from mesh import limits
from mesh.errors import Closed
from mesh.sockets.control import Offer, OfferKind
from mesh.wiring import Wiring

OWN, PEER, OTHER = "0" * 16, "1" * 16, "2" * 16


@dataclass(eq=False)
class Core:
    """Attached to what it holds; raises what it is told to."""

    seeks: OfferKind | None
    channel: str
    attached: dict[tuple[str, int], str] = field(default_factory=dict)
    detached: list[tuple[str, int, str]] = field(default_factory=list)
    error: Exception | None = None
    kind = "queue"
    link = SimpleNamespace(what="a core")

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        if self.error is not None:
            raise self.error
        self.attached[f"{peer:016x}", offer.key] = endpoint

    def detach(self, peer: int, key: int, reason: str) -> None:
        if self.error is not None:
            raise self.error
        del self.attached[f"{peer:016x}", key]
        self.detached.append((f"{peer:016x}", key, reason))


class Table(Wiring):
    """Offers are found at an address of their peer, which may change."""

    def __init__(self) -> None:
        self.address = "here"
        super().__init__(lambda peer, offer: f"{self.address}/{peer}/{offer.key}", OWN)

    def have(self, *cores: Core) -> None:
        for core in cores:
            self.add(core)  # type: ignore[arg-type]

    def drop(self, core: Core) -> None:
        self.remove(core)  # type: ignore[arg-type]


def pull(key: int, channel: str = "jobs") -> Offer:
    return Offer(key, "pull", channel, ("ipc:///x",))


def test_a_core_is_attached_to_what_it_seeks_whichever_comes_first() -> None:
    table, early, late = Table(), Core("pull", "jobs"), Core("pull", "jobs")
    table.have(early)
    table.offered(PEER, [pull(1), pull(2, "other"), Offer(3, "serve", "jobs")], ())
    table.have(late)
    assert early.attached == late.attached == {(PEER, 1): f"here/{PEER}/1"}


def test_an_offer_that_is_withdrawn_is_detached_where_it_was_attached_and_nowhere_else() -> None:
    table, core, elsewhere = Table(), Core("pull", "jobs"), Core("pull", "elsewhere")
    table.have(core, elsewhere)
    table.offered(PEER, [pull(1), pull(2), pull(3, "elsewhere")], ())
    table.offered(PEER, (), [1, 99])
    assert core.detached == [(PEER, 1, "withdrawn")]
    assert core.attached.keys() == {(PEER, 2)}
    assert elsewhere.attached.keys() == {(PEER, 3)}
    assert table.dropped == {}


def test_with_a_peer_goes_all_that_it_offered_and_nothing_of_others() -> None:
    table, core = Table(), Core("pull", "jobs")
    table.have(core)
    for peer in (PEER, OTHER):
        table.offered(peer, [pull(1), pull(2)], ())
    table.gone(PEER, "died")
    assert core.detached == [(PEER, 1, "died"), (PEER, 2, "died")]
    assert core.attached.keys() == {(OTHER, 1), (OTHER, 2)}
    newcomer = Core("pull", "jobs")
    table.have(newcomer)
    assert newcomer.attached.keys() == {(OTHER, 1), (OTHER, 2)}


def test_what_a_peer_that_moved_offers_is_reached_at_its_new_address() -> None:
    table, core = Table(), Core("pull", "jobs")
    table.have(core)
    table.offered(PEER, [pull(1)], ())
    table.address = "there"
    table.moved(PEER)
    assert core.attached == {(PEER, 1): f"there/{PEER}/1"}


def test_a_core_that_is_removed_is_told_nothing_more() -> None:
    table, core = Table(), Core("pull", "jobs")
    table.have(core)
    table.drop(core)
    table.offered(PEER, [pull(1)], ())
    assert (table.cores, core.attached) == ((), {})


@pytest.mark.parametrize(
    ("error", "counted"),
    [
        (Closed("closed"), {}),  # which is no fault
        (OSError(24, "too many open files"), {"link failed": 3, "detach failed": 3}),
    ],
)
def test_what_one_core_raises_keeps_nothing_from_the_others(
    error: Exception, counted: dict[str, int]
) -> None:
    table, bad, good = Table(), Core("pull", "jobs", error=error), Core("pull", "jobs")
    table.have(bad, good)
    table.offered(PEER, [pull(1), pull(2)], ())
    assert good.attached.keys() == {(PEER, 1), (PEER, 2)}
    table.offered(PEER, [pull(3)], [1])
    assert good.attached.keys() == {(PEER, 2), (PEER, 3)}
    table.gone(PEER, "bye")
    assert good.attached == {}
    assert table.dropped == counted


def test_a_link_that_could_not_be_made_is_tried_again_until_it_can_be() -> None:
    table, core = Table(), Core("pull", "jobs", error=OSError(24, "too many open files"))
    table.have(core)
    table.offered(PEER, [pull(1), pull(2), pull(3)], ())
    table.offered(PEER, (), [2])
    table.retry()
    assert (core.attached, table.dropped) == ({}, {"link failed": 3, "detach failed": 1})
    core.error = None
    table.retry()
    assert core.attached.keys() == {(PEER, 1), (PEER, 3)}, "not what was withdrawn meanwhile"
    core.attached.clear()
    table.retry()
    assert core.attached == {}, "it is made once"


def test_what_failed_with_a_peer_or_core_that_is_gone_is_not_tried_again() -> None:
    table = Table()
    cores = [Core("pull", "jobs", error=OSError()) for _ in range(2)]
    table.have(*cores)
    table.offered(PEER, [pull(1)], ())
    table.offered(OTHER, [pull(1)], ())
    table.drop(cores[0])
    table.gone(PEER, "died")
    for core in cores:
        core.error = None
    table.retry()
    assert [list(core.attached) for core in cores] == [[], [(OTHER, 1)]]


def test_one_peer_costs_a_bounded_number_of_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINKS_PER_PEER_MAX", 3)
    table, core, second = Table(), Core("pull", "jobs"), Core("pull", "jobs")
    table.have(core, second)
    table.offered(PEER, [pull(key) for key in range(4)], ())
    assert len(core.attached) + len(second.attached) == 3
    assert table.dropped["links full"] == 5
    table.offered(OTHER, [pull(1)], ())
    table.offered(OWN, [pull(key) for key in range(10)], ())
    assert {(OTHER, 1), *((OWN, key) for key in range(10))} <= core.attached.keys()
    table.retry()
    assert table.dropped["links full"] == 5, "each is counted once"


def test_what_a_peer_has_no_longer_makes_room_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINKS_PER_PEER_MAX", 2)
    table, core, other = Table(), Core("pull", "jobs"), Core("pull", "other")
    table.have(core, other)
    table.offered(PEER, [pull(1), pull(2, "other"), pull(3)], ())
    table.offered(PEER, (), [1])
    table.retry()
    assert core.attached.keys() == {(PEER, 3)}
    table.offered(PEER, [pull(4)], ())
    table.drop(other)
    table.retry()
    assert core.attached.keys() == {(PEER, 3), (PEER, 4)}
    table.gone(PEER, "died")
    table.offered(PEER, [pull(1), pull(2)], ())
    assert core.attached.keys() == {(PEER, 1), (PEER, 2)}


@pytest.mark.parametrize("kind", ["publish", "host", "record"])
def test_topics_and_streams_cost_no_socket_each(
    kind: OfferKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LINKS_PER_PEER_MAX", 2)
    table, core, puller = Table(), Core(kind, "**"), Core("pull", "jobs")
    table.have(core, puller)
    table.offered(PEER, [pull(1), pull(2), pull(3)], ())
    table.offered(PEER, [Offer(key, kind, f"t/{key}") for key in range(10, 20)], ())
    assert len(core.attached) == 10
    assert len(puller.attached) == 2


def test_links_that_wait_to_be_made_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINKS_MISSING_MAX", 2)
    table, core = Table(), Core("pull", "jobs", error=OSError())
    table.have(core)
    table.offered(PEER, [pull(key) for key in range(5)], ())
    core.error = None
    table.retry()
    assert len(core.attached) == 2
    assert table.dropped["link failed"] == 5
