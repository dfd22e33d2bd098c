"""Who records what, as nodes say it, and for a while after they have gone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mesh.durable import recording_finder
from mesh.durable.recording import Recorder
from mesh.durable.recording_finder import RecordingFinder
from mesh.sockets.control import Offer

P, Q = "0" * 15 + "1", "0" * 15 + "2"


def offer(key: int, stream: str = "s", partition: str = P, pattern: str = "a/*") -> Offer:
    return Offer(key, "record", stream, partition=partition, pattern=pattern)


def test_a_topic_is_looked_for_where_its_node_records_it() -> None:
    known = RecordingFinder()
    known.attach(1, offer(1), "")
    known.attach(1, offer(2, "t", Q, "**"), "")
    known.attach(2, offer(1, "u"), "")
    assert known.of(1, "a/b") == {("s", P), ("t", Q)}
    assert known.of(1, "b") == {("t", Q)}
    assert known.of(3, "a/b") == set()
    known.close(0)


def test_what_has_gone_is_remembered_for_a_while_and_no_more_of_it_than_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock: Any = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(recording_finder, "time", clock)
    monkeypatch.setattr("mesh.limits.RECORDINGS_MET_MAX", 2)
    known = RecordingFinder()
    for node in (1, 2, 3):
        known.attach(node, offer(7), "")
        known.detach(node, 7, "died")
        known.detach(node, 7, "died")
    assert [known.of(node, "a/b") for node in (1, 2, 3)] == [set(), {("s", P)}, {("s", P)}]
    clock.now += 599.0
    known.tick()
    assert known.of(3, "a/b")
    clock.now += 2.0
    known.tick()
    assert not known.of(3, "a/b")
    known.close(0)


def test_what_is_no_recording_is_dropped_and_counted() -> None:
    known = RecordingFinder()
    known.attach(1, offer(1, pattern=""), "")
    known.attach(1, offer(2, pattern="a//b"), "")
    known.attach(1, offer(3, partition="../x"), "")
    assert known.of(1, "a/b") == set()
    assert known.counters.dropped["offer"] == 3
    known.close(0)


def test_a_recording_says_where_it_has_been_and_of_too_many_the_latest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mesh.limits.RECORDING_PARTITIONS_MAX", 2)
    offered: list[str] = []
    withdrawn: list[int] = []

    def tell(partition: str) -> int:
        offered.append(partition)
        return len(offered)

    nothing: Any = None
    core = Recorder(1, "a", "s", 1 << 20, nothing, tell, withdrawn.append, nothing, nothing)
    for partition in ("p", "q", "p", "r"):
        core._bound(partition)
    assert (offered, withdrawn) == (["p", "q", "r"], [1])
    core.link.close(first=core._conclude)
    assert withdrawn == [1, 2, 3]
