"""What every discovery source promises, whatever it finds others by."""

from __future__ import annotations

import secrets
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from mesh.discovery.local import LocalSource, runtime_directory
from mesh.discovery.mdns import MdnsSource
from mesh.discovery.seeds import SeedsSource
from mesh.discovery.source import Announcement, Sighting, Source

WAIT_S = 5.0


class World(Protocol):
    """Where sources look, and where somebody else can be put."""

    def source(self) -> Source:
        """A new source that looks here."""

    def appears(self, announcement: Announcement) -> None:
        """Somebody is here from now on."""

    def changes(self, announcement: Announcement) -> None:
        """Whoever has this id has other endpoints now."""

    def goes(self, announcement: Announcement) -> None:
        """Whoever has this id leaves."""

    def told(self, announcement: Announcement) -> Announcement:
        """What of an announcement a source here can tell."""

    def close(self) -> None:
        """Everybody leaves."""


class Announced:
    """A world in which nodes announce themselves, by sources of their own."""

    def __init__(self, make: Callable[[], Source], tells: Callable[[str], bool]) -> None:
        self.source = make
        self._tells = tells
        self._others: dict[str, Source] = {}

    def appears(self, announcement: Announcement) -> None:
        self._others[announcement.id] = self.source()
        self._others[announcement.id].start(announcement)

    def changes(self, announcement: Announcement) -> None:
        self._others[announcement.id].update(announcement)

    def goes(self, announcement: Announcement) -> None:
        self._others.pop(announcement.id).close()

    def told(self, announcement: Announcement) -> Announcement:
        endpoints = tuple(filter(self._tells, announcement.endpoints))
        return Announcement(
            id=announcement.id,
            name=announcement.name,
            realm=announcement.realm,
            endpoints=endpoints,
            tag=announcement.tag,
        )

    def close(self) -> None:
        for other in self._others.values():
            other.close()


