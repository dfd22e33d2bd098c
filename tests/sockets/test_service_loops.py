"""Services in event loops, asyncio's own and uvloop: what holds in one holds in the other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop

from mesh.errors import Busy, Closed, Timeout
from tests.support.services import Gate, Net, calls, core_of, debts, nothing_left

Loop = Callable[[], asyncio.AbstractEventLoop]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner


async def echo(payload: Any) -> Any:
    await asyncio.sleep(0)
    return payload


async def echo_at_once(payload: Any) -> Any:
    return payload


@pytest.mark.parametrize("concurrency", [1, 10])
@pytest.mark.parametrize("handler", [echo, echo_at_once, lambda payload: payload])
def test_each_of_many_calls_has_its_own_answer(
    net: Net, runner: asyncio.Runner, concurrency: int, handler: Callable[[Any], Any]
) -> None:
    async def caller(name: int) -> None:
        for i in range(20):
            assert await client.arequest([name, i], timeout=20) == [name, i]

    async def run() -> None:
        net.serve(handler, concurrency=concurrency)
        await asyncio.gather(*map(caller, range(20)))
        net.servers[0].close(1000)

    client = net.client()
    runner.run(run())
    assert nothing_left(client)
    assert not core_of(client).counters.dropped
    # One for each time that something came, not one for each call that waited.
    assert core_of(client).link.attempts <= 2 * 400


def test_calls_are_cancelled_and_time_out(net: Net, runner: asyncio.Runner) -> None:
    async def run() -> None:
        gate = Gate()
        server, client = net.serve(gate.later, concurrency=2), net.client()
        first = [asyncio.ensure_future(client.arequest(i, timeout=20)) for i in range(2)]
        while len(gate.started) < 2:
            await asyncio.sleep(0.001)
        waiting = asyncio.ensure_future(client.arequest("cancelled", timeout=20))
        with pytest.raises(Timeout):
            await client.arequest("late", timeout=0.02)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        while server.waiting:
            await asyncio.sleep(0.001)
        gate.open()
        assert await asyncio.gather(*first) == [0, 1]
        assert await client.arequest("last", timeout=5) == "last"
        assert gate.started == [0, 1, "last"]
        assert debts(client) == 0
        assert nothing_left(client)
        server.close(1000)

    runner.run(run())


def test_whoever_waits_on_a_closed_client_gets_closed(net: Net, runner: asyncio.Runner) -> None:
    async def run() -> None:
        client = net.client()
        waiting = [asyncio.ensure_future(client.arequest(i, timeout=20)) for i in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        client.close()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in outcomes] == [Closed] * 3

    runner.run(run())


def test_threads_and_a_loop_share_a_client(net: Net, runner: asyncio.Runner) -> None:
    net.serve(lambda payload: payload)
    client = net.client()

    def blocking(name: str) -> None:
        for i in range(50):
            assert client.request([name, i], timeout=20) == [name, i]

    async def run() -> None:
        async def one(name: int) -> None:
            for i in range(20):
                assert await client.arequest([name, i], timeout=20) == [name, i]

        await asyncio.gather(*map(one, range(10)))

    with calls(*[lambda i=i: blocking(f"thread {i}") for i in range(4)]) as outcomes:
        runner.run(run())
    assert outcomes == [None] * 4
    assert nothing_left(client)


def test_a_request_whose_task_is_cancelled_before_it_begins_is_told_so(
    net: Net, runner: asyncio.Runner
) -> None:
    """The loop ends in the very round in which the request came."""

    async def handler(payload: Any) -> Any:
        raise AssertionError("it never begins")

    async def run() -> None:
        server = net.serve(handler)
        take, taken = server.take, threading.Event()

        def noting() -> Any:
            request = take()
            if request is not None:
                taken.set()
                for task in asyncio.all_tasks():
                    if task is not asyncio.current_task():
                        asyncio.get_running_loop().call_soon(task.cancel)
                asyncio.get_running_loop().call_soon(cancel_all)
            return request

        def cancel_all() -> None:
            for task in asyncio.all_tasks():
                task.cancel()

        server.take = noting  # type: ignore[method-assign]
        await asyncio.sleep(20)

    client = net.client()

    def serve() -> None:
        with pytest.raises(asyncio.CancelledError):
            runner.run(run())

    with calls(lambda: client.request("x", timeout=10)) as outcomes:
        serve()
    assert isinstance(outcomes[0], Busy)
    assert nothing_left(client)
