"""What comes back to a consumer, or from it, keeps its order, and comes as often as it has to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

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