class Named:
    """A world in which a name server tells where everybody is."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}
        self._ids: list[str] = []

    def source(self) -> Source:
        seeds = [f"node-{number}.test:5555" for number in range(3)]
        return SeedsSource(seeds, resolve=self._resolve, resolve_interval_s=0.01)

    def appears(self, announcement: Announcement) -> None:
        self._ids.append(announcement.id)
        self.changes(announcement)

    def changes(self, announcement: Announcement) -> None:
        tcp = self.told(announcement).endpoints[0]
        address = tcp.removeprefix("tcp://").removesuffix(":5555")
        self._names[f"node-{self._ids.index(announcement.id)}.test"] = [address]

    def goes(self, announcement: Announcement) -> None:
        self._names[f"node-{self._ids.index(announcement.id)}.test"] = []

    def told(self, announcement: Announcement) -> Announcement:
        endpoints = tuple(e for e in announcement.endpoints if e.startswith("tcp://"))
        return Announcement(id="", name="", realm="", endpoints=endpoints)

    def close(self) -> None:
        self._names.clear()

    def _resolve(self, host: str) -> list[str]:
        return self._names.get(host, [])


def local_world() -> World:
    directory = runtime_directory()
    return Announced(lambda: LocalSource(Path(directory)), lambda endpoint: True)


def mdns_world() -> World:
    # What a process pays once would be put down to whichever test is the first.
    import zeroconf.asyncio  # noqa: F401

    return Announced(
        lambda: MdnsSource(("127.0.0.1",)), lambda endpoint: endpoint.startswith("tcp://")
    )


WORLDS: dict[str, Callable[[], World]] = {
    "local": local_world,
    "mdns": mdns_world,
    "seeds": Named,
}


@pytest.fixture(params=["local", pytest.param("mdns", marks=pytest.mark.slow), "seeds"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = WORLDS[request.param]()
    yield world
    world.close()


@pytest.fixture
def started(world: World) -> Iterator[Callable[[Announcement], Source]]:
    sources = []

    def start(own: Announcement) -> Source:
        source = world.source()
        sources.append(source)
        source.start(own)
        return source

    yield start
    for source in sources:
        source.close()


def node(name: str, last_byte: int, node_id: str = "") -> Announcement:
    node_id = node_id or secrets.token_hex(8)
    return Announcement(
        id=node_id,
        name=name,
        realm="garden",
        endpoints=(f"ipc:///run/mesh/{node_id}.control", f"tcp://10.77.0.{last_byte}:5555"),
        tag="0123456789abcdef" * 4,
    )


def moved(announcement: Announcement, last_byte: int) -> Announcement:
    return node(announcement.name, last_byte, announcement.id)


def hear(source: Source, wanted: Callable[[Sighting], bool]) -> list[Sighting]:
    """All that `source` tells until `wanted` is among it, asked as the interface says."""
    deadline = time.monotonic() + WAIT_S
    heard: list[Sighting] = []
    while not any(wanted(sighting) for sighting in heard):
        left = deadline - time.monotonic()
        assert left > 0, f"not among {heard}"
        watched = [source] if source.fileno() >= 0 else []
        select.select(watched, [], [], left if watched else min(left, source.interval_s, 0.01))
        heard += source.sightings()
    return heard


def is_there(announcement: Announcement) -> Callable[[Sighting], bool]:
    return lambda sighting: sighting.present and sighting.announcement == announcement


def is_gone(announcement: Announcement) -> Callable[[Sighting], bool]:
    return lambda sighting: not sighting.present and sighting.announcement == announcement


def test_who_was_there_before_is_found(
    world: World, started: Callable[[Announcement], Source]
) -> None:
    other = node("other", 2)
    world.appears(other)
    source = started(node("own", 1))
    heard = hear(source, is_there(world.told(other)))
    assert {sighting.source for sighting in heard} == {source.name}


def test_who_comes_later_is_found(world: World, started: Callable[[Announcement], Source]) -> None:
    source = started(node("own", 1))
    first, second = node("first", 2), node("second", 3)
    world.appears(first)
    hear(source, is_there(world.told(first)))
    world.appears(second)
    hear(source, is_there(world.told(second)))


def test_who_leaves_is_withdrawn(world: World, started: Callable[[Announcement], Source]) -> None:
    source = started(node("own", 1))
    stays, leaves = node("stays", 2), node("leaves", 3)
    world.appears(stays)
    world.appears(leaves)
    heard = hear(source, is_there(world.told(leaves)))
    world.goes(leaves)
    heard += hear(source, is_gone(world.told(leaves)))
    assert not any(is_gone(world.told(stays))(sighting) for sighting in heard)


def test_who_moves_is_found_at_the_new_address_only(
    world: World, started: Callable[[Announcement], Source]
) -> None:
    source = started(node("own", 1))
    before = node("other", 2)
    after = moved(before, 3)
    world.appears(before)
    hear(source, is_there(world.told(before)))
    world.changes(after)
    hear(source, is_there(world.told(after)))
    world.goes(after)
    hear(source, is_gone(world.told(after)))


def test_the_own_announcement_is_left_out(
    world: World, started: Callable[[Announcement], Source]
) -> None:
    own, other = node("own", 1), node("other", 2)
    if isinstance(world, Named):
        world.appears(own)
    source = started(own)
    world.appears(other)
    heard = hear(source, is_there(world.told(other)))
    # So that the own one is there to be left out, and has had its time to arrive.
    third = started(node("third", 3))
    hear(third, is_there(world.told(own)))
    later = node("later", 4)
    world.appears(later)
    heard += hear(source, is_there(world.told(later)))
    assert world.told(own) not in [sighting.announcement for sighting in heard]


def test_the_own_announcement_stays_left_out_when_it_changes(
    world: World, started: Callable[[Announcement], Source]
) -> None:
    own, other = node("own", 1), node("other", 2)
    if isinstance(world, Named):
        world.appears(own)
    source = started(own)
    source.update(moved(own, 9))
    if isinstance(world, Named):
        world.changes(moved(own, 9))
    world.appears(other)
    heard = hear(source, is_there(world.told(other)))
    assert not any(is_there(world.told(moved(own, 9)))(sighting) for sighting in heard)


def test_closing_takes_less_than_a_second_and_may_be_repeated(
    world: World, started: Callable[[Announcement], Source]
) -> None:
    source = started(node("own", 1))
    other = node("other", 2)
    world.appears(other)
    hear(source, is_there(world.told(other)))
    before = time.monotonic()
    source.close()
    source.close()
    assert time.monotonic() - before < 1.0


def test_closing_at_once_takes_less_than_a_second(
    world: World, started: Callable[[Announcement], Source]
) -> None:
    source = started(node("own", 1))
    before = time.monotonic()
    source.close()
    assert time.monotonic() - before < 1.0


def test_a_source_that_was_never_started_is_closed(world: World) -> None:
    source = world.source()
    assert source.sightings() == []
    assert source.fileno() == -1
    source.close()


def test_nothing_is_told_after_closing(
    world: World, started: Callable[[Announcement], Source]
) -> None:
    source, witness = started(node("own", 1)), started(node("witness", 2))
    before, after = node("before", 3), node("after", 4)
    world.appears(before)
    hear(witness, is_there(world.told(before)))
    source.close()
    world.appears(after)
    hear(witness, is_there(world.told(after)))
    assert source.sightings() == []
    assert source.fileno() == -1


def test_the_descriptor_tells_when_to_look(
    world: World, started: Callable[[Announcement], Source]
) -> None:
    source = started(node("own", 1))
    assert 0 < source.interval_s < float("inf")
    if source.fileno() < 0:
        return
    other = node("other", 2)
    world.appears(other)
    hear(source, is_there(world.told(other)))
    deadline = time.monotonic() + WAIT_S
    while select.select([source], [], [], 0)[0]:  # whoever else is on this machine's network
        assert source.sightings(), "the descriptor is readable for nothing"
        assert time.monotonic() < deadline
    world.goes(other)
    assert select.select([source], [], [], WAIT_S)[0], "the descriptor missed something"
    assert source.sightings()
