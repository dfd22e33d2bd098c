"""A node that closes finishes what its streams have begun: appends that nobody waited for, and
acknowledgements that were not told yet. What does not come that far in time is said."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mesh import GroupStats, Node
from mesh.durable.consumer import Consuming
from mesh.durable.seat import Seat, Taken
from mesh.errors import Timeout
from tests.support.processes import Program, Programs
from tests.support.sidecars import SIDECAR
from tests.support.waiting import until

pytestmark = pytest.mark.slow

COUNT = 1000
MakeNode = Callable[[], Node]


@pytest.fixture(params=["embedded", "sidecar"])
def make_node(
    request: pytest.FixtureRequest, tmp_path: Path, programs: Programs
) -> Iterator[MakeNode]:
    """Makes nodes, one after the other, whose streams are in their own process, or in another."""
    log = str(tmp_path / "log")
    if request.param == "sidecar":
        programs.start(SIDECAR, log).expect("ready")
        yield lambda: Node("shop")
    else:
        yield lambda: Node("shop", durable=log)


def payloads(make_node: MakeNode) -> list[object]:
    with make_node() as node:
        return [record.payload for record in node.stream("orders").replay()]


def group_of(node: Node) -> GroupStats:
    (stats,) = node.stream("orders").stats().values()
    return stats.groups["billing"]


def test_what_nobody_waited_for_is_in_the_log_once_the_node_is_closed(
    make_node: MakeNode,
) -> None:
    with make_node() as node:
        orders = node.stream("orders")
        for n in range(COUNT):
            orders.append_nowait(n)
    assert payloads(make_node) == list(range(COUNT))


def test_likewise_if_the_handle_is_forgotten(make_node: MakeNode) -> None:
    with make_node() as node:
        for n in range(10):
            node.stream("orders").append_nowait(n)
            gc.collect()
    assert sorted(map(str, payloads(make_node))) == sorted(map(str, range(10)))


def test_likewise_in_asyncio(make_node: MakeNode) -> None:
    async def work() -> None:
        async with make_node() as node:
            orders = node.stream("orders")
            for n in range(COUNT):
                orders.append_nowait(n)

    asyncio.run(work())
    assert payloads(make_node) == list(range(COUNT))


def test_likewise_if_the_node_is_forgotten(make_node: MakeNode) -> None:
    node = make_node()
    node.stream("orders").append_nowait(1)
    parts = node._parts
    del node
    gc.collect()
    until(lambda: parts._gone, "its end")
    assert payloads(make_node) == [1]


def test_what_was_acknowledged_is_not_delivered_again(make_node: MakeNode) -> None:
    with make_node() as node:
        orders = node.stream("orders")
        orders.append_many(range(10))
        consumer = orders.consumer("billing", max_deliver=2)
        for _ in range(3):
            consumer.recv(10).ack()
    with make_node() as node:
        records = node.stream("orders").consumer("billing")
        assert [records.recv(10).payload for _ in range(7)] == [3, 4, 5, 6, 7, 8, 9]


def test_what_a_handler_appends_while_its_node_closes_is_in_the_log(make_node: MakeNode) -> None:
    began, goes_on = threading.Event(), threading.Event()

    def handle(request: object) -> object:
        began.set()
        goes_on.wait(10)
        orders.append_nowait(request)
        return "taken"

    with Node("customer") as customer:
        with make_node() as node:
            orders = node.stream("orders")
            node.service("shop")(handle)
            asking = threading.Thread(target=customer.client("shop").request, args=(7,))
            asking.start()
            assert began.wait(10)
            threading.Timer(0.1, goes_on.set).start()
        asking.join(10)
    assert payloads(make_node) == [7]


def test_what_the_log_does_not_answer_in_time_is_told_and_closing_ends(
    sidecar: Program, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node("shop")
    orders = node.stream("orders")
    orders.append(0)
    sidecar.kill(signal.SIGSTOP)
    for n in range(5):
        orders.append_nowait(n)
    began = time.monotonic()
    node.close(timeout=0.3)
    assert 0.3 <= time.monotonic() - began < 2
    assert "5 records for stream 'orders' at partition" in caplog.text
    sidecar.kill(signal.SIGCONT)


def test_what_a_consumer_has_done_and_nobody_has_heard_is_told(
    sidecar: Program, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node("shop")
    node.stream("orders").append_many(range(2))
    ahead = node.stream("orders").consumer("shipping")
    consumer = node.stream("orders").consumer("billing")
    ahead.recv(10)
    consumer.recv(10)
    record = consumer.recv(10)
    sidecar.kill(signal.SIGSTOP)
    record.ack()
    node.close(timeout=0.3)
    (said,) = [each.message for each in caplog.records if each.name.startswith("mesh.durable")]
    assert said == (
        f"consumer 'billing' of stream 'orders' had done with records of partition "
        f"{record.partition} when it was closed, and was not heard there in time: they may come "
        "again"
    )
    sidecar.kill(signal.SIGCONT)


def test_likewise_where_the_consumer_is_closed_by_itself(
    sidecar: Program, caplog: pytest.LogCaptureFixture
) -> None:
    with Node("shop") as node:
        node.stream("orders").append_many(range(2))
        ahead = node.stream("orders").consumer("shipping")
        consumer = node.stream("orders").consumer("billing")
        records = ahead.recv(10), consumer.recv(10)
        sidecar.kill(signal.SIGSTOP)
        records[1].ack()
        consumer.close()
        ahead.close()
        sidecar.kill(signal.SIGCONT)
    said = [each.message for each in caplog.records if each.name.startswith("mesh.durable")]
    assert [text.partition(" had done with records of")[0] for text in said] == [
        "consumer 'billing' of stream 'orders'"
    ]


@pytest.mark.parametrize("ends", ["forgotten", "closed"])
def test_what_a_consumer_has_done_that_is_collected_is_known_all_the_same(
    sidecar: Program, ends: str
) -> None:
    with Node("shop") as node:
        node.stream("orders").append_many(range(100))
        consumer = node.stream("orders").consumer("billing", prefetch=200)
        records = [consumer.recv(10) for _ in range(100)]
        sidecar.kill(signal.SIGSTOP)
        for record in records:
            record.ack()
        if ends == "closed":
            consumer.close()
        del consumer, records, record
        node._parts.loop.call(lambda: None, 5)
        gc.collect()
        threading.Timer(1.0, lambda: sidecar.kill(signal.SIGCONT)).start()
        node.close(timeout=10)
    with Node("shop") as node:
        assert group_of(node).committed == 100


def test_who_has_consumed_is_looked_after_until_what_it_did_is_known(node: Node) -> None:
    orders = node.stream("orders")
    orders.append(0)
    with orders.consumer("billing") as consumer:
        consumer.recv(10).ack()
    under_way = node._parts.logs.streams().under_way
    until(lambda: not under_way._consumers)
    assert group_of(node).committed == 1


def test_what_nobody_hears_of_a_consumer_is_given_up_in_the_end_and_told(
    sidecar: Program, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.durable.under_way._CLOSED_TICKS", 6)
    with Node("shop") as node:
        node.stream("orders").append(0)
        consumer = node.stream("orders").consumer("billing")
        record = consumer.recv(10)
        sidecar.kill(signal.SIGSTOP)
        record.ack()
        del consumer, record
        gc.collect()
        under_way = node._parts.logs.streams().under_way
        until(lambda: not under_way._consumers)
        assert "was not heard there in time" in caplog.text
        sidecar.kill(signal.SIGCONT)


@pytest.mark.parametrize("closing", ["consumer", "node"])
def test_what_is_done_with_many_records_is_told_however_small_messages_are(
    tmp_path: Path, programs: Programs, closing: str
) -> None:
    log = str(tmp_path / "log")
    programs.start(SIDECAR, log).expect("ready")
    with Node("shop", message_bytes_max=2048) as node:
        orders = node.stream("orders")
        for first in range(0, 2000, 100):
            orders.append_many(range(first, first + 100))
        consumer = orders.consumer("billing", prefetch=2000, max_deliver=1)
        records = [consumer.recv(10) for _ in range(1000)]
        for record in records[::2]:
            record.ack()
        if closing == "consumer":
            consumer.close()
            assert group_of(node).members == 0
    with Node("shop") as node:
        dead = node.stream("orders.dead").consumer("looking", prefetch=1000)
        assert sorted(dead.recv(10).payload for _ in range(500)) == list(range(1, 1000, 2))
        again = node.stream("orders").consumer("billing", prefetch=2000)
        left = [again.recv(10) for _ in range(1000)]
        assert {each.payload for each in left} == set(range(1000, 2000))
        assert {each.deliveries for each in left} == {1}, "nobody was shown them before"


def test_who_waits_for_what_was_said_of_records_is_told_what_is_not_answered(
    sidecar: Program,
) -> None:
    with Node("shop") as node, node.stream("orders").consumer("billing") as consumer:
        node.stream("orders").append(0)
        record = consumer.recv(10)
        sidecar.kill(signal.SIGSTOP)
        record.ack()
        text = r"^no answer to all that was said of records within 0\.05 s$"
        with pytest.raises(Timeout, match=text):
            consumer.flush(timeout=0.05)
        with pytest.raises(Timeout, match=text):
            asyncio.run(consumer.aflush(timeout=0.05))
        sidecar.kill(signal.SIGCONT)


def test_a_node_with_nothing_under_way_closes_at_once(sidecar: Program) -> None:
    node = Node("shop")
    node.stream("orders").append(0)
    consumer = node.stream("orders").consumer("billing")
    consumer.recv(10).ack()
    consumer.close()
    sidecar.kill(signal.SIGSTOP)
    began = time.monotonic()
    node.close(timeout=5)
    assert time.monotonic() - began < 2
    sidecar.kill(signal.SIGCONT)


def test_a_consumer_that_closes_in_asyncio_holds_up_no_other_task(sidecar: Program) -> None:
    async def work() -> float:
        loop = asyncio.get_running_loop()
        async with Node("shop") as node:
            await node.stream("orders").aappend(1)
            consumer = node.stream("orders").consumer("billing")
            (await consumer.arecv(10)).ack()
            sidecar.kill(signal.SIGSTOP)
            closing = asyncio.create_task(consumer.aclose())
            longest = 0.0
            while not closing.done():
                before = loop.time()
                await asyncio.sleep(0)
                longest = max(longest, loop.time() - before)
            sidecar.kill(signal.SIGCONT)
            assert consumer.closed
        return longest

    assert asyncio.run(work()) < 0.5


def test_leaving_a_consumer_in_asyncio_tells_what_was_done(make_node: MakeNode) -> None:
    async def work() -> list[object]:
        async with make_node() as node:
            orders = node.stream("orders")
            await orders.aappend_many(range(3))
            async with orders.consumer("billing") as first:
                (await first.arecv(10)).ack()
            async with orders.consumer("billing") as second:
                return [(await second.arecv(10)).payload for _ in range(2)]

    assert asyncio.run(work()) == [1, 2]


def test_what_was_taken_just_before_closing_was_delivered(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though what brought it has not come back from handing it over."""
    closed = threading.Event()
    handed = Consuming._handed

    def hand_over(consuming: Consuming, seat: Seat, taken: Taken) -> None:
        handed(consuming, seat, taken)
        if taken:
            assert closed.wait(10)

    orders = node.stream("orders")
    orders.append(0)
    with monkeypatch.context() as patched:
        patched.setattr(Consuming, "_handed", hand_over)
        consumer = orders.consumer("billing")
        assert consumer.recv(10).deliveries == 1
        consumer.close()
        closed.set()
    assert orders.consumer("billing").recv(10).deliveries == 2


@pytest.mark.parametrize("closing", ["consumer", "node"])
def test_what_was_fetched_and_shown_to_nobody_was_never_delivered(
    make_node: MakeNode, closing: str
) -> None:
    with make_node() as node:
        orders = node.stream("orders")
        orders.append_many(range(10))
        consumer = orders.consumer("billing", max_deliver=1)
        for _ in range(3):
            consumer.recv(10).ack()
        if closing == "consumer":
            consumer.close()
    with make_node() as node:
        records = node.stream("orders").consumer("billing")
        again = [records.recv(10) for _ in range(7)]
        assert [(each.payload, each.deliveries) for each in again] == [(n, 1) for n in range(3, 10)]
