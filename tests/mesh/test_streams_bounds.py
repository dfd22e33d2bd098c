"""Streams beyond what there is room for: many names, records that a sidecar does not take, and more
under way than may be."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mesh import Node, limits
from mesh.assembly import Assembly
from mesh.durable.appender import Pending
from mesh.durable.appending import WINDOW_BYTES, wait_for_room
from mesh.durable.replay import Replay
from mesh.errors import Busy, LogFull, PayloadTooLarge, Timeout
from mesh.timeouts import deadline_of
from tests.support.processes import Program, Programs
from tests.support.sidecars import SIDECAR
from tests.support.waiting import until

pytestmark = pytest.mark.slow

SMALL = SIDECAR.replace("sys.argv[1])", "sys.argv[1], message_bytes_max=100_000)")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_any_number_of_streams_is_found_and_costs_no_descriptor_each(
    sidecar: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LINKS_PER_PEER_MAX", 5)
    with Node("writer") as writer:
        for n in range(20):
            writer.stream(f"job/{n}").append(n)
    with Node("reader") as node:
        assert [record.payload for record in node.stream("job/0").replay()] == [0]
        node.stream("job/0").bounds()
        before = descriptors()
        for n in range(20):
            assert [record.payload for record in node.stream(f"job/{n}").replay()] == [n]
            assert node.stream(f"job/{n}").consumer("billing").recv(10).payload == n
            with pytest.raises(Timeout):
                node.stream(f"nobody/{n}").bounds(timeout=0)
        until(lambda: gc.collect() >= 0 and descriptors() <= before + 2, "end of consumers")


@pytest.fixture
def small(tmp_path: Path, programs: Programs) -> Program:
    """A sidecar that takes less than others."""
    program = programs.start(SMALL, str(tmp_path / "log"))
    program.expect("ready")
    return program


def test_a_record_that_its_sidecar_does_not_take_is_refused_and_the_next_is_written(
    small: Program,
) -> None:
    with Node("writer") as node:
        orders = node.stream("orders")
        for append in (
            lambda: orders.append(bytes(200_000)),
            lambda: orders.append_nowait(bytes(200_000)).wait(10),
            lambda: orders.append_many([bytes(200_000)]),
            lambda: asyncio.run(orders.aappend(bytes(200_000))),
        ):
            with pytest.raises(PayloadTooLarge, match="100,000"):
                append()
            orders.append("behind it")
        assert [record.payload for record in orders.replay()] == ["behind it"] * 4


def test_who_reads_a_record_that_it_does_not_let_in_is_told_so(sidecar: Program) -> None:
    with Node("writer") as writer:
        writer.stream("orders").append("small")
        writer.stream("orders").append(bytes(1_000_000))
    with Node("reader", message_bytes_max=100_000) as node:
        orders = node.stream("orders")
        with orders.consumer("billing") as consumer:
            consumer.recv(10).ack()
            with pytest.raises(PayloadTooLarge, match=r"records 1 to 1, .* limit of 100,000"):
                consumer.recv(10)
        records = iter(orders.replay())
        assert next(records).payload == "small"
        with pytest.raises(PayloadTooLarge, match=r"records 1 to 1, .* limit of 100,000"):
            next(records)
        orders.append("behind it")


def test_what_is_gathered_is_no_more_than_the_sidecar_takes(small: Program) -> None:
    payloads = [b"%7d" % n * 1000 for n in range(100)]
    with Node("writer") as node:
        orders = node.stream("orders")
        orders.append_many(payloads)
        for payload in payloads:
            orders.append_nowait(payload)
        orders.flush()
        assert [record.payload for record in orders.replay()] == payloads * 2


@pytest.mark.parametrize("how", ["append", "aappend"])
def test_who_does_not_wait_for_receipts_holds_no_more_than_may_be_under_way(
    sidecar: Program, how: str
) -> None:
    payload = bytes(1 << 20)

    with Node("writer") as node:
        orders = node.stream("orders", producer="p")
        orders.append("first")
        (appender,) = orders._producing.appenders
        sidecar.kill(signal.SIGSTOP)
        refused: list[str] = []
        for _ in range(20):
            try:
                if how == "append":
                    orders.append(payload, timeout=0.01)
                else:
                    asyncio.run(orders.aappend(payload, timeout=0.01))
            except Timeout:
                continue
            except Busy as busy:
                refused.append(str(busy))
        assert len(refused) == 4
        assert all("16 MiB are under way to partition" in text for text in refused)
        assert appender.bytes_waiting < WINDOW_BYTES + len(payload)
        sidecar.kill(signal.SIGCONT)
        orders.flush()
        assert len(list(orders.replay())) == 17


@pytest.mark.parametrize("how", ["append_many", "aappend_many"])
def test_many_for_which_there_is_no_room_in_time_are_begun_as_far_as_it_says(
    sidecar: Program, how: str
) -> None:
    payloads = [bytes(100_000)] * 300

    with Node("writer") as node:
        orders = node.stream("orders")
        orders.append("first")
        sidecar.kill(signal.SIGSTOP)
        append: Callable[[], object] = {
            "append_many": lambda: orders.append_many(payloads, timeout=0.2),
            "aappend_many": lambda: asyncio.run(orders.aappend_many(payloads, timeout=0.2)),
        }[how]
        with pytest.raises(Busy) as busy:
            append()
        said = re.search("only the first ([0-9]+) records of this are begun$", str(busy.value))
        assert said is not None, str(busy.value)
        with pytest.raises(Busy, match=r"nothing of this is$"):
            orders.append_many(payloads, timeout=0.01)
        sidecar.kill(signal.SIGCONT)
        orders.flush()
        assert len(list(orders.replay())) == 1 + int(said[1])


def test_what_has_failed_of_many_comes_before_that_there_is_no_room(sidecar: Program) -> None:
    with Node("writer") as node:
        orders = node.stream("orders")
        orders.append("first")
        appender = orders._writing().bind(10)
        failed = Pending(None, [])
        failed.error = LogFull("there is no room")
        sidecar.kill(signal.SIGSTOP)
        with pytest.raises(Busy):
            orders.append_many([bytes(100_000)] * 300, timeout=0)
        with pytest.raises(LogFull, match="there is no room"):
            wait_for_room(appender, deadline_of(0), [failed])
        sidecar.kill(signal.SIGCONT)


@pytest.mark.parametrize("how", ["bounds", "abounds", "replay", "following"])
def test_questions_that_are_not_answered_in_time_are_forgotten(sidecar: Program, how: str) -> None:
    async def abounds() -> None:
        await orders.abounds(timeout=0.001)

    with Node("watcher") as node:
        orders = node.stream("orders")
        orders.append(0)
        (appender,) = orders._producing.appenders
        table = appender.route.core.table  # type: ignore[attr-defined]
        sidecar.kill(signal.SIGSTOP)
        ask: Callable[[], object] = {
            "bounds": lambda: orders.bounds(timeout=0.001),
            "abounds": lambda: asyncio.run(abounds()),
            "replay": lambda: list(orders.replay(timeout=0.001)),
            "following": lambda: list(orders.replay(follow=True, timeout=0.001)),
        }[how]
        for _ in range(20):
            with pytest.raises(Timeout):
                ask()
        assert len(table) == 0
        sidecar.kill(signal.SIGCONT)
        assert len(list(orders.replay())) == 1


def test_a_replay_keeps_its_node_alive(tmp_path: Path) -> None:
    def replay_of(name: str) -> tuple[Replay, Assembly]:
        node = Node(name, durable=tmp_path)
        node.stream("orders").append("kept")
        return node.stream("orders").replay(), node._parts

    replay, parts = replay_of("reader")
    gc.collect()
    assert [record.payload for record in replay] == ["kept"]
    del replay
    until(lambda: gc.collect() >= 0 and parts._gone, "end of the node")


def test_whoever_cannot_take_what_comes_next_leaves_an_exclusive_group_to_others(
    sidecar: Program,
) -> None:
    with Node("small", message_bytes_max=1 << 20) as small, Node("big") as big:
        big.stream("orders").append(bytes(3 << 20))
        one = small.stream("orders").consumer("billing", order="exclusive")
        with pytest.raises(PayloadTooLarge):
            one.recv(10)
        other = big.stream("orders").consumer("billing", order="exclusive")
        assert len(other.recv(10).payload) == 3 << 20
