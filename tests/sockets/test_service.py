"""What the service column of the guarantees table promises, over real sockets and without a node:
answers, errors, and what becomes of a request when servers are slow, full or gone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from mesh import limits
from mesh.errors import (
    Busy,
    Closed,
    InvalidOption,
    MeshError,
    NotSerializable,
    PayloadTooLarge,
    PeerLost,
    RemoteError,
    Timeout,
)
from mesh.sockets.home import Counters, node_text
from mesh.sockets.server import Server
from tests.support.services import Gate, Net, calls, core_of, debts, nothing_left
from tests.support.waiting import until


def echo(payload: Any) -> Any:
    return payload


async def aecho(payload: Any) -> Any:
    return payload


class AsyncCallable:
    async def __call__(self, payload: Any) -> Any:
        return payload


# -- An answer ---------------------------------------------------------------------------------

PAYLOADS = [None, 3, {"k": [1, b"x"]}, bytes(100_000), "é" * 100_000]


@pytest.mark.parametrize("handler", [echo, aecho, AsyncCallable()], ids=["def", "async", "object"])
def test_the_answer_returns(net: Net, handler: Callable[[Any], Any]) -> None:
    net.serve(handler)
    client = net.client()
    assert [client.request(payload, timeout=5) for payload in PAYLOADS] == PAYLOADS
    assert client.request(1, headers={"trace": "x"}, timeout=None) == 1
    assert nothing_left(client)


@pytest.mark.parametrize("handler", [echo, aecho], ids=["def", "async"])
def test_the_answer_returns_in_asyncio(net: Net, handler: Callable[[Any], Any]) -> None:
    async def run() -> None:
        net.serve(handler)
        client = net.client()
        assert [await client.arequest(payload, timeout=5) for payload in PAYLOADS] == PAYLOADS
        assert await client.arequest(1, headers={"trace": "x"}, timeout=None) == 1
        net.close()

    asyncio.run(run())
    assert nothing_left(net.clients[0])


def test_both_sides_count_what_they_sent_and_received(net: Net) -> None:
    server, client = net.serve(echo), net.client()
    for _ in range(3):
        client.request("x" * 100, timeout=5)
    for counters in (server.counters, core_of(client).counters):
        until(partial(_sent, counters, 3))
        assert counters.received == 3
        assert counters.bytes_sent == counters.bytes_received > 300
        assert not counters.dropped


def _sent(counters: Counters, count: int) -> bool:
    return counters.sent == count


def test_a_lone_caller_uses_no_other_thread(net: Net) -> None:
    """In this process only the server's own threads are there besides, before and after."""
    net.serve(echo)
    client = net.client()
    client.request(0, timeout=5)
    before = set(threading.enumerate())
    used: set[threading.Thread] = set()
    wait = core_of(client).link.wait

    def noting(*args: Any, **kwargs: Any) -> Any:
        used.add(threading.current_thread())
        return wait(*args, **kwargs)

    core_of(client).link.wait = noting  # type: ignore[method-assign]
    for i in range(20):
        assert client.request(i, timeout=5) == i
    assert used == {threading.current_thread()}
    assert set(threading.enumerate()) <= before | {
        thread for thread in threading.enumerate() if thread.name.startswith("mesh service")
    }


def test_a_blocking_service_has_one_thread_more_than_may_run_handlers(net: Net, gate: Gate) -> None:
    server = net.serve(gate, concurrency=3)
    client = net.client()

    def service_threads() -> int:
        return sum(thread.name == "mesh service add" for thread in threading.enumerate())

    # More are started when they are needed; those of other tests may still be ending.
    until(lambda: service_threads() == 1, "a service with one thread")
    with calls(*[lambda i=i: client.request(i, timeout=10) for i in range(6)]) as results:
        until(lambda: len(gate.started) == 3 and server.waiting == 3)
        assert service_threads() == 4
        gate.open()
    assert results == list(range(6))
    assert service_threads() == 4


