"""Connections that are lost though the peer lives, offers that lead nowhere, servers that are held
up: every call has its outcome, the others go on, and nothing is left behind."""

from __future__ import annotations

import socket as kernel
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from mesh.errors import PeerLost, Timeout
from mesh.sockets import transport
from mesh.sockets.calls import Call
from mesh.sockets.client import Client
from mesh.sockets.connections import Accepted
from mesh.sockets.control import Offer
from mesh.sockets.frame import Frame, Kind, decode
from tests.support.homes import Homes
from tests.support.services import (
    CALLING,
    KEY,
    SERVICE,
    Gate,
    Net,
    RawServer,
    calls,
    core_of,
    debts,
    nothing_left,
)
from tests.support.waiting import until


def echo(payload: Any) -> Any:
    return payload


def ticking(client: Client, condition: Callable[[], object]) -> Callable[[], object]:
    """Do what the control thread does, while waiting for `condition`."""

    def attempt() -> object:
        core_of(client).tick()
        return condition()

    return attempt


# -- A connection that is lost while the peer lives ----------------------------------------------


def test_a_lost_connection_fails_what_was_under_way_and_later_calls_work(
    net: Net, raw_server: RawServer
) -> None:
    client = net.client()
    raw_server.attach(client)
    with pytest.raises(Timeout):
        client.request("given up", timeout=0.02)
    assert debts(client) == 1
    with calls(
        lambda: client.request("once", timeout=20),
        lambda: client.request("again", timeout=20, retry=True),
    ) as outcomes:
        until(lambda: debts(client) == 3)
        _read_and_cut(raw_server, requests=3)
        until(ticking(client, lambda: outcomes[0] is not None))
        caller, frame = raw_server.recv()
        assert not raw_server.socket.poll(0), "the other is not sent again"
        raw_server.reply(caller, frame.seq, "answer")
    assert isinstance(outcomes[0], PeerLost)
    assert str(outcomes[0]) == (
        "server 0000000000000032 of 'add' lost its connection; whether the request ran is not known"
    )
    assert outcomes[1] == "answer"
    assert debts(client) == 0, "of what was given up before no answer is expected any more"
    with calls(lambda: client.request("later", timeout=20)) as results:
        caller, frame = raw_server.recv()
        raw_server.reply(caller, frame.seq, "later")
    assert results == ["later"]
    assert client.servers == 1
    assert core_of(client).counters.dropped == {"connection lost": 1}
    assert nothing_left(client)


def test_what_waits_on_other_servers_does_not_notice(net: Net, raw_server: RawServer) -> None:
    gate = Gate()
    net.serve(gate)
    client = net.client()
    with calls(lambda: client.request("kept", timeout=20)) as kept:
        until(lambda: gate.started)
        raw_server.attach(client)
        with calls(lambda: client.request("lost", timeout=20)) as lost:
            until(lambda: debts(client) == 2)
            _read_and_cut(raw_server, requests=1)
            until(ticking(client, lambda: lost[0] is not None))
        assert isinstance(lost[0], PeerLost)
        gate.open()
    assert kept == ["kept"]


def test_an_answer_that_came_before_the_connection_was_lost_counts(
    net: Net, raw_server: RawServer
) -> None:
    """The caller is late in reading it."""
    client = net.client()
    core = core_of(client)
    raw_server.attach(client)
    call = Call(core, b"\x91\xa1x", 20, False)
    with core.link:
        core.begin(call)
    caller, frame, connection = _recv_by(raw_server)
    raw_server.reply(caller, frame.seq, "in time")
    with core.link:
        until(core.link.readable)
    assert connection.cut()
    until(ticking(client, lambda: core.counters.dropped["connection lost"]))
    assert core.result(call) == "in time"


def test_a_reply_over_the_callers_limit_is_a_lost_connection(homes: Homes) -> None:
    """libzmq drops the connection without a word, and does not dial again."""
    net = Net(homes)
    net.calling = homes.make(CALLING, message_bytes_max=1024)
    try:
        net.serve(lambda length: "x" * length)
        client = net.client()
        with calls(lambda: client.request(200_000, timeout=20)) as outcomes:
            until(ticking(client, lambda: outcomes[0] is not None))
        assert isinstance(outcomes[0], PeerLost)
        assert client.request(3, timeout=5) == "xxx"
        assert nothing_left(client)
    finally:
        net.close()


