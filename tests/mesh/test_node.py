"""Whole nodes on one machine: finding, all three kinds of channel, what a node tells of itself."""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
import time
import warnings

import pytest

from mesh import (
    Closed,
    InvalidName,
    InvalidOption,
    Node,
    OptionsDiffer,
    PeerEvent,
    RemoteError,
    Timeout,
)
from mesh.durable.appending import Appending
from mesh.durable.consumer import Consumer
from mesh.durable.replay import Replay
from mesh.durable.stream import Stream
from mesh.sockets.client import Client
from mesh.sockets.publisher import Publisher
from mesh.sockets.puller import Puller
from mesh.sockets.pusher import Pusher
from mesh.sockets.subscriber import Subscriber
from tests.support.waiting import until


def test_two_nodes_with_nothing_but_a_name_find_each_other(pair: tuple[Node, Node]) -> None:
    a, b = pair
    assert [(i, peer.name) for i, peer in a.peers.items()] == [(b.id, "b")]
    peer = b.peers[a.id]
    assert (peer.name, peer.transport, peer.same_host) == ("a", "ipc", True)
    assert peer.address.startswith("ipc://")


def test_a_topic_between_nodes(pair: tuple[Node, Node]) -> None:
    a, b = pair
    publisher = a.publisher("sensors/kitchen")
    subscriber = b.subscriber("sensors/*")
    publisher.wait_for(1, timeout=5)
    publisher.send({"t": 20.5}, headers={"unit": "C"})
    message = subscriber.recv(timeout=5)
    assert (message.payload, message.sender, message.seq) == ({"t": 20.5}, a.id, 1)
    assert message.headers == {"unit": "C"}


def test_a_queue_between_nodes(pair: tuple[Node, Node]) -> None:
    a, b = pair
    pusher, puller = a.pusher("jobs"), b.puller("jobs")
    pusher.send("one", timeout=5)
    assert puller.recv(timeout=5).payload == "one"
    assert pusher.workers == 1


def test_a_service_between_nodes(pair: tuple[Node, Node]) -> None:
    a, b = pair

    @b.service("divide")
    def divide(request: list[int]) -> float:
        return request[0] / request[1]

    client = a.client("divide")
    assert client.request([6, 3], timeout=5) == 2
    with pytest.raises(RemoteError, match="ZeroDivisionError: division by zero") as caught:
        client.request([1, 0], timeout=5)
    assert "in divide" in caught.value.traceback
    assert divide([8, 2]) == 4, "the decorator returns the function as it was"


def test_a_node_hears_itself() -> None:
    with Node("alone") as node:
        publisher, subscriber = node.publisher("a"), node.subscriber("**")
        publisher.wait_for(1, timeout=5)
        publisher.send(1)
        assert subscriber.recv(timeout=5).payload == 1
        pusher, puller = node.pusher("q"), node.puller("q")
        pusher.send(2, timeout=5)
        assert puller.recv(timeout=5).payload == 2
        node.service("s")(lambda request: request + 1)
        assert node.client("s").request(2, timeout=5) == 3


def test_everything_in_asyncio() -> None:
    async def run() -> None:
        async with Node("a") as a, Node("b") as b:
            await asyncio.gather(a.await_for_peers(1, timeout=5), b.await_for_peers(1, timeout=5))
            async with a.publisher("t") as publisher, b.subscriber("t") as subscriber:
                await publisher.await_for(1, timeout=5)
                await publisher.asend(1)
                async for message in subscriber:
                    assert message.payload == 1
                    break
            async with a.pusher("q") as pusher, b.puller("q") as puller:
                await pusher.asend(2, timeout=5)
                assert (await puller.arecv(timeout=5)).payload == 2

            loop = asyncio.get_running_loop()

            @b.service("s")
            async def s(request: int) -> bool:
                return asyncio.get_running_loop() is loop

            async with a.client("s") as client:
                assert await client.arequest(0, timeout=5) is True

    asyncio.run(run())


def test_waiting_for_peers_that_never_come_says_how_many_there_are() -> None:
    with Node("a") as node:
        with pytest.raises(Timeout, match=r"no 2 peers within 0\.02 s, only 0"):
            node.wait_for_peers(2, timeout=0.02)
        with pytest.raises(Timeout, match=r"no 2 peers within 0\.02 s, only 0"):
            asyncio.run(node.await_for_peers(2, timeout=0.02))