def test_an_async_handler_runs_in_the_loop_it_was_registered_in(net: Net) -> None:
    seen: list[object] = []

    async def handler(payload: Any) -> Any:
        seen.append((asyncio.get_running_loop(), threading.current_thread()))
        await asyncio.sleep(0)
        return payload

    async def run() -> None:
        net.serve(handler)
        before = set(threading.enumerate())
        assert await net.client().arequest(1, timeout=5) == 1
        assert seen == [(asyncio.get_running_loop(), threading.current_thread())]
        assert set(threading.enumerate()) <= before, "one of another test may have ended"
        net.close()

    asyncio.run(run())


def test_an_async_handler_without_a_loop_gets_one_thread_of_its_own(net: Net) -> None:
    seen: set[threading.Thread] = set()

    async def handler(payload: Any) -> Any:
        seen.add(threading.current_thread())
        return payload

    net.serve(handler)
    client = net.client()
    assert [client.request(i, timeout=5) for i in range(5)] == list(range(5))
    (thread,) = seen
    assert thread.name == "mesh service add"
    assert thread.daemon
    net.close()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_async_handlers_run_at_once_as_many_as_may(net: Net) -> None:
    gate, high = Gate(), []

    async def handler(payload: Any) -> Any:
        result = await gate.later(payload)
        high.append(net.servers[0].running)
        return result

    async def run() -> None:
        server = net.serve(handler, concurrency=3)
        client = net.client()
        asked = [asyncio.ensure_future(client.arequest(i, timeout=5)) for i in range(10)]
        while server.running < 3 or server.waiting < 7:
            await asyncio.sleep(0.001)
        assert len(gate.started) == 3
        gate.open()
        assert await asyncio.gather(*asked) == list(range(10))
        net.close()

    asyncio.run(run())
    assert max(high) == 3


def test_each_async_request_has_a_context_of_its_own(net: Net) -> None:
    from contextvars import ContextVar

    user: ContextVar[int] = ContextVar("user", default=-1)

    async def handler(payload: int) -> int:
        before = user.get()
        user.set(payload)
        return before

    net.serve(handler)
    client = net.client()
    assert [client.request(i, timeout=5) for i in range(5)] == [-1] * 5


# -- Errors ------------------------------------------------------------------------------------


def divide(payload: list[float]) -> float:
    numerator, denominator = payload
    return numerator / denominator


async def adivide(payload: list[float]) -> float:
    return divide(payload)


@pytest.mark.parametrize("handler", [divide, adivide])
def test_what_a_handler_raises_arrives_and_the_service_goes_on(
    net: Net, handler: Callable[[Any], Any]
) -> None:
    net.serve(handler)
    client = net.client()
    with pytest.raises(RemoteError, match="ZeroDivisionError: division by zero") as caught:
        client.request([1, 0], timeout=5)
    assert caught.value.type == "ZeroDivisionError"
    assert caught.value.text == "division by zero"
    assert "return numerator / denominator" in caught.value.traceback
    assert client.request([6, 3], timeout=5) == 2
    with pytest.raises(RemoteError) as caught:
        client.request(None, timeout=5)
    assert caught.value.type == "TypeError"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_handler_cannot_end_its_thread(net: Net, error: type[BaseException]) -> None:
    def handler(payload: Any) -> Any:
        if payload:
            raise error
        return payload

    net.serve(handler)
    client = net.client()
    for _ in range(3):
        with pytest.raises(RemoteError, match=error.__name__):
            client.request(True, timeout=5)
    assert client.request(False, timeout=5) is False


def test_an_async_handler_that_cancels_itself_is_an_error(net: Net) -> None:
    async def handler(payload: Any) -> Any:
        raise asyncio.CancelledError

    net.serve(handler)
    client = net.client()
    for _ in range(3):
        with pytest.raises(RemoteError, match="CancelledError"):
            client.request(1, timeout=5)


