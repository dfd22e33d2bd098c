"""Many callers on one client, servers under load: nobody hangs or gets another's answer."""

from __future__ import annotations

import asyncio
import random
import select
import threading
import time
from functools import partial
from typing import Any

import pytest

from mesh.errors import Closed, PeerLost, Timeout
from mesh.sockets.calls import Call
from mesh.sockets.client import Client
from mesh.sockets.frame import Kind
from mesh.sockets.link_asyncio import LoopWaiter
from mesh.sockets.parts import has_input
from mesh.sockets.sleeping import Sleeper
from mesh.sockets.transport import Transport
from tests.support.services import Gate, Net, RawServer, calls, core_of, nothing_left
from tests.support.waiting import until


def echo(payload: Any) -> Any:
    return payload


def call_many(client: Client, caller: int, count: int) -> int:
    for i in range(count):
        assert client.request([caller, i], timeout=20) == [caller, i]
    return count


async def acall_many(client: Client, tasks: int, count: int) -> int:
    async def one(caller: int) -> None:
        for i in range(count):
            assert await client.arequest([caller, i], timeout=20) == [caller, i]

    await asyncio.gather(*(one(caller) for caller in range(tasks)))
    return tasks * count


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 4])
def test_threads_and_tasks_share_one_client(net: Net, concurrency: int) -> None:
    for _ in range(2):
        net.serve(echo, concurrency=concurrency)
    client = net.client()
    with calls(
        *[lambda i=i: call_many(client, i, 50) for i in range(8)],
        lambda: asyncio.run(acall_many(client, 100, 5)),
        lambda: asyncio.run(acall_many(client, 10, 5)),
    ) as counts:
        pass
    assert counts == [50] * 8 + [500, 50]
    assert nothing_left(client)
    assert not core_of(client).counters.dropped
    # One wake-up for each answer, and one for each thread that takes the reading over.
    assert core_of(client).link.attempts < 950 * 10


@pytest.mark.slow
def test_threads_share_a_client_of_an_async_service(net: Net) -> None:
    async def handler(payload: Any) -> Any:
        await asyncio.sleep(0)
        return payload

    net.serve(handler, concurrency=4)
    client = net.client()
    with calls(*[lambda i=i: call_many(client, i, 50) for i in range(8)]) as counts:
        pass
    assert counts == [50] * 8
    assert nothing_left(client)


@pytest.mark.slow
def test_more_requests_at_once_than_zeromq_buffers_by_default(net: Net) -> None:
    """What ZeroMQ has no room for waits at the client, and goes when there is room."""
    server = net.serve(echo, backlog=65_536)
    client = net.client()

    async def run() -> None:
        answers = await asyncio.gather(*(client.arequest(i, timeout=30) for i in range(5000)))
        assert answers == list(range(5000))

    asyncio.run(run())
    assert not server.counters.dropped
    assert not core_of(client).counters.dropped