def test_hooks_tell_who_comes_and_who_goes() -> None:
    events: queue.Queue[PeerEvent] = queue.Queue()
    with Node("a") as a:
        a.on_peer(events.put)
        with Node("b") as b:
            joined = events.get(timeout=5)
            assert (joined.kind, joined.peer.id, joined.peer.name) == ("joined", b.id, "b")
        left = events.get(timeout=5)
        assert (left.kind, left.peer.id, left.reason) == ("left", b.id, "bye")
        until(lambda: not a.peers)


def test_a_hook_that_comes_late_is_told_who_is_here_already(pair: tuple[Node, Node]) -> None:
    a, b = pair
    events: queue.Queue[PeerEvent] = queue.Queue()
    a.on_peer(events.put)
    joined = events.get(timeout=5)
    assert (joined.kind, joined.peer, joined.reason) == ("joined", a.peers[b.id], "")
    b.close()
    assert events.get(timeout=5).kind == "left"
    assert events.empty()


def test_a_hook_that_raises_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    events: queue.Queue[PeerEvent] = queue.Queue()
    with Node("a") as a:
        a.on_peer(lambda event: 1 / 0)
        a.on_peer(events.put)
        with Node("b"):
            assert events.get(timeout=5).kind == "joined"
    assert "a hook of node 'a' raised" in caplog.text


def test_statistics_are_an_immutable_snapshot(pair: tuple[Node, Node]) -> None:
    a, b = pair
    publisher, subscriber = a.publisher("t"), b.subscriber("t")
    publisher.wait_for(1, timeout=5)
    publisher.send_many(range(10))
    for _ in range(10):
        subscriber.recv(timeout=5)
    sent, received = a.stats(), b.stats()
    assert sent.sent["topic"] == 10
    assert received.received["topic"] == 10
    assert sent.bytes_sent > 10
    assert received.lost == 0
    assert sent.peers == 1
    until(lambda: a.stats().round_trip_s, "the round trip of a ping")
    assert 0 < a.stats().round_trip_s[b.id] < 5
    assert sent.round_trip_s.get(b.id, 1) > 0
    with pytest.raises(TypeError):
        sent.sent["topic"] = 0  # type: ignore[index]
    with pytest.raises(AttributeError):
        sent.lost = 5  # type: ignore[misc]
    subscriber.close()
    until(lambda: b.stats().received["topic"] == 10, "the count of a closed handle")


def test_nodes_of_different_realms_never_meet() -> None:
    with Node("a", realm="one") as a, Node("b", realm="two"), Node("c", realm="one") as c:
        a.wait_for_peers(1, timeout=5)
        c.wait_for_peers(1, timeout=5)
        assert set(a.peers) == {c.id}


@pytest.mark.parametrize("name", ["", "a//b", "/a", "a/", "a*", "x" * 256, "a\0b", "a/" * 40 + "a"])
def test_malformed_channel_names_are_refused_everywhere(name: str) -> None:
    with Node("a") as node:
        for make in (node.publisher, node.pusher, node.puller, node.client, node.subscriber):
            with pytest.raises(InvalidName):
                make(name)
        with pytest.raises(InvalidName):
            node.service(name)(lambda request: None)


def test_bad_options_are_refused() -> None:
    for options in (
        {"secret": "short"},
        {"heartbeat_s": 0},
        {"buffer_messages": 0},
        {"port": 70_000},
        {"seeds": ["1.2.3.4:1"]},
        {"discovery": ["mdns"]},
        {"discovery": ["carrier pigeon"]},
        {"seeds": "1.2.3.4:1", "secret": "x" * 20},
        {"secret": "x" * 20, "insecure_lan": True},
        {"durable": ""},
    ):
        with pytest.raises(InvalidOption):
            Node("a", **options)
    for name in ("", "x" * 64, "a\n"):
        with pytest.raises(InvalidName):
            Node(name)
    with Node("a") as node:
        with pytest.raises(InvalidOption, match="prefetch must be an integer from 1 to"):
            node.puller("q", prefetch=0)
        with pytest.raises(InvalidOption, match="when_full"):
            node.publisher("t", when_full="explode")  # type: ignore[arg-type]
        node.publisher("t", keep_last=True).close()
        held = node.publisher("t", keep_last=True)
        for differing in ({}, {"keep_last": True, "when_full": "wait"}):
            with pytest.raises(OptionsDiffer):
                node.publisher("t", **differing)  # type: ignore[arg-type]
        held.close()
        with pytest.raises(InvalidOption, match="timeout"):
            node.subscriber("t").recv(timeout=-1)


