"""Waiting for peers: nobody is forgotten, nobody waits longer than told."""

from __future__ import annotations

import threading

import pytest

from mesh import presence
from mesh.message import PeerEvent, PeerInfo
from mesh.presence import Presence

JOINED = PeerEvent("joined", PeerInfo("1" * 16, "peer", "ipc", "ipc:///p", 0, True), "")


def test_whoever_waits_looks_again_after_every_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "NAP_S", 60.0)
    there = Presence()
    looks = threading.Semaphore(0)

    def condition() -> bool:
        looks.release()
        return bool(there.peers)

    outcome: list[bool] = []
    waiting = threading.Thread(target=lambda: outcome.append(there.wait_until(condition, 30)))
    waiting.start()
    assert looks.acquire(timeout=5)
    there.tell(None)
    assert looks.acquire(timeout=5), "told of something else, it looks too"
    there.changed(JOINED)
    waiting.join(5)
    assert outcome == [True]
    assert there.observers == []


def test_a_wait_ends_by_its_deadline() -> None:
    there = Presence()
    assert there.wait_until(lambda: False, 0.01) is False
    assert there.wait_until(lambda: True, 0) is True
    assert there.observers == []


def test_a_sleep_is_never_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python notices a signal that comes just before a sleep only after it."""
    monkeypatch.setattr(presence, "NAP_S", 0.01)
    looks = iter([False, False, False, True])
    assert Presence().wait_until(lambda: next(looks), None)


def test_one_observer_that_raises_keeps_nothing_from_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    there, told = Presence(), list[PeerEvent | None]()
    there.observers += [lambda event: 1 / 0, told.append]
    there.changed(JOINED)
    assert told == [JOINED]
    assert "an observer raised" in caplog.text


def test_an_observer_may_leave_while_it_is_told() -> None:
    there, told = Presence(), list[PeerEvent | None]()

    def leaves(event: PeerEvent | None) -> None:
        there.observers.remove(leaves)

    there.observers += [leaves, told.append]
    there.tell(None)
    assert (told, there.observers) == ([None], [told.append])
