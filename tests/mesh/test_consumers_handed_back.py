"""What comes back to a consumer, or from it, keeps its order, and comes as often as it has to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from mesh import Node
from mesh.durable.consumer import Consumer
from tests.support.waiting import until


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node("writer", durable=tmp_path / "log") as node:
        yield node


@pytest.mark.parametrize("cancelled_first", range(3))
def test_cancelled_receivers_lose_no_record_and_change_no_order(
    node: Node, cancelled_first: int
) -> None:
    """Cancelled when they had one already, which nobody saw yet: it would be missing until its
    lease is over, with those behind it done before."""
    orders = node.stream("orders")

    async def run(consumer: Consumer) -> list[object]:
        waiting = [asyncio.ensure_future(consumer.arecv(5)) for _ in range(3)]
        await asyncio.sleep(0)
        orders.append_many(range(6))
        until(lambda: len(consumer._core._inbox) == 6)
        waiter = consumer._core.link.loops[asyncio.get_running_loop()]
        while waiter._calls:
            waiter._look()
        for i in range(3):
            waiting[(cancelled_first + i) % 3].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return [(await consumer.arecv(5)).payload for _ in range(6)]

    with orders.consumer("billing", order="exclusive") as consumer:
        assert asyncio.run(run(consumer)) == list(range(6))


@pytest.mark.parametrize("order", ["key", "exclusive"])
def test_several_that_are_handed_back_come_again_once_in_their_order(
    node: Node, order: Literal["key", "exclusive"]
) -> None:
    """Each of them goes with the first: handed back by itself once more, it would be taken from
    those that have come again, and come a third time behind them."""
    orders = node.stream("orders")
    for n in range(8):
        orders.append(n, key="one")
    with orders.consumer("billing", order=order) as consumer:
        first, *others = [consumer.recv(5) for _ in range(4)]
        (seat,) = consumer._core._seats.values()
        first.nak()
        until(lambda: seat._heard)
        for record in others:
            record.nak()
        first.nak()
        again = [consumer.recv(5) for _ in range(8)]
        assert [record.payload for record in again] == list(range(8))
        assert [record.deliveries for record in again] == [2, *[1] * 7]


def test_what_is_remembered_of_records_handed_back_is_bounded(node: Node) -> None:
    """Also where a consumer is never through with all that is here."""
    orders = node.stream("orders")
    for n in range(60):
        orders.append(n, key=str(n))
    with orders.consumer("billing", order="key", prefetch=4) as consumer:
        core, done = consumer._core, 0
        while done < 56:
            record = consumer.recv(5)
            if record.deliveries == 1:
                record.nak()
            else:
                record.ack()
                done += 1
            until(lambda: core._inbox)
        (seat,) = core._seats.values()
        assert len(seat.handed_back) <= 8