def test_the_environment_names_realm_and_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_REALM", "from-the-environment")
    with Node("a") as a, Node("b", realm="from-the-environment") as b:
        b.wait_for_peers(1, timeout=5)
        assert set(b.peers) == {a.id}


def test_plain_text_on_a_network_warns() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Node("a", insecure_lan=True, interfaces=["127.0.0.1"], discovery=["local"]).close()
    assert "plain text" in str(caught[0].message)


HANDLES = [Publisher, Subscriber, Pusher, Puller, Client, Node, Stream, Consumer, Replay, Appending]
SPECIAL_TWINS = {"__enter__": "__aenter__", "__exit__": "__aexit__", "__iter__": "__aiter__"}
WITHOUT_A_TWIN = {
    "wait": "whoever has an Appending awaits it",
    "append_nowait": "tasks of aappend do the same",
    "replay": "it does not block: iterating does",
}


@pytest.mark.parametrize("handle", HANDLES)
def test_twins_have_the_same_arguments(handle: type) -> None:
    twins = {
        name: method
        for name, method in inspect.getmembers(handle, inspect.iscoroutinefunction)
        if not name.startswith("__")
    }
    assert twins or handle in (Replay, Appending)
    for name, method in twins.items():
        blocking = getattr(handle, name.removeprefix("a"))
        ours = list(inspect.signature(method).parameters.values())
        assert ours == list(inspect.signature(blocking).parameters.values()), name


@pytest.mark.parametrize("handle", HANDLES)
def test_whatever_blocks_has_a_twin(handle: type) -> None:
    for name, method in inspect.getmembers(handle, inspect.isfunction):
        if name in SPECIAL_TWINS:
            assert hasattr(handle, SPECIAL_TWINS[name]), name
        if name.startswith("_") or inspect.iscoroutinefunction(method):
            continue
        if "timeout" in inspect.signature(method).parameters and name not in WITHOUT_A_TWIN:
            assert f"a{name}" in dir(handle), f"{name} blocks and has no twin"
    assert not hasattr(handle, "wait") or hasattr(handle, "__await__")


def test_a_handle_that_is_forgotten_is_given_back(pair: tuple[Node, Node]) -> None:
    a, b = pair
    publisher = a.publisher("t")
    b.subscriber("t")  # collected at once
    kept = b.subscriber("t")
    publisher.wait_for(1, timeout=5)
    until(lambda: publisher.subscribers == 1, "the end of the forgotten subscriber")
    kept.close()
    until(lambda: publisher.subscribers == 0)


def test_a_closed_node_refuses_and_everything_it_gave_is_closed() -> None:
    node = Node("a")
    subscriber, puller, client = node.subscriber("t"), node.puller("q"), node.client("s")
    publisher, pusher = node.publisher("t"), node.pusher("q")
    waiting = threading.Thread(target=lambda: list(subscriber))
    waiting.start()
    node.close()
    waiting.join(5)
    assert not waiting.is_alive()
    for call in (
        lambda: publisher.send(1),
        lambda: pusher.send(1, timeout=1),
        lambda: puller.recv(timeout=1),
        lambda: client.request(1, timeout=1),
        lambda: node.publisher("x"),
        lambda: node.subscriber("x"),
        lambda: node.pusher("x"),
        lambda: node.puller("x"),
        lambda: node.client("x"),
        lambda: node.service("x"),
        lambda: node.wait_for_peers(1, timeout=1),
        node.stats,
    ):
        with pytest.raises(Closed):
            call()
    node.close()
    assert node.closed


def test_closing_takes_no_longer_than_its_deadline_also_with_a_full_subscriber() -> None:
    a, b = Node("a", buffer_messages=10), Node("b", buffer_messages=10)
    publisher = a.publisher("t")
    subscriber = b.subscriber("t")  # never reads
    publisher.wait_for(1, timeout=5)
    publisher.send_many(bytes(10_000) for _ in range(1000))
    started = time.monotonic()
    a.close(timeout=0.2)
    assert time.monotonic() - started < 1.5
    assert subscriber.recv(timeout=5).seq == 1
    b.close()
