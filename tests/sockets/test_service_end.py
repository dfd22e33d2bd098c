"""How a service ends: by its node, by its event loop, by a handler that wants to take it down; and
that what was given up is not started, however late the service comes to read of it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from mesh import Node
from mesh.errors import Busy, PeerLost, RemoteError, Timeout
from mesh.sockets.server import Server
from tests.support.services import Gate, Held, Net, RawCaller, calls, core_of
from tests.support.waiting import until


def echo(payload: Any) -> Any:
    return payload


async def aecho(payload: Any) -> Any:
    return payload


# -- Given up before it was read ---------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "def"])
def test_what_was_given_up_while_the_service_could_not_read_is_not_started(
    net: Net, gate: Gate, asynchronous: bool
) -> None:
    """The request and the word that nobody waits for it are read together."""

    async def blocking(payload: Any) -> Any:
        return gate(payload) if payload == "blocks" else payload

    def busy(payload: Any) -> Any:
        with net.servers[0].link.lock:  # as another reader would have it
            return gate(payload)

    client = net.client()
    started = gate.started
    server = net.serve(blocking if asynchronous else busy, concurrency=10)
    with calls(lambda: client.request("blocks", timeout=20)) as first:
        until(lambda: started)
        for i in range(50):
            with pytest.raises(Timeout):
                client.request(i, timeout=0.001)

        async def cancelled() -> None:
            tasks = [asyncio.ensure_future(client.arequest(i, timeout=None)) for i in range(50)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(cancelled())
        assert core_of(client).counters.sent == 101
        net.let_through(server)
        gate.open()
    assert first == ["blocks"]
    assert client.request("last", timeout=5) == "last"
    dropped = server.counters.dropped  # of a call that was sent late, its time may be over first
    assert dropped["cancelled"] + dropped["expired"] == dropped.total() == 100
    assert server.counters.received == 102


# -- Handlers that want to take it down --------------------------------------------------------


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_an_async_handler_cannot_end_the_services_own_loop(
    net: Net, error: type[BaseException]
) -> None:
    async def handler(payload: Any) -> Any:
        if payload:
            raise error(3)
        return payload

    server, client = net.serve(handler), net.client()
    for _ in range(3):
        with pytest.raises(RemoteError, match=error.__name__):
            client.request(True, timeout=5)
    assert client.request(False, timeout=5) is False
    assert server.running == 0


def test_system_exit_in_an_async_handler_does_not_end_the_users_loop(net: Net) -> None:
    async def handler(payload: Any) -> Any:
        sys.exit(payload)

    async def run() -> None:
        net.serve(handler)
        client = net.client()
        for _ in range(2):
            with pytest.raises(RemoteError, match="SystemExit: 3"):
                await client.arequest(3, timeout=5)

    asyncio.run(run())


class Evil(Exception):
    def __str__(self) -> str:
        raise SystemExit


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "def"])
def test_an_error_whose_text_ends_the_program_is_told_and_ends_nothing(
    net: Net, asynchronous: bool
) -> None:
    def handler(payload: Any) -> Any:
        if payload:
            raise Evil
        return payload

    async def ahandler(payload: Any) -> Any:
        return handler(payload)

    server, client = net.serve(ahandler if asynchronous else handler), net.client()
    for _ in range(3):
        with pytest.raises(RemoteError) as caught:
            client.request(True, timeout=5)
        assert caught.value.type == "Evil"
        assert caught.value.text == "<its text cannot be had: SystemExit>"
    assert client.request(False, timeout=5) is False
    assert server.running == 0


# -- The end of the event loop -----------------------------------------------------------------


def test_a_loop_that_ends_before_the_service_began_to_read_ends_it(net: Net) -> None:
    ended: list[int] = []

    async def run() -> None:
        net.serve(aecho).on_end = lambda: ended.append(1)

    asyncio.run(run())
    assert net.servers[0].link.closed
    assert ended == [1]


def test_a_loop_that_is_closed_without_a_word_ends_the_service(net: Net) -> None:
    """Nobody cancels its tasks: the control thread notices."""
    loop = asyncio.new_event_loop()

    async def run() -> None:
        net.serve(aecho)
        assert await net.client().arequest(1, timeout=5) == 1

    loop.run_until_complete(run())
    server = net.servers[0]
    server.tick()
    assert not server.link.closed
    # What the interpreter says of tasks that nobody finished is not what this is about.
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    server.tick()
    assert server.link.closed


def test_callers_of_handlers_that_end_with_their_loop_are_told(net: Net) -> None:
    """Also by those that take a while to notice."""
    client = net.client()
    started: list[Any] = []

    async def handler(payload: Any) -> None:
        started.append(payload)
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(payload):
                await asyncio.sleep(0)

    def serve() -> None:
        async def run() -> None:
            net.serve(handler, concurrency=2)
            while len(started) < 2:
                await asyncio.sleep(0.001)

        asyncio.run(run())

    with calls(
        serve, lambda: client.request(0, timeout=20), lambda: client.request(20, timeout=20)
    ) as outcomes:
        until(lambda: len(started) == 2)
        until(_ticked(net, outcomes, 2))
    assert [str(outcome) for outcome in outcomes[1:]] == ["CancelledError: "] * 2
    until(lambda: net.servers[0].link.closed)


# -- Closing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "def"])
def test_a_closing_service_lets_its_handlers_answer(
    net: Net, gate: Gate, asynchronous: bool
) -> None:
    held = Held()
    handler: Callable[[Any], Any] = held if asynchronous else gate
    started = held.started if asynchronous else gate.started
    server, client = net.serve(handler, concurrency=2), net.client()
    ended: list[int] = []
    server.on_end = lambda: ended.append(1)
    with calls(
        lambda: client.request(1, timeout=20), lambda: client.request(2, timeout=20)
    ) as outcomes:
        until(lambda: len(started) == 2)
        server.close(20_000)
        assert not server.link.closed
        assert not ended
        held.go_on()
        gate.open()
        until(lambda: server.link.closed, timeout=5)
    assert outcomes == [1, 2]
    assert ended == [1]
    until(lambda: not any(t.name.startswith("mesh ") for t in threading.enumerate()))


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "def"])
def test_who_comes_while_a_service_closes_is_served_by_another(
    net: Net, gate: Gate, asynchronous: bool
) -> None:
    held = Held()
    server = net.serve(held if asynchronous else gate)
    client = net.client()
    with calls(lambda: client.request("first", timeout=20)) as first:
        until(lambda: server.running)
        with calls(lambda: client.request("waits", timeout=20)) as waiting:
            until(lambda: server.waiting)
            net.serve(echo)
            server.close(20_000)
        other_client = net.client()
        net.detach(other_client, net.servers[1])
        with pytest.raises(Busy):
            other_client.request("next", timeout=5)
        net.attach(other_client, net.servers[1])
        net.detach(other_client, server)
        net.attach(other_client, server)  # who comes last is asked first
        assert other_client.request("next", timeout=5) == "next"
        held.go_on()
        gate.open()
    assert (first, waiting) == (["first"], ["waits"])
    assert server.counters.dropped == {"busy": 3}


def test_what_a_closing_service_had_not_read_is_told_that_it_was_not_started(
    net: Net, gate: Gate
) -> None:
    async def blocking(payload: Any) -> Any:
        return gate(payload)

    server = net.serve(blocking, concurrency=2)
    caller = RawCaller(server)
    try:
        caller.send(1)
        until(lambda: gate.started)
        caller.send(2)
        with server.link.lock:
            until(server.link.readable)
        server.close(20_000)
        assert caller.error(2)[0] == "busy"
        gate.open()
        assert caller.result(1) is None
    finally:
        caller.close()


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "def"])
def test_a_service_that_is_closed_at_once_waits_for_nobody(
    net: Net, gate: Gate, asynchronous: bool
) -> None:
    """Also while it is closing with time to spare."""
    held = Held()
    server = net.serve(held if asynchronous else gate)
    client = net.client()
    ended: list[int] = []
    server.on_end = lambda: ended.append(1)
    with calls(lambda: client.request(1, timeout=20)) as outcomes:
        until(lambda: server.running)
        server.close(20_000)
        server.close(20_000)
        assert not server.link.closed
        server.close(0)
        assert server.link.closed
        until(_ticked(net, outcomes, 0))
    assert isinstance(outcomes[0], PeerLost)
    held.go_on()
    gate.open()
    until(lambda: server.counters.dropped["answer after close"] == 1)
    assert ended == [1]
    until(lambda: not any(t.name.startswith("mesh ") for t in threading.enumerate()))


def _ticked(net: Net, outcomes: list[Any], index: int) -> Callable[[], bool]:
    def attempt() -> bool:
        core_of(net.clients[0]).tick()
        return outcomes[index] is not None

    return attempt


# -- Under a node ------------------------------------------------------------------------------


def test_a_node_that_closes_lets_its_handlers_answer_before_it_says_goodbye() -> None:
    gate = Gate()
    with Node("caller") as caller:
        node = Node("server")
        node.service("slow")(gate)
        client = caller.client("slow")
        client.wait_for(1, timeout=5)
        with calls(lambda: client.request("x", timeout=20)) as outcomes:
            until(lambda: gate.started)
            closing = threading.Thread(target=node.close, kwargs={"timeout": 20})
            closing.start()
            (server,) = node._parts.loop.wiring.cores
            assert isinstance(server, Server)
            until(lambda: server.closing)
            with pytest.raises(Busy):
                client.request("too late", timeout=5)
            gate.open()
            closing.join(timeout=10)
            assert not closing.is_alive()
        assert outcomes == ["x"]
        assert node._parts.loop.errors == 0


def test_a_node_closes_in_time_whatever_its_handlers_do() -> None:
    gate = Gate()
    with Node("caller") as caller:
        node = Node("server")
        node.service("slow")(gate)
        client = caller.client("slow")
        client.wait_for(1, timeout=5)
        with calls(lambda: client.request("x", timeout=20)) as outcomes:
            until(lambda: gate.started)
            node.close(timeout=0.05)
        assert isinstance(outcomes[0], PeerLost)
        gate.open()


def test_a_service_that_ended_is_no_longer_offered() -> None:
    with Node("server") as node, Node("caller") as caller:
        client = caller.client("echo")

        async def run() -> None:
            node.service("echo")(aecho)
            assert await client.arequest(1, timeout=5) == 1

        asyncio.run(run())
        until(lambda: client.servers == 0, "the withdrawal")
        with pytest.raises(Timeout, match="no server of 'echo'"):
            client.request(1, timeout=0)
        node.service("echo")(echo)
        assert client.request(2, timeout=5) == 2
        assert node.stats().received["service"] == 2, "what the first did is counted still"
        assert node._parts.loop.errors == 0
