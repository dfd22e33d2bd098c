"""A replay that follows: whoever reads it is told that its node has closed, and gets all that comes
from the moment it began, wherever that is."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from pathlib import Path

import pytest

from mesh import Node
from mesh.durable.replay import Replay
from mesh.errors import Closed
from tests.support.processes import Program, Programs
from tests.support.sidecars import SIDECAR
from tests.support.waiting import until

pytestmark = pytest.mark.slow


class Reading:
    """Somebody who reads a replay, in a thread or a task, until it ends."""

    def __init__(self, replay: Replay, *, in_asyncio: bool = False) -> None:
        self.payloads: list[object] = []
        self.error: BaseException | None = None
        self._replay = replay
        run = (lambda: asyncio.run(self._aread())) if in_asyncio else self._read
        self.thread = threading.Thread(target=run)
        self.thread.start()

    def _read(self) -> None:
        try:
            for record in self._replay:
                self.payloads.append(record.payload)
        except BaseException as error:  # noqa: BLE001
            self.error = error

    async def _aread(self) -> None:
        try:
            async for record in self._replay:
                self.payloads.append(record.payload)
        except BaseException as error:  # noqa: BLE001
            self.error = error


@pytest.mark.parametrize("in_asyncio", [False, True])
def test_who_follows_is_told_that_the_node_has_closed(node: Node, in_asyncio: bool) -> None:
    orders = node.stream("orders")
    orders.append(0)
    reading = Reading(orders.replay(follow=True), in_asyncio=in_asyncio)
    until(lambda: reading.payloads == [0])
    node.close()
    reading.thread.join(10)
    assert not reading.thread.is_alive()
    assert isinstance(reading.error, Closed)


@pytest.mark.parametrize("in_asyncio", [False, True])
def test_who_reads_the_past_is_told_so_too(sidecar: Program, in_asyncio: bool) -> None:
    with Node("reader") as node:
        orders = node.stream("orders")
        for n in range(12):  # more than is asked for ahead
            orders.append(str(n) * 700_000)
        replay = orders.replay(timeout=None)
        records = iter(replay)
        next(records)
        sidecar.kill(signal.SIGSTOP)
        reading = Reading(orders.replay(timeout=None), in_asyncio=in_asyncio)
        until(lambda: node.closed or reading._replay._entering is not None)
        node.close(timeout=0)
        reading.thread.join(10)
        assert not reading.thread.is_alive()
        assert isinstance(reading.error, Closed), reading.error
        replay.close()
    sidecar.kill(signal.SIGCONT)


def test_of_a_partition_that_comes_later_nothing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is met after its first records."""
    monkeypatch.setattr("mesh.durable.replay._LOOK_S", 1.0)
    with Node("a", durable=tmp_path / "a") as a:
        orders = a.stream("orders")
        orders.append("before")
        reading = Reading(replay := orders.replay("latest", follow=True))
        until(lambda: replay.partitions)
        orders.append("first")
        until(lambda: reading.payloads == ["first"])
        with Node("b", durable=tmp_path / "b") as b:
            for n in range(3):
                b.stream("orders", home="b").append(n)
            until(lambda: len(reading.payloads) >= 4)
            assert reading.payloads == ["first", 0, 1, 2]
            replay.close()
    reading.thread.join(10)


def test_of_a_partition_that_comes_later_what_is_older_is_left_out(tmp_path: Path) -> None:
    with Node("b", durable=tmp_path / "b") as b:
        b.stream("orders").append_many(["old", "older"])
    with Node("a", durable=tmp_path / "a") as a:
        orders = a.stream("orders")
        orders.append("before")
        reading = Reading(replay := orders.replay("latest", follow=True))
        until(lambda: replay.partitions)
        with Node("b", durable=tmp_path / "b") as b:
            until(lambda: len(replay.partitions) == 2)
            b.stream("orders", home="b").append("new")
            until(lambda: reading.payloads)
            assert reading.payloads == ["new"]
            replay.close()
    reading.thread.join(10)


@pytest.mark.parametrize("in_asyncio", [False, True])
def test_a_partition_that_has_come_and_does_not_answer_holds_up_none_of_the_others(
    tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch, in_asyncio: bool
) -> None:
    monkeypatch.setattr("mesh.durable.replay._LOOK_S", 0.5)
    log = str(tmp_path / "log")
    with Node("b", durable=log) as b:
        b.stream("orders").append("of b")
    with Node("a", durable=tmp_path / "a") as a:
        orders = a.stream("orders")
        orders.append(0)
        reading = Reading(orders.replay(follow=True, timeout=None), in_asyncio=in_asyncio)
        until(lambda: reading.payloads == [0])
        program = programs.start(SIDECAR, log)
        until(lambda: len(orders._streams.having("orders")) == 2)
        program.kill(signal.SIGSTOP)
        stopped_at, n = time.monotonic(), 0
        while time.monotonic() < stopped_at + 1:
            n += 1
            orders.append(n)
            until(lambda: n in reading.payloads)  # noqa: B023
        program.kill(signal.SIGCONT)
        until(lambda: "of b" in reading.payloads)
        reading._replay.close()
        reading.thread.join(10)