def _recv_by(server: RawServer) -> tuple[bytes, Frame, Accepted]:
    """The next frame, whom to answer, and the connection it came by."""
    assert server.socket.poll(5000), "no request came"
    caller, *parts = server.socket.recv_multipart(copy=False)
    return caller.bytes, decode([part.bytes for part in parts]), Accepted.of(parts[0])


def _read_and_cut(server: RawServer, *, requests: int) -> None:
    """Cut the connection once so many requests have come by it."""
    while requests:
        _, frame, connection = _recv_by(server)
        requests -= frame.kind == Kind.REQUEST
    assert connection.cut()


# -- Offers that lead nowhere --------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["ipc:///" + "a" * 150, "tcp://127.0.0.1:none"])
def test_a_server_whose_endpoint_is_refused_keeps_no_request_from_the_others(
    net: Net, endpoint: str
) -> None:
    net.serve(echo)
    client = net.client()
    core_of(client).attach(77, Offer(KEY, "serve", SERVICE), endpoint)
    assert client.servers == 1
    assert core_of(client).counters.dropped == {"offer out of reach": 1}
    assert [client.request(i, timeout=5) for i in range(4)] == list(range(4))
    core_of(client).detach(77, KEY, "withdrawn")
    client.close()
    net.calling.transport.close()  # which would wait for a socket that was left open


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_server_for_whom_there_is_no_socket_keeps_no_request_from_the_others(
    homes: Homes, left: int
) -> None:
    """A connection takes three, of which one after the other may be the one too many."""
    net = Net(homes)
    net.calling.transport.context.set(zmq.MAX_SOCKETS, 3 + left)
    try:
        for _ in range(2):
            net.serve(echo)
        client = net.client()
        assert client.servers == 1
        assert core_of(client).counters.dropped == {"offer out of reach": 1}
        assert [client.request(i, timeout=5) for i in range(4)] == list(range(4))
        net.detach(client, net.servers[0])
        until(_attached(net, client))
        assert client.request("from the other", timeout=5) == "from the other"
        client.close()
        net.calling.transport.close()
    finally:
        net.close()


def _attached(net: Net, client: Client) -> Callable[[], bool]:
    """Try again to attach the second server: closed sockets give their places up a little later."""

    def attempt() -> bool:
        net.attach(client, net.servers[1])
        return client.servers == 1

    return attempt


# -- Servers that are held up, or full -----------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_was_stopped_during_the_handshake_answers_once_it_goes_on(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel accepts for it, and nobody answers: no connection came about, so none was lost."""
    monkeypatch.setattr(transport, "_HANDSHAKE_MS", 50)
    client = net.client()
    server = RawServer(net, listening=False)
    path = server.endpoint.removeprefix("ipc://")
    with kernel.socket(kernel.AF_UNIX) as stopped:
        stopped.bind(path)
        stopped.listen()
        stopped.settimeout(5)
        server.attach(client)
        with calls(lambda: client.request("patient", timeout=20)) as results:
            for _ in range(2):
                stopped.accept()[0].close()
                core_of(client).tick()
            Path(path).unlink()
            server.listen()
            caller, frame = server.recv()
            core_of(client).tick()
            server.reply(caller, frame.seq, "at last")
    server.close()
    assert results == ["at last"]
    assert not core_of(client).counters.dropped


def test_a_retried_request_goes_to_a_server_that_had_turned_it_away(net: Net) -> None:
    """It was full then, and is idle now; the one that took the request is gone."""
    full, other = Gate(), Gate()
    first = net.serve(full, backlog=0)
    blocking = net.client()
    try:
        with calls(lambda: blocking.request("blocks", timeout=20)):
            until(lambda: first.running)
            second = net.serve(other, backlog=0)
            client = net.client()
            net.detach(client, first)
            net.attach(client, first)  # who comes last is asked first
            with calls(lambda: client.request("again", timeout=20, retry=True)) as outcomes:
                until(lambda: second.running)
                assert first.counters.dropped == {"busy": 1}
                full.open()
                until(lambda: not first.running)
                net.detach(client, second)
            assert outcomes == ["again"]
    finally:
        full.open()
        other.open()
