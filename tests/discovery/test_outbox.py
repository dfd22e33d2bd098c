"""The way from a source's thread to the control thread."""

from __future__ import annotations

import select
from collections.abc import Iterator

import pytest

from mesh import limits
from mesh.discovery.outbox import Outbox
from mesh.discovery.source import Announcement, Sighting


@pytest.fixture
def outbox() -> Iterator[Outbox]:
    outbox = Outbox()
    yield outbox
    outbox.close()


def sighting(name: str, *, present: bool = True) -> Sighting:
    return Sighting("mdns", Announcement(id="", name=name, realm="", endpoints=()), present)


def readable(outbox: Outbox) -> bool:
    return bool(select.select([outbox], [], [], 0)[0])


def test_the_descriptor_is_readable_while_something_waits(outbox: Outbox) -> None:
    assert not readable(outbox)
    outbox.put("a", sighting("a"))
    outbox.put("b", sighting("b"))
    assert readable(outbox)
    assert outbox.take() == [sighting("a"), sighting("b")]
    assert not readable(outbox)
    assert outbox.take() == []
    outbox.put("a", sighting("a"))
    assert readable(outbox)


def test_of_each_key_the_newest_is_kept(outbox: Outbox) -> None:
    outbox.put("a", sighting("old"))
    outbox.put("b", sighting("b"))
    outbox.put("a", sighting("new", present=False))
    assert outbox.take() == [sighting("b"), sighting("new", present=False)]


def test_what_is_over_the_limit_is_refused(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SIGHTINGS_MAX", 2)
    assert outbox.put("a", sighting("a"))
    assert outbox.put("b", sighting("b"))
    assert not outbox.put("c", sighting("c"))
    assert outbox.put("b", sighting("newer"))
    assert outbox.take() == [sighting("a"), sighting("newer")]
    assert outbox.put("c", sighting("c"))


def test_a_withdrawal_finds_room_where_a_newcomer_does_not(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SIGHTINGS_MAX", 2)
    for key in "ab":
        assert outbox.put(key, sighting(key))
    for key in "cd":
        assert outbox.put(key, sighting(key, present=False))
    assert not outbox.put("e", sighting("e", present=False))
    assert len(outbox.take()) == 4


def test_a_thread_that_comes_too_late_is_refused_and_harms_no_other_descriptor(
    outbox: Outbox,
) -> None:
    outbox.put("a", sighting("a"))
    outbox.close()
    reused = Outbox()
    try:
        assert not outbox.put("b", sighting("b"))
        assert outbox.take() == []
        outbox.close()
        assert outbox.fileno() == -1
        assert not readable(reused)
    finally:
        reused.close()