@pytest.mark.parametrize(
    ("result", "kind", "text"),
    [
        (object(), "NotSerializable", "MessagePack has no form for it"),
        ([{1, 2}], "NotSerializable", "MessagePack has no form for it"),
        (1 << 70, "NotSerializable", "MessagePack has no form for it"),
        (bytes(20_000), "PayloadTooLarge", "20,003 bytes over the limit of 10,000"),
    ],
    ids=["object", "set", "int", "large"],
)
def test_a_result_that_cannot_be_sent_is_told_to_the_caller(
    net: Net, result: object, kind: str, text: str
) -> None:
    net.serve(lambda payload: result if payload else payload, message_bytes_max=10_000)
    client = net.client()
    with pytest.raises(RemoteError, match=text) as caught:
        client.request(True, timeout=5)
    assert caught.value.type == kind
    assert client.request(False, timeout=5) is False


def test_what_cannot_be_sent_is_refused_before_it_is(net: Net) -> None:
    server, client = net.serve(echo), net.client()
    with pytest.raises(NotSerializable, match="no form"):
        client.request(object(), timeout=5)
    with pytest.raises(NotSerializable, match="headers"):
        client.request(1, headers={"k": [1]}, timeout=5)
    limit = net.calling.transport.message_bytes_max
    with pytest.raises(PayloadTooLarge, match="over the limit of 67,108,864"):
        client.request(bytes(limit + 1), timeout=5)
    with pytest.raises(InvalidOption, match="timeout"):
        client.request(1, timeout=-1)
    assert client.request(1, timeout=5) == 1
    assert server.counters.received == 1


# -- Time --------------------------------------------------------------------------------------


def test_a_call_ends_by_its_timeout_and_says_what_was_missing(net: Net, gate: Gate) -> None:
    client = net.client()
    with pytest.raises(Timeout, match=r"^no server of 'add' within 0\.02 s$"):
        client.request(1, timeout=0.02)
    with pytest.raises(Timeout, match=r"^no server of 'add' at once$"):
        client.request(1, timeout=0)
    net.serve(gate)
    before = time.monotonic()
    with pytest.raises(Timeout, match=r"^no answer of service 'add' \(server 0{15}1\) within"):
        client.request(1, timeout=0.05)
    assert 0.05 <= time.monotonic() - before < 1
    assert nothing_left(client)


def test_a_call_ends_by_its_timeout_in_asyncio(net: Net, gate: Gate) -> None:
    async def run() -> None:
        client = net.client()
        with pytest.raises(Timeout, match=r"^no server of 'add' within 0\.02 s$"):
            await client.arequest(1, timeout=0.02)
        net.serve(gate)
        with pytest.raises(Timeout, match=r"^no answer of service 'add' \(server 0{15}1\) within"):
            await client.arequest(1, timeout=0.05)
        assert nothing_left(client)

    asyncio.run(run())


def test_a_request_waits_for_a_server_to_come(net: Net) -> None:
    client = net.client()
    with calls(lambda: client.request(1, timeout=10)) as results:
        until(lambda: core_of(client).table.waiting)
        net.serve(echo)
    assert results == [1]

    async def run() -> None:
        client = net.client()
        net.detach(client, net.servers[0])
        task = asyncio.ensure_future(client.arequest(2, timeout=10))
        await asyncio.sleep(0)
        net.attach(client, net.servers[0])
        assert await task == 2

    asyncio.run(run())


def test_a_request_that_expired_in_the_backlog_is_not_started(net: Net, gate: Gate) -> None:
    server, client = net.serve(gate), net.client()
    with calls(lambda: client.request("first", timeout=10)) as results:
        until(lambda: gate.started)
        # Not abandoned but expired: no CANCEL comes, as if the caller had died.
        core_of(client)._cancel = lambda call, server: None  # type: ignore[method-assign]
        with pytest.raises(Timeout):
            client.request("short", timeout=0.02)
        assert server.waiting == 1
        until(partial(_has_expired, server))
        gate.open()
    assert results == ["first"]
    assert client.request("last", timeout=5) == "last"
    assert gate.started == ["first", "last"]
    assert server.counters.dropped == {"expired": 1}