def test_calls_that_begin_together_cost_no_more_than_each_by_itself(
    net: Net, raw_server: RawServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that begins does not have all that wait look again."""
    client = net.client()
    raw_server.attach(client)
    core = core_of(client)
    look, looked = core.look, []

    def noting(call: Call) -> bool | None:
        looked.append(call)
        return look(call)

    monkeypatch.setattr(core, "look", noting)

    async def run() -> None:
        tasks = [asyncio.ensure_future(client.arequest(i, timeout=None)) for i in range(200)]
        while len(core.table) < 200:
            await asyncio.sleep(0)
        assert len(looked) < 5 * 200
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())
    assert nothing_left(client)


def test_whoever_reads_hands_the_reading_on_when_its_own_answer_comes(
    net: Net, raw_server: RawServer
) -> None:
    """Eight threads wait, the first reads for all: the answers come in an order in which the
    reader's own is always the next, so that each has to hand the reading on."""
    client = net.client()
    raw_server.attach(client)
    with calls(*[lambda i=i: client.request(i, timeout=20) for i in range(8)]) as results:
        requests = [raw_server.recv() for _ in range(8)]
        until(lambda: len(core_of(client).link._threads) == 8)
        for _, frame in requests:
            assert frame.count == 1
        by_seq = {frame.seq: caller for caller, frame in requests}
        waiting = dict(by_seq)
        while waiting:
            with core_of(client).link.lock:
                reader = core_of(client).link._threads[0]
                calling = next(iter(core_of(client).table._servers.values())).requests
                seq = next(seq for seq, call in calling.items() if call.waiter is reader)
            raw_server.reply(waiting.pop(seq), seq, f"for {seq}")
            until(partial(_no_longer_waits, client, reader))
    assert sorted(results) == [f"for {seq}" for seq in sorted(by_seq)]
    assert nothing_left(client)


def test_whoever_reads_wakes_those_whose_answers_came(net: Net, raw_server: RawServer) -> None:
    """The other way round: the reader's own answer comes last."""
    client = net.client()
    raw_server.attach(client)
    with calls(*[lambda i=i: client.request(i, timeout=20) for i in range(8)]) as results:
        requests = [raw_server.recv() for _ in range(8)]
        until(lambda: len(core_of(client).link._threads) == 8)
        with core_of(client).link.lock:
            reader = core_of(client).link._threads[0]
            calling = next(iter(core_of(client).table._servers.values())).requests
            last = next(seq for seq, call in calling.items() if call.waiter is reader)
        requests.sort(key=lambda request: request[1].seq == last)
        for caller, frame in requests:
            left = len(core_of(client).link._threads)
            raw_server.reply(caller, frame.seq, frame.seq)
            until(partial(_fewer_wait, client, left))
    assert sorted(results) == list(range(1, 9))


def _no_longer_waits(client: Client, waiter: object) -> bool:
    return waiter not in core_of(client).link._threads


def _fewer_wait(client: Client, than: int) -> bool:
    return len(core_of(client).link._threads) < than


def test_an_answer_that_comes_before_its_caller_sleeps_is_not_overlooked(
    net: Net, raw_server: RawServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its first attempt has read all there was; and somebody else takes notice of it, which
    swallows what the descriptor would say."""
    client = net.client()
    core, sleep = core_of(client), Sleeper.sleep
    raw_server.attach(client)

    def late(sleeper: Sleeper, *where: Any) -> bool:
        monkeypatch.setattr(Sleeper, "sleep", sleep)
        caller, frame = raw_server.recv()
        raw_server.reply(caller, frame.seq, "early")
        with core.link:
            until(core.link.readable)
        return sleep(sleeper, *where)

    monkeypatch.setattr(Sleeper, "sleep", late)
    began = time.monotonic()
    assert client.request("x", timeout=10) == "early"
    assert time.monotonic() - began < 9, "its deadline made it look again"


@pytest.mark.parametrize("how", ["thread", "loop"])
def test_an_answer_that_comes_as_the_last_of_the_others_has_its_own_is_not_overlooked(
    how: str, net: Net, raw_server: RawServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One begins while another waits, and reads the other's answer. Its own comes before it sleeps,
    and what is looked at for the other's sake swallows what the descriptor would say."""
    client = net.client()
    core, begin = core_of(client), core_of(client).begin
    raw_server.attach(client)

    def call(payload: Any) -> Any:
        if how == "thread":
            return client.request(payload, timeout=10)
        return asyncio.run(client.arequest(payload, timeout=10))

    def beginning(call: Call) -> bool | None:
        monkeypatch.setattr(core, "begin", begin)
        raw_server.reply(caller, frame.seq, "for the other")
        assert select.select([core.link], [], [], 5)[0]
        outcome = begin(call)
        own_caller, own_frame = raw_server.recv()
        raw_server.reply(own_caller, own_frame.seq, "own")
        assert select.select([core.link], [], [], 5)[0]
        return outcome

    with calls(lambda: client.request("other", timeout=10)) as other:
        caller, frame = raw_server.recv()
        until(lambda: len(core.link._threads) == 1)
        monkeypatch.setattr(core, "begin", beginning)
        began = time.monotonic()
        assert call("one") == "own"
        assert time.monotonic() - began < 9, "its deadline made it look again"
    assert other == ["for the other"]
    assert nothing_left(client)


def test_an_answer_that_comes_before_a_loop_watches_is_not_overlooked(
    net: Net, raw_server: RawServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = net.client()
    link, begin = core_of(client).link, LoopWaiter.begin
    raw_server.attach(client)

    def late(waiter: LoopWaiter, *wait: Any) -> Any:
        caller, frame = raw_server.recv()
        raw_server.reply(caller, frame.seq, "early")
        assert select.select([link], [], [], 5)[0]
        return begin(waiter, *wait)

    monkeypatch.setattr(LoopWaiter, "begin", late)
    began = time.monotonic()
    assert asyncio.run(client.arequest("x", timeout=10)) == "early"
    assert time.monotonic() - began < 9, "its deadline made it look again"


def test_an_answer_that_a_send_brought_to_light_is_not_overlooked(
    net: Net, raw_server: RawServer
) -> None:
    """Sending takes notice of what came, and swallows what the descriptor would say about it. The
    loop does not poll while this runs, so that only reading again finds the first answer."""

    async def run() -> None:
        client = net.client()
        raw_server.attach(client)
        first = asyncio.ensure_future(client.arequest(1, timeout=10))
        while not nothing_left(client) and len(core_of(client).table) == 0:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        caller, frame = raw_server.recv()
        raw_server.reply(caller, frame.seq, "first")
        core = core_of(client)
        with core.link.lock:
            until(core.link.readable)
        core.abandon(_never_opened(client))  # an operation that is none of the first call's
        assert await asyncio.wait_for(first, 2) == "first"

    asyncio.run(run())


def _never_opened(client: Client) -> Any:
    return Call(core_of(client), b"\x91\xc0", 1, False)


def test_an_answer_that_comes_while_another_request_is_sent_on_is_not_overlooked(net: Net) -> None:
    """A server is too busy; while its request is sent on to the other, an answer of that other
    comes, and the sending swallows what the descriptor would say about it."""
    first, second = RawServer(net, 50), RawServer(net, 51)

    async def run() -> None:
        client = net.client()
        core, place = core_of(client), core_of(client)._place
        first.attach(client)
        one = asyncio.ensure_future(client.arequest("one", timeout=10))
        one_caller, one_frame = await asyncio.to_thread(first.recv)
        second.attach(client)
        other = asyncio.ensure_future(client.arequest("other", timeout=10))
        other_caller, other_frame = await asyncio.to_thread(second.recv)

        def placing(call: Any, *full: Any) -> bool:
            first.reply(one_caller, one_frame.seq, "answer")
            until(partial(has_input, next(iter(core._connections.values())).socket))
            return place(call, *full)

        core._place = placing  # type: ignore[method-assign]
        second.reply(other_caller, other_frame.seq, ["busy", "", "", ""], kind=Kind.ERROR)
        assert await asyncio.wait_for(one, 2) == "answer"
        other.cancel()

    try:
        asyncio.run(run())
    finally:
        first.close()
        second.close()


def test_an_answer_that_a_send_without_room_brought_to_light_is_not_overlooked(
    net: Net, raw_server: RawServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a send that fails takes notice of what came, and swallows what the descriptor would say
    about it: here one of a call that waits, tried again by whoever reads for all."""
    client = net.client()
    raw_server.attach(client)
    core, placing = core_of(client), core_of(client)._place_waiting

    def full(call: Call, server: Any) -> bool:
        has_input(core._connections[server].socket)  # as zmq_send does before it says EAGAIN
        return False

    def answered_first() -> None:
        monkeypatch.setattr(core, "_place_waiting", placing)
        raw_server.reply(caller, frame.seq, "answer")
        assert select.select([core.link], [], [], 5)[0]
        placing()

    with calls(lambda: client.request("one", timeout=10)) as one:
        caller, frame = raw_server.recv()
        until(lambda: len(core.link._threads) == 1)
        monkeypatch.setattr(core, "_send", full)
        with calls(lambda: client.request("two", timeout=8)) as two:
            until(lambda: len(core.link._threads) == 2)
            monkeypatch.setattr(core, "_place_waiting", answered_first)
            with core.link.lock:
                core.link._threads[0].wake()
            until(lambda: one == ["answer"])
            client.close()
    assert isinstance(two[0], Closed)


def test_cancelled_calls_leave_nothing_behind(net: Net) -> None:
    async def run() -> None:
        gate = Gate()
        server = net.serve(gate.later, concurrency=2, backlog=50)
        client = net.client()
        rest = len(asyncio.all_tasks())
        tasks = [asyncio.ensure_future(client.arequest(i, timeout=None)) for i in range(20)]
        while server.running + server.waiting < 20:
            await asyncio.sleep(0.001)
        for task in tasks[::2]:
            task.cancel()
        while sum(task.done() for task in tasks) < 10:
            await asyncio.sleep(0)
        assert len(core_of(client).table) == 10
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(outcome, asyncio.CancelledError)
            for outcome in await asyncio.gather(*tasks, return_exceptions=True)
        )
        assert nothing_left(client)
        while server.waiting:
            await asyncio.sleep(0.001)
        assert server.counters.dropped == {"cancelled": 18}
        gate.open()
        while len(asyncio.all_tasks()) > rest + 1:  # the server's, that waits for the next request
            await asyncio.sleep(0.001)
        assert await client.arequest("next", timeout=5) == "next"
        net.close()

    asyncio.run(run())


def test_a_call_cancelled_before_it_began_sends_nothing(net: Net) -> None:
    async def run() -> None:
        server, client = net.serve(echo), net.client()
        task = asyncio.ensure_future(client.arequest(1, timeout=None))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await client.arequest(2, timeout=5) == 2
        assert server.counters.received == 1

    asyncio.run(run())


@pytest.mark.slow
def test_every_call_ends_while_servers_come_and_go(net: Net) -> None:
    """With a server attached and detached all the time, each call has an outcome, and it is its
    own: an answer, or that the server was lost, or that there was none in time."""
    luck = random.Random(5)
    for _ in range(3):
        net.serve(echo, concurrency=2)
    client = net.client()
    stop = threading.Event()

    def call(caller: int) -> list[Any]:
        outcomes: list[Any] = []
        for i in range(150):
            try:
                outcomes.append(client.request([caller, i], timeout=5, retry=caller % 2 == 0))
                assert outcomes[-1] == [caller, i]
            except PeerLost as error:
                outcomes.append(error)
        return outcomes

    def churn() -> None:
        while not stop.is_set():
            server = luck.choice(net.servers)
            net.detach(client, server)
            net.attach(client, server)

    churning = threading.Thread(target=churn)
    churning.start()
    try:
        with calls(*[lambda i=i: call(i) for i in range(4)]) as results:
            pass
    finally:
        stop.set()
        churning.join()
    assert [len(outcomes) for outcomes in results] == [150] * 4
    for retried in results[::2]:
        assert not any(isinstance(outcome, PeerLost) for outcome in retried)
    assert nothing_left(client)


@pytest.mark.slow
def test_a_server_without_room_is_waited_for(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeroMQ has room for one message to a server that does not listen yet: the next one waits at
    the client, and goes when there is room."""
    connecting = Transport.connecting
    monkeypatch.setattr(Transport, "connecting", lambda *args: connecting(*args, hwm=1))
    client = net.client()
    late = RawServer(net, listening=False)
    late.attach(client)
    try:
        with calls(lambda: client.request("first", timeout=10)) as first:
            until(lambda: core_of(client).counters.sent == 1)
            with pytest.raises(Timeout, match=r"^no server of 'add' with room within 0\.02 s$"):
                client.request("second", timeout=0.02)
            with calls(lambda: client.request("third", timeout=10)) as third:
                until(lambda: core_of(client).table.waiting)
                late.listen()
                for _ in range(2):
                    caller, frame = late.recv()
                    late.reply(caller, frame.seq, frame.seq)
        assert (first, third) == ([1], [3])
    finally:
        late.close()
    assert nothing_left(client)
