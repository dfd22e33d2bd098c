"""The shorter ways: an exchange in one go, a handler's thread that reads on, a deputy for it. They
are taken where it is quiet, and everything holds there that holds elsewhere."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from mesh.errors import Busy, Closed, Forked, PeerLost, RemoteError, Timeout
from mesh.sockets import exchange, moment, server_threads
from mesh.sockets.client import Client
from mesh.sockets.frame import FOR_EVER, Flag, Kind, encode, wire_name
from mesh.sockets.server import Server
from mesh.sockets.server_threads import Threads
from tests.support.services import (
    SERVICE,
    Gate,
    Net,
    RawCaller,
    RawServer,
    calls,
    core_of,
    debts,
    nothing_left,
)
from tests.support.topics import NETWORKED
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("no_signal_handlers")


def echo(payload: Any) -> Any:
    return payload


def make_brisk(client: Client, server: Server | None = None) -> None:
    """Have quick answers until both sides take the shorter way."""

    def brisk() -> bool:
        for _ in range(10):
            assert client.request("quick", timeout=5.0) == "quick"
        return core_of(client).exchange is not None and (server is None or server.came_alone)

    until(brisk)


# -- A client's exchange in one go -------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_a_lone_caller_soon_has_its_answers_in_one_go(
    net: Net, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr("mesh.sockets.calls.MOMENT_MS", 5000)  # however slow the machine is
    server, client = net.serve(echo, **NETWORKED), net.client(scheme)
    make_brisk(client, server)
    core, counters = core_of(client), core_of(client).counters
    sent, received = counters.sent, counters.received

    def unexpected(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the longer way")

    payloads = ["x", b"y", b"y" * 300, 5, 1.5, None, True]
    with monkeypatch.context() as patch:
        patch.setattr(core.link, "wait", unexpected)
        for payload in payloads:
            assert client.request(payload) == payload
    assert counters.sent - sent == counters.received - received == len(payloads)
    assert nothing_left(client)


def test_an_answer_that_takes_longer_than_a_moment_comes_all_the_same(net: Net) -> None:
    def slow(payload: Any) -> Any:
        if payload == "slow":
            time.sleep(10 * moment.MOMENT_S)
        return payload

    client = (net.serve(slow), net.client())[1]
    make_brisk(client)
    assert client.request("slow", timeout=5.0) == "slow"
    assert core_of(client).exchange is None
    assert client.request("next", timeout=5.0) == "next"
    assert nothing_left(client)
    assert debts(client) == 0


def test_who_waits_for_an_answer_holds_up_nobody_else(net: Net, gate: Gate) -> None:
    def held(payload: Any) -> Any:
        return gate(payload) if payload == "held" else payload

    net.serve(held, concurrency=2)
    client = net.client()
    make_brisk(client)
    with calls(lambda: client.request("held", timeout=10.0)) as results:
        until(lambda: gate.started)
        for i in range(3):
            assert client.request(i, timeout=5.0) == i
        gate.open()
    assert results == ["held"]
    assert nothing_left(client)


def test_errors_arrive_and_timeouts_end_it(net: Net, gate: Gate) -> None:
    def handler(payload: Any) -> Any:
        if payload == "held":
            return gate(payload)
        if payload == "wrong":
            raise ValueError(payload)
        return payload

    server, client = net.serve(handler), net.client()
    make_brisk(client)
    with pytest.raises(RemoteError, match="ValueError: wrong"):
        client.request("wrong", timeout=5.0)
    make_brisk(client)
    with pytest.raises(Timeout, match=r"no answer of service 'add' \(server 0+1\) within 0\.05 s"):
        client.request("held", timeout=0.05)
    assert debts(client) == 1
    gate.open()
    assert client.request("next", timeout=5.0) == "next"
    assert core_of(client).counters.dropped == {"late reply": 1}
    assert debts(client) == 0
    assert nothing_left(client)
    assert server.counters.received == core_of(client).counters.sent


@pytest.mark.parametrize("end", ["detached", "closed"])
def test_the_end_of_the_server_or_the_client_ends_it(net: Net, gate: Gate, end: str) -> None:
    def handler(payload: Any) -> Any:
        return payload if payload == "quick" else gate(payload)

    server, client = net.serve(handler), net.client()
    make_brisk(client)
    with calls(lambda: client.request("held", timeout=10.0)) as outcomes:
        until(lambda: gate.started)
        if end == "closed":
            client.close()
        else:
            net.detach(client, server)
    assert isinstance(outcomes[0], Closed if end == "closed" else PeerLost)
    if end == "closed":
        with pytest.raises(Closed):
            client.request("x", timeout=5.0)
    else:
        with pytest.raises(Timeout):
            client.request("x", timeout=0.01)


def test_control_c_takes_the_request_back(
    net: Net, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handler(payload: Any) -> Any:
        return payload if payload == "quick" else gate(payload)

    server, client = net.serve(handler), net.client()
    make_brisk(client)

    def interrupted(*args: Any) -> bytes:
        raise KeyboardInterrupt

    with calls(lambda: net.client().request("first", timeout=10.0)):
        until(lambda: gate.started)
        with monkeypatch.context() as patch:
            patch.setattr(exchange, "recv", interrupted)
            with pytest.raises(KeyboardInterrupt):
                client.request("given up", timeout=10.0)
        assert not core_of(client).link.lock.locked()
        assert nothing_left(client)
        until(lambda: server.counters.dropped["cancelled"] == 1)
        gate.open()
    assert gate.started == ["first"]
    assert client.request("next", timeout=5.0) == "next"
    core_of(client).tick()
    assert debts(client) == 0


@pytest.mark.parametrize(
    ("odd", "counted"),
    [
        ("of another call", "unexpected reply"),
        ("forged", "malformed"),
        ("of another channel", "malformed"),
        ("of another kind", "malformed"),
        ("lacks a part", "malformed"),
        ("cut", "malformed"),
    ],
)
def test_what_else_comes_meanwhile_is_not_taken_for_the_answer(
    net: Net, raw_server: RawServer, odd: str, counted: str
) -> None:
    client = net.client()
    raw_server.attach(client)

    def serve() -> None:
        while True:
            caller, frame = raw_server.recv()
            if frame.body == b"\x91\xa5quick":
                raw_server.reply(caller, frame.seq, "quick")
                continue
            sender = 77 if odd == "forged" else raw_server.node_id
            seq = 1 if odd == "of another call" else frame.seq
            name = wire_name("other" if odd == "of another channel" else SERVICE)
            kind = Kind.DATA if odd == "of another kind" else Kind.REPLY
            flags = Flag.DETACHED if odd == "lacks a part" else 0
            part = encode(name, kind, b"\x91\x01", flags=flags, sender=sender, seq=seq)
            parts = [part[:20] if odd == "cut" else part]
            raw_server.socket.send_multipart([caller, *parts])
            raw_server.reply(caller, frame.seq, "right")
            return

    serving = threading.Thread(target=serve)
    serving.start()
    make_brisk(client)
    assert client.request("last", timeout=5.0) == "right"
    serving.join(5)
    assert core_of(client).counters.dropped == {counted: 1}
    assert nothing_left(client)


def test_threads_that_meet_at_a_client_do_not_wait_for_each_others_answers(net: Net) -> None:
    client = (net.serve(echo), net.client())[1]
    make_brisk(client)
    core = core_of(client)
    with core.link.lock, calls(lambda: client.request("x", timeout=5.0)) as results:
        until(lambda: core.exchange is None)
        core.link.lock.release()
        until(lambda: results == ["x"])
        core.link.lock.acquire()
    met_at = core.link.met_at
    while time.monotonic() - met_at < moment.CALM_S / 2:
        assert client.request("y", timeout=5.0) == "y"
        assert core.exchange is None


def test_the_main_thread_waits_so_only_where_no_signal_handler_could_wait_in_it() -> None:
    assert moment.may_hold()
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        assert not moment.may_hold()
        elsewhere: list[bool] = []
        thread = threading.Thread(target=lambda: elsewhere.append(moment.may_hold()))
        thread.start()
        thread.join()
        assert elsewhere == [True]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert moment.may_hold()


def test_what_allows_it_is_looked_at_again(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.sockets.calls.MOMENT_MS", 5000)  # however slow the machine is
    client = (net.serve(echo), net.client())[1]
    make_brisk(client)
    looks: list[None] = []

    def may_hold() -> bool:
        looks.append(None)
        return len(looks) < 3

    monkeypatch.setattr("mesh.sockets.exchange.may_hold", may_hold)
    monkeypatch.setattr("mesh.sockets.calls.may_hold", lambda: False)

    def no_longer() -> bool:
        client.request("x", timeout=5.0)
        return core_of(client).exchange is None

    until(no_longer)
    assert len(looks) == 3


# -- A server's thread that reads on -----------------------------------------------------------


def test_a_quick_caller_does_not_keep_a_server_from_those_who_come_another_way(net: Net) -> None:
    """By its socket for this host and by that for others: it waits at one of the two only."""
    server = net.serve(echo, **NETWORKED)
    quick, other = net.client("ipc"), net.client("tcp")
    other.request("first", timeout=10.0)
    over = threading.Event()
    quick_calls = 0

    def go_on() -> None:
        nonlocal quick_calls
        while not over.is_set():
            quick.request("quick", timeout=10.0)
            quick_calls += 1

    with calls(go_on):
        until(lambda: server.came_alone)
        before = quick_calls
        for number in range(20):
            assert other.request(number, timeout=10.0) == number
        meanwhile = quick_calls - before
        over.set()
    assert meanwhile < 20 * 100


def test_what_else_comes_to_a_brisk_server_is_treated_as_ever(net: Net) -> None:
    server = net.serve(echo)
    caller = RawCaller(server)
    try:
        seq = 0
        for odd in ("garbage", "other kind", "parts", "expired", "cancel", "large"):
            for _ in range(1000):
                seq += 1
                caller.send(seq)
                assert caller.result(seq) is None
                if server.came_alone:
                    break
            assert server.came_alone
            seq += 1
            match odd:
                case "garbage":
                    caller.socket.send(b"noise")
                case "other kind":
                    caller.send(seq, kind=Kind.REPLY)
                case "parts":
                    name, kind, end = wire_name(SERVICE), Kind.REQUEST, FOR_EVER
                    part = encode(name, kind, b"\x91\xc0", sender=7, seq=seq, remaining=end)
                    caller.socket.send_multipart([part, b"x"])
                case "expired":
                    caller.send(seq, remaining=0)
                    assert caller.error(seq)[0] == "expired"
                case "cancel":
                    caller.send(seq, kind=Kind.CANCEL)
                case "large":
                    caller.send(seq, "x" * 100_000)
                    assert caller.result(seq) == "x" * 100_000
            caller.send(seq + 1)
            assert caller.result(seq + 1) is None
            seq += 1
    finally:
        caller.close()
    assert server.counters.dropped == {"malformed": 3, "expired": 1}
    assert (server.running, server.waiting) == (0, 0)


def test_a_brisk_server_is_closed_at_once(net: Net) -> None:
    server, client = net.serve(echo), net.client()
    make_brisk(client, server)
    server.close(1000)
    until(lambda: server.link.closed, timeout=1)
    with pytest.raises((Timeout, Busy, PeerLost)):
        client.request("x", timeout=0.05)


def test_a_burst_is_answered_in_its_order(net: Net) -> None:
    server = net.serve(echo)
    caller = RawCaller(server)
    try:
        for seq in range(1, 51):
            caller.send(seq, seq)
        assert [caller.result(seq) for seq in range(1, 51)] == list(range(1, 51))
    finally:
        caller.close()


# -- A deputy ----------------------------------------------------------------------------------


def test_a_quick_handler_needs_no_other_thread_to_read(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read = Threads._read

    def noting(threads: Threads, started: int) -> None:
        reads.append(started)
        read(threads, started)

    monkeypatch.setattr(Threads, "_read", noting)
    monkeypatch.setattr(server_threads, "NAP_S", 0.2)
    client = (net.serve(echo), net.client())[1]
    for i in range(100):
        assert client.request(i, timeout=5.0) == i
    assert not reads


def test_a_deputy_that_sleeps_is_woken_for_a_handler_that_takes_long(net: Net, gate: Gate) -> None:
    def handler(payload: Any) -> Any:
        return payload if payload == "quick" else gate(payload)

    server, client = net.serve(handler, backlog=0), net.client()
    threads = server._runner
    assert isinstance(threads, Threads)
    for _ in range(2):
        assert client.request("quick", timeout=5.0) == "quick"
        until(lambda: threads._parked, "a pause")
    with calls(lambda: client.request("held", timeout=10.0)) as results:
        until(lambda: gate.started)
        with pytest.raises(Busy):
            client.request("too much", timeout=5.0)
        gate.open()
    assert results == ["held"]
    until(lambda: threads._parked and threads.waiter is None, "the handler's end")


def test_a_brisk_server_has_a_deputy_when_its_handler_takes_long(net: Net, gate: Gate) -> None:
    def handler(payload: Any) -> Any:
        return payload if payload == "quick" else gate(payload)

    server, client = net.serve(handler, backlog=0), net.client()
    make_brisk(client, server)
    with calls(lambda: client.request("held", timeout=10.0)) as results:
        until(lambda: gate.started)
        with pytest.raises(Busy):
            client.request("too much", timeout=5.0)
        gate.open()
    assert results == ["held"]


def test_a_forked_child_is_refused_at_once_on_the_shorter_way_too(net: Net) -> None:
    client = (net.serve(echo), net.client())[1]
    make_brisk(client)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            core_of(client).link.abandon()  # as the node does in a child
            client.request("x", timeout=5.0)
        except Forked:
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert client.request("y", timeout=5.0) == "y"