def _has_expired(server: Server) -> bool:
    """Whether the one request that waits has: its time counts from its arrival, by this clock."""
    (request,) = server._backlog._waiting.values()
    return time.monotonic() >= request.expires


def test_an_expired_request_gives_up_its_place_in_the_backlog(net: Net, gate: Gate) -> None:
    server, client = net.serve(gate, backlog=1), net.client()
    with calls(lambda: client.request("first", timeout=10)):
        until(lambda: gate.started)
        core_of(client)._cancel = lambda call, server: None  # type: ignore[method-assign]
        with pytest.raises(Timeout):
            client.request("short", timeout=0.02)
        until(partial(_has_expired, server))
        server.tick()
        assert server.waiting == 0
        gate.open()


def test_a_cancelled_request_is_not_started(net: Net, gate: Gate) -> None:
    """A call that ends by its timeout or is cancelled is taken out of the backlog."""
    server, client = net.serve(gate), net.client()

    async def cancelled() -> None:
        task = asyncio.ensure_future(client.arequest("cancelled", timeout=None))
        while server.waiting < 1:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with calls(lambda: client.request("first", timeout=10)) as results:
        until(lambda: gate.started)
        asyncio.run(cancelled())
        until(lambda: server.waiting == 0)
        assert server.counters.dropped == {"cancelled": 1}
        gate.open()
    assert results == ["first"]
    assert client.request("last", timeout=5) == "last"
    assert gate.started == ["first", "last"]
    core_of(client).tick()
    assert debts(client) == 0, "the server said that it will not answer"


def test_a_late_reply_is_dropped_and_counted(net: Net, gate: Gate) -> None:
    net.serve(gate)
    client = net.client()
    with pytest.raises(Timeout):
        client.request("late", timeout=0.2)
    assert gate.started, "within 0.2 s"
    gate.open()
    assert client.request("next", timeout=5) == "next"
    assert core_of(client).counters.dropped == {"late reply": 1}
    assert debts(client) == 0


# -- Several servers ---------------------------------------------------------------------------


def test_servers_share_by_who_owes_least(net: Net, gate: Gate) -> None:
    """A server that hangs gets one request, and the other, which does not, all that follow."""
    net.serve(gate)
    net.serve(echo)
    client = net.client()
    with calls(lambda: client.request("a", timeout=10), lambda: client.request("b", timeout=10)):
        until(lambda: gate.started)
        for i in range(10):
            assert client.request(i, timeout=5) == i
        gate.open()
    assert len(gate.started) == 1


def test_servers_that_are_equal_share_alike(net: Net) -> None:
    counts: Counter[int] = Counter()
    for i in range(3):

        def count(payload: Any, i: int = i) -> None:
            counts[i] += 1

        net.serve(count)
    client = net.client()
    for _ in range(30):
        client.request(1, timeout=5)
    assert counts == {0: 10, 1: 10, 2: 10}


def test_a_full_server_is_passed_over_and_busy_comes_when_all_are_full(net: Net) -> None:
    gates = [Gate(), Gate()]
    for gate in gates:
        net.serve(gate, backlog=1)
    client, other = net.client(), net.client()
    try:
        with calls(*[lambda i=i: other.request(i, timeout=10) for i in range(3)]) as results:
            # Each runs one, and one of the two has its backlog full besides.
            until(lambda: [s.running for s in net.servers] == [1, 1])
            until(lambda: sum(s.waiting for s in net.servers) == 1)
            with calls(lambda: client.request("last place", timeout=10)) as placed:
                until(lambda: [s.waiting for s in net.servers] == [1, 1])
                before = time.monotonic()
                with pytest.raises(
                    Busy, match=r"every server of 'add' is full \(2 of them turned it away\)"
                ):
                    client.request("too much", timeout=10)
                assert time.monotonic() - before < 2
                for gate in gates:
                    gate.open()
            assert placed == ["last place"]
        assert results == [0, 1, 2]
        assert nothing_left(client)
    finally:
        for gate in gates:
            gate.open()


