"""Services and whoever else speaks on their sockets: plain ZeroMQ programs, and hostile ones."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

import pytest

from mesh.errors import Closed, RemoteError, Timeout
from mesh.sockets.calls import Call
from mesh.sockets.frame import FOR_EVER, Codec, Flag, Kind, encode, wire_name
from mesh.sockets.parts import has_input
from mesh.sockets.server import Request
from mesh.sockets.transport import Transport
from tests.support.services import (
    SERVICE,
    Gate,
    Held,
    Net,
    RawCaller,
    RawServer,
    calls,
    core_of,
    nothing_left,
)
from tests.support.waiting import until


def echo(payload: Any) -> Any:
    return payload


NAME = wire_name(SERVICE)


def headed(seq: int, body: bytes, *, kind: int = Kind.REQUEST, **fields: Any) -> bytes:
    return encode(NAME, kind, body, sender=7, seq=seq, remaining=FOR_EVER, **fields)


GARBAGE: dict[str, list[bytes]] = {
    "nothing": [b""],
    "noise": [b"\xff" * 100],
    "only a name": [NAME],
    "another version": [NAME + b"\x02" + headed(1, b"")[len(NAME) + 1 :]],
    "another channel": [encode(b"/other\0", Kind.REQUEST, b"\x91\x01", sender=7, seq=1)],
    "a kind that is no request": [headed(1, b"\x91\x01", kind=Kind.REPLY)],
    "two payloads": [headed(1, b"\x92\x01\x02", count=2)],
    "too many parts": [headed(1, b"\x91\x01")] + [b"part"] * 5,
    "a part that is not announced": [headed(1, b"\x91\x01"), b"part"],
    "a part that is missing": [headed(1, b"", flags=Flag.DETACHED, codec=Codec.RAW)],
}


@pytest.mark.parametrize("handler", [echo, None], ids=["def", "async"])
@pytest.mark.parametrize("parts", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_dropped_and_counted_and_the_service_goes_on(
    net: Net, parts: list[bytes], handler: Any
) -> None:
    async def aecho(payload: Any) -> Any:
        return payload

    server = net.serve(handler or aecho)
    caller = RawCaller(server)
    try:
        caller.socket.send_multipart(parts)
        caller.send(2, "after it")
        assert caller.result(2) == "after it"
    finally:
        caller.close()
    assert sum(server.counters.dropped.values()) == 1
    assert server.counters.received == 1


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", b"\x91", b"\x91\x01trailing", b"\x92\x01\x02", b"\xdd\xff\xff\xff\xff", b"\x01"],
)
def test_a_payload_that_cannot_be_decoded_is_answered_with_an_error(net: Net, body: bytes) -> None:
    gate = Gate()
    server = net.serve(gate)
    caller = RawCaller(server)
    try:
        caller.socket.send(headed(1, body))
        code, error = caller.error(1)
    finally:
        caller.close()
    assert (code, error.type) == ("payload", "Malformed")
    assert server.counters.dropped == {"malformed": 1}
    assert not gate.started
    assert server.running == 0


def test_a_result_that_cannot_be_sent_is_told_apart_from_what_the_handler_raised(net: Net) -> None:
    net.serve(lambda payload: object())
    caller = RawCaller(net.servers[0])
    try:
        caller.send(1)
        code, error = caller.error(1)
    finally:
        caller.close()
    assert (code, error.type) == ("payload", "NotSerializable")


@pytest.mark.slow
def test_a_caller_gets_all_answers_however_late_it_reads_them(net: Net) -> None:
    """As long as it has no more requests outstanding than a client may."""
    server = net.serve(echo, backlog=5000)
    caller = RawCaller(server)
    payload = "x" * 1000
    try:
        for seq in range(1, 5001):
            caller.send(seq, payload)
        until(lambda: server.counters.received == 5000 and not server.running + server.waiting)
        assert [caller.result(seq) for seq in range(1, 5001)] == [payload] * 5000
    finally:
        caller.close()
    assert not server.counters.dropped


def test_a_plain_zeromq_program_can_call(net: Net) -> None:
    net.serve(lambda payload: sum(payload))
    caller = RawCaller(net.servers[0])
    try:
        for seq in range(1, 20):
            caller.send(seq, [seq, 1])
        assert [caller.result(seq) for seq in range(1, 20)] == [seq + 1 for seq in range(1, 20)]
        caller.send(20, "no numbers")
        code, error = caller.error(20)
        assert (code, error.type) == ("remote", "TypeError")
        caller.send(21, [1], remaining=0)
        assert caller.error(21)[0] == "expired"
    finally:
        caller.close()


def test_every_request_is_answered_once_by_a_result_or_an_error(net: Net) -> None:
    gate = Gate()
    server = net.serve(gate, backlog=2)
    caller = RawCaller(server)
    try:
        caller.send(1)
        until(lambda: server.running == 1)
        caller.send(2)
        caller.send(2)  # repeated while it waits: dropped
        caller.send(3)
        caller.send(4)
        assert caller.error(4)[0] == "busy"
        caller.send(2, kind=Kind.CANCEL)
        assert caller.error(2)[0] == "cancelled"
        caller.send(1, kind=Kind.CANCEL)  # it runs
        caller.send(9, kind=Kind.CANCEL)  # there is none
        gate.open()
        assert caller.result(1) is None
        assert caller.result(3) is None
        caller.send(5)
        assert caller.result(5) is None
    finally:
        caller.close()
    assert server.counters.dropped == {"busy": 1, "cancelled": 1, "repeated request": 1}


def test_a_request_that_comes_while_another_is_turned_away_is_not_overlooked(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After all had been read; and sending swallows what the descriptor would say about it."""
    held = Held()
    server = net.serve(held)
    caller = RawCaller(server)
    turn_away = server._turn_away

    def late(request: Request, code: str) -> None:
        caller.send(3)
        until(partial(has_input, server._bound[0].socket))
        turn_away(request, code)

    try:
        caller.send(1)
        until(lambda: held.started)
        caller.send(2, remaining=1)
        until(lambda: server.waiting)
        (waiting,) = server._backlog._waiting.values()
        until(lambda: time.monotonic() >= waiting.expires)
        monkeypatch.setattr(server, "_turn_away", late)
        held.go_on()
        assert caller.result(1) is None
        assert caller.error(2)[0] == "expired"
        until(lambda: len(held.started) == 2)
        held.go_on()
        assert caller.result(3) is None
    finally:
        caller.close()


def test_a_caller_that_left_is_counted(net: Net) -> None:
    gate = Gate()
    server = net.serve(gate)
    caller = RawCaller(server)
    caller.send(1, "x")
    until(lambda: gate.started)
    caller.close()
    with calls(lambda: net.client().request("y", timeout=10)) as results:
        until(lambda: server.waiting == 1)
        # The next request was sent after the other caller's end: so that has been noticed too.
        gate.open()
    assert results == ["y"]
    until(lambda: server.counters.dropped["caller gone"] == 1)


@pytest.mark.slow
def test_a_caller_that_never_reads_does_not_hold_up_the_others(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind = Transport.bind
    monkeypatch.setattr(Transport, "bind", lambda *args, hwm: bind(*args, hwm=100))
    large = bytes(60_000)
    server = net.serve(lambda payload: payload or large, backlog=1000)
    caller = RawCaller(server, rcvhwm=10)
    try:
        for seq in range(1, 1000):
            caller.send(seq)
        assert net.client().request("other", timeout=10) == "other"
        until(lambda: server.counters.dropped["caller full"] > 0)
        assert net.client().request("other", timeout=10) == "other"
    finally:
        caller.close()


@pytest.mark.slow
def test_a_flood_of_parts_does_not_stop_the_service(net: Net) -> None:
    server, client = net.serve(echo), net.client()
    caller = RawCaller(server)
    try:
        for _ in range(200):
            caller.socket.send_multipart([b"x"] * 500)
            assert client.request(1, timeout=10) == 1
        until(lambda: server.counters.dropped["malformed"] == 200)
    finally:
        caller.close()


@pytest.mark.slow
def test_a_flood_of_garbage_does_not_stop_the_service(net: Net) -> None:
    server, client = net.serve(echo), net.client()
    caller = RawCaller(server)
    try:
        for _ in range(5000):
            caller.socket.send(b"noise")
        assert client.request(1, timeout=10) == 1
        until(lambda: server.counters.dropped["malformed"] == 5000)
    finally:
        caller.close()


# -- What a client is answered -----------------------------------------------------------------


def test_answers_nobody_asked_for_are_dropped_and_counted(net: Net, raw_server: RawServer) -> None:
    """Of an unknown request, from another server than has it, of another node, or channel."""
    other = RawServer(net, node_id=51)
    client = net.client()
    dropped = core_of(client).counters.dropped
    try:
        raw_server.attach(client)
        with calls(lambda: client.request("x", timeout=10)) as results:
            caller, frame = raw_server.recv()
            other.attach(client)
            with calls(lambda: client.request("y", timeout=10)) as others:
                other_caller, other_frame = other.recv()
                other.reply(other_caller, frame.seq, "forged")
                other.reply(other_caller, 999, "unknown")
                raw_server.reply(caller, frame.seq, "forged", sender=77)
                raw_server.reply(caller, frame.seq, "forged", name="other")
                raw_server.reply(caller, frame.seq, "forged", kind=Kind.DATA)
                raw_server.socket.send_multipart([caller, b"noise"])
                raw_server.socket.send_multipart([caller, b"noise", b"more", b"parts"])
                until(lambda: dropped == {"unexpected reply": 2, "malformed": 7}, str(dropped))
                other.reply(other_caller, other_frame.seq, "right too")
            raw_server.reply(caller, frame.seq, "right")
            raw_server.reply(caller, frame.seq, "twice")
        assert (results, others) == (["right"], ["right too"])

        def noticed() -> bool:
            core_of(client).tick()
            return dropped["unexpected reply"] == 3

        until(noticed)
    finally:
        other.close()


def test_an_answer_that_comes_as_its_caller_gives_up_is_counted(
    net: Net, raw_server: RawServer
) -> None:
    client = net.client()
    core = core_of(client)
    raw_server.attach(client)
    call = Call(core, b"\x91\xa1x", 1, False)
    with core.link:
        core.begin(call)
    caller, frame = raw_server.recv()
    raw_server.reply(caller, frame.seq, "too late")
    with core.link:
        until(core.link.readable)
    core.tick()
    core.abandon(call)
    assert core.counters.dropped == {"late reply": 1}
    assert nothing_left(client)


def test_a_closing_client_tells_its_callers_that_it_is_closed_and_nothing_else(
    net: Net, raw_server: RawServer
) -> None:
    """Its servers are told to forget the requests, and what they answer to that is no outcome."""
    client = net.client()
    raw_server.attach(client)
    with calls(lambda: client.request("x", timeout=10)) as outcomes:
        _, request = raw_server.recv()
        client.close()
    assert isinstance(outcomes[0], Closed)
    _, cancel = raw_server.recv()
    assert (cancel.kind, cancel.seq) == (Kind.CANCEL, request.seq)


def test_an_answer_that_cannot_be_decoded_is_an_error_at_once(
    net: Net, raw_server: RawServer
) -> None:
    client = net.client()
    raw_server.attach(client)
    for kind in (Kind.REPLY, Kind.ERROR):
        with calls(lambda: client.request("x", timeout=10)) as outcomes:
            caller, frame = raw_server.recv()
            broken = encode(NAME, kind, b"\xc1", sender=raw_server.node_id, seq=frame.seq)
            raw_server.socket.send_multipart([caller, broken])
        assert isinstance(outcomes[0], RemoteError)
        assert outcomes[0].type == "Malformed"
        assert "server 0000000000000032 of 'add' cannot be decoded" in outcomes[0].text
    assert core_of(client).counters.dropped == {"malformed": 2}
    assert nothing_left(client)


def test_remaining_time_travels_with_the_request(net: Net, raw_server: RawServer) -> None:
    client = net.client()
    with calls(lambda: client.request("x", timeout=5)) as results:
        until(lambda: core_of(client).table.waiting)
        raw_server.attach(client)
        caller, frame = raw_server.recv()
        assert 1000 < frame.remaining <= 5000
        raw_server.reply(caller, frame.seq, "x")
    assert results == ["x"]
    with calls(lambda: client.request("y", timeout=None)):
        caller, frame = raw_server.recv()
        assert frame.remaining == FOR_EVER
        raw_server.reply(caller, frame.seq, "y")


def test_expired_is_a_timeout(net: Net, raw_server: RawServer) -> None:
    client = net.client()
    raw_server.attach(client)
    with calls(lambda: client.request("x", timeout=10)) as outcomes:
        caller, frame = raw_server.recv()
        error = ["expired", "", "", ""]
        raw_server.reply(caller, frame.seq, error, kind=Kind.ERROR)
    assert isinstance(outcomes[0], Timeout)
    assert str(outcomes[0]) == "no answer of service 'add': the request was not started"


def test_a_caller_that_gives_up_tells_the_server(net: Net, raw_server: RawServer) -> None:
    client = net.client()
    raw_server.attach(client)

    async def run() -> None:
        with pytest.raises(Timeout):
            await client.arequest("x", timeout=0.02)

    asyncio.run(run())
    _, request = raw_server.recv()
    _, cancel = raw_server.recv()
    assert (request.kind, cancel.kind) == (Kind.REQUEST, Kind.CANCEL)
    assert cancel.seq == request.seq
    assert cancel.body == b""