def test_a_server_holds_no_more_bytes_than_its_buffer(net: Net, gate: Gate) -> None:
    large = bytes(100_000)
    server = net.serve(gate, buffer_bytes=limits.SLOT_BYTES_MIN)
    client = net.client()
    with calls(*[lambda: client.request(large, timeout=10) for _ in range(3)]) as results:
        until(lambda: (server.running, server.waiting) == (1, 2))
        with pytest.raises(Busy):
            client.request(large, timeout=10)
        with calls(lambda: client.request("small", timeout=10)) as small:
            until(lambda: server.waiting == 3)
            gate.open()
    assert results == [large] * 3
    assert small == ["small"]


def test_a_full_server_counts_whom_it_turned_away(net: Net, gate: Gate) -> None:
    server, client = net.serve(gate, backlog=0), net.client()
    with calls(lambda: client.request("first", timeout=10)) as results:
        until(lambda: gate.started)
        with pytest.raises(Busy):
            client.request("second", timeout=10)
        gate.open()
    assert results == ["first"]
    assert server.counters.dropped == {"busy": 1}


def test_a_client_with_too_many_requests_is_busy(
    net: Net, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    net.serve(gate)
    client = net.client()
    monkeypatch.setattr(core_of(client).table, "_requests_max", 1)
    with calls(lambda: client.request("first", timeout=10)) as results:
        until(lambda: gate.started)
        with pytest.raises(Busy, match="1 requests to 'add' are outstanding, which is the limit"):
            client.request("second", timeout=10)
        gate.open()
    assert results == ["first"]


# -- A server that goes ------------------------------------------------------------------------


def test_callers_get_peer_lost_at_once(net: Net, gate: Gate) -> None:
    server, client = net.serve(gate, concurrency=4), net.client()
    ended: list[float] = []

    def call() -> None:
        try:
            client.request(1, timeout=30)
        finally:
            ended.append(time.monotonic())

    async def acall() -> MeshError:
        with pytest.raises(PeerLost) as caught:
            await client.arequest(1, timeout=30)
        ended.append(time.monotonic())
        return caught.value

    async def acalls() -> None:
        await asyncio.gather(acall(), acall())

    with calls(call, call, lambda: asyncio.run(acalls())) as errors:
        until(lambda: len(gate.started) == 4)
        gone = time.monotonic()
        net.detach(client, server)
    assert all(at - gone < 1 for at in ended)
    assert len(ended) == 4
    assert [type(error) for error in errors] == [PeerLost, PeerLost, type(None)]
    assert str(errors[0]) == (
        f"server {node_text(1)} of 'add' is gone (died); whether the request ran is not known"
    )
    assert nothing_left(client)
    assert client.servers == 0


def test_an_idempotent_request_goes_to_another_server_and_others_do_not(
    net: Net, gate: Gate
) -> None:
    server, client = net.serve(gate, concurrency=2), net.client()
    with calls(
        lambda: client.request("again", timeout=10, retry=True),
        lambda: client.request("once", timeout=10),
    ) as outcomes:
        until(lambda: len(gate.started) == 2)
        asked: list[Any] = []

        def other(payload: Any) -> str:
            asked.append(payload)
            return "other"

        net.serve(other)
        net.detach(client, server)
    assert outcomes[0] == "other"
    assert isinstance(outcomes[1], PeerLost)
    assert asked == ["again"]


def test_an_idempotent_request_is_sent_on_by_whoever_saw_the_server_go(
    net: Net, gate: Gate
) -> None:
    """Its caller sleeps, and nothing else wakes it."""
    server, client = net.serve(gate), net.client()
    with calls(lambda: client.request("again", timeout=2, retry=True)) as outcomes:
        until(lambda: gate.started)
        net.serve(lambda payload: "other")
        assert client.request("on the other", timeout=5) == "other", "its connection is up"
        net.detach(client, server)
    assert outcomes == ["other"]


def test_an_idempotent_request_waits_for_another_server_within_its_time(
    net: Net, gate: Gate
) -> None:
    server, client = net.serve(gate), net.client()
    with calls(
        lambda: client.request("long", timeout=10, retry=True),
        lambda: client.request("short", timeout=0.1, retry=True),
    ) as outcomes:
        until(lambda: gate.started and server.waiting)
        net.detach(client, server)
        until(lambda: outcomes[1] is not None)
        assert str(outcomes[1]) == "no server of 'add' within 0.1 s"
        net.serve(echo)
    assert outcomes[0] == "long"


def test_an_answer_that_came_before_the_end_counts(net: Net, gate: Gate) -> None:
    """The client reads what is there before it says that the server is lost."""
    server, client = net.serve(gate), net.client()
    core = core_of(client)

    async def run() -> None:
        task = asyncio.ensure_future(client.arequest("x", timeout=5))
        await asyncio.sleep(0)
        gate.open()  # from here on the loop does not read
        with core.link.lock:
            until(core.link.readable)
        net.detach(client, server)
        assert await task == "x"

    asyncio.run(run())


def test_a_withdrawn_offer_that_was_never_attached_changes_nothing(net: Net) -> None:
    server, client = net.serve(echo), net.client()
    core_of(client).detach(77, 1, "withdrawn")
    core_of(client).detach(net.node_of(server), 99, "withdrawn")
    net.attach(client, server)
    assert client.servers == 1
    assert client.request(1, timeout=5) == 1


def test_wait_for_counts_servers(net: Net) -> None:
    client = net.client()
    with pytest.raises(Timeout, match=r"no 1 servers of 'add' within 0\.01 s"):
        client.wait_for(1, timeout=0.01)
    with calls(lambda: client.wait_for(2, timeout=10)) as results:
        net.serve(echo)
        net.serve(echo)
    assert results == [None]
    asyncio.run(client.await_for(2, timeout=5))
    assert client.servers == 2


# -- Closing -----------------------------------------------------------------------------------


def test_whoever_waits_on_a_closed_client_gets_closed(net: Net, gate: Gate) -> None:
    server, client = net.serve(gate), net.client()

    async def run() -> None:
        with pytest.raises(Closed, match="client 'add' is closed"):
            await client.arequest(2, timeout=30)

    with calls(lambda: client.request(1, timeout=30), lambda: asyncio.run(run())) as outcomes:
        until(lambda: server.running == 1 and server.waiting == 1)
        client.close()
    assert isinstance(outcomes[0], Closed)
    assert outcomes[1] is None
    with pytest.raises(Closed):
        client.request(1, timeout=1)
    until(lambda: server.waiting == 0, "the cancellation")
    client.close()


def test_a_closing_server_lets_its_handlers_finish_and_turns_the_rest_away(
    net: Net, gate: Gate
) -> None:
    server, client = net.serve(gate), net.client()
    with calls(
        lambda: client.request(1, timeout=10), lambda: client.request(2, timeout=10)
    ) as outcomes:
        until(lambda: server.running == 1 and server.waiting == 1)
        server.close(10_000)
        server.close(20_000)  # once is enough
        assert not server.link.closed
        until(lambda: outcomes.count(None) == 1)
        gate.open()
    assert {type(outcome) for outcome in outcomes} == {int, Busy}
    until(lambda: server.link.closed)
    until(lambda: not any(t.name == "mesh service add" for t in threading.enumerate()))


def test_a_closing_server_does_not_wait_longer_than_it_may(net: Net, gate: Gate) -> None:
    server, client = net.serve(gate), net.client()
    with calls(lambda: client.request(1, timeout=10)) as outcomes:
        until(lambda: server.running == 1)
        before = time.monotonic()
        server.close(30)
        until(lambda: server.link.closed)
        assert time.monotonic() - before < 2
        net.detach(client, server)
    assert isinstance(outcomes[0], PeerLost)
    gate.open()
    until(lambda: server.counters.dropped["answer after close"] == 1)


def test_a_service_ends_with_its_event_loop(net: Net) -> None:
    async def run() -> None:
        net.serve(aecho)
        assert await net.client().arequest(1, timeout=5) == 1

    asyncio.run(run())
    assert net.servers[0].link.closed
