"""Closed by default, and open only to those who know the secret."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import zmq

from mesh import InvalidOption, Node, Timeout, UnsafeRuntimeDir
from mesh.discovery.source import Announcement, Sighting
from mesh.sockets.curve import derive_keys
from tests.support.waiting import until

SECRET = "correct horse battery staple"
OTHER = "a different secret altogether"
LOOPBACK = {"interfaces": ["127.0.0.1"], "discovery": ["local"]}


def listening_tcp() -> set[tuple[str, int]]:
    """(address, port) of every tcp socket that listens and is owned by this process, as the kernel
    lists them (proc(5)); all network namespaces aside."""
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                found.add((address, int(port, 16)))
    return found


def open_udp() -> int:
    inodes = {os.readlink(f"/proc/self/fd/{fd}")[8:-1] for fd in _fds() if _is_socket(fd)}
    lines = Path("/proc/self/net/udp").read_text().splitlines()[1:]
    lines += Path("/proc/self/net/udp6").read_text().splitlines()[1:]
    return sum(line.split()[9] in inodes for line in lines)


def _fds() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


def _is_socket(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}") and os.readlink(f"/proc/self/fd/{fd}").startswith(
        "socket:["
    )


def use_everything(node: Node) -> None:
    node.publisher("t").send(1)
    node.service("s")(lambda request: request)
    node.puller("q").close()
    node.pusher("q").close()


def test_without_a_secret_nothing_listens_beyond_this_machine() -> None:
    before, udp = listening_tcp(), open_udp()
    with Node("a") as node:
        use_everything(node)
        assert node.client("s").request(1, timeout=5) == 1
        assert listening_tcp() == before
        assert open_udp() == udp


def test_the_socket_table_would_show_a_listener() -> None:
    """The test above can fail: with a network there is something to see."""
    before = listening_tcp()
    with Node("a", secret=SECRET, **LOOPBACK) as node:  # type: ignore[arg-type]
        use_everything(node)
        new = listening_tcp() - before
        assert new
        assert {address for address, _ in new} == {"0100007F"}, "127.0.0.1 and nothing else"


def test_sockets_lie_in_a_directory_that_only_this_user_can_enter() -> None:
    with Node("a"):
        assert os.stat(os.environ["MESH_RUNTIME_DIR"]).st_mode & 0o777 == 0o700


def test_a_directory_that_others_can_enter_is_refused() -> None:
    os.chmod(os.environ["MESH_RUNTIME_DIR"], 0o755)
    with pytest.raises(UnsafeRuntimeDir):
        Node("a")


@pytest.fixture
def members() -> Iterator[tuple[Node, Node]]:
    """Two nodes with the secret that meet over tcp alone."""
    with (
        Node("a", secret=SECRET, interfaces=["127.0.0.1"], discovery=[]) as a,
        Node("b", secret=SECRET, interfaces=["127.0.0.1"], discovery=[], seeds=[address(a)]) as b,
    ):
        a.wait_for_peers(1, timeout=5)
        b.wait_for_peers(1, timeout=5)
        yield a, b


def address(node: Node) -> str:
    endpoint = node._parts._control.endpoints()[-1]
    return endpoint.removeprefix("tcp://")


def test_a_seed_finds_a_member_and_all_three_kinds_go_over_curve(
    members: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = members
    publisher, subscriber = a.publisher("t"), b.subscriber("t")
    publisher.wait_for(1, timeout=5)
    publisher.send("x" * 10_000)
    assert subscriber.recv(timeout=5).payload == "x" * 10_000
    pusher, puller = a.pusher("q"), b.puller("q")
    pusher.send(1, timeout=5)
    assert puller.recv(timeout=5).payload == 1
    b.service("s")(lambda request: request + 1)
    assert a.client("s").request(1, timeout=5) == 2


def test_data_goes_over_tcp_where_ipc_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.assembly._same_host", lambda card: False)
    with (
        Node("a", secret=SECRET, interfaces=["127.0.0.1"], discovery=[]) as a,
        Node("b", secret=SECRET, interfaces=["127.0.0.1"], discovery=[], seeds=[address(a)]) as b,
    ):
        a.wait_for_peers(1, timeout=5)
        assert {peer.transport for peer in a.peers.values()} == {"tcp"}
        publisher, subscriber = a.publisher("t", keep_last=True), b.subscriber("t")
        publisher.wait_for(1, timeout=5)
        publisher.send({"text": "compressible " * 1000})
        assert subscriber.recv(timeout=5).payload == {"text": "compressible " * 1000}
        pusher, puller = a.pusher("q"), b.puller("q")
        pusher.send(bytes(200_000), timeout=5)
        assert puller.recv(timeout=5).payload == bytes(200_000)
        b.service("s")(lambda request: request + 1)
        assert a.client("s").request(1, timeout=5) == 2


def test_one_seed_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, seeds: list[str]) -> Node:
        return Node(name, secret=SECRET, interfaces=["127.0.0.1"], discovery=[], seeds=seeds)

    with make("seed", []) as seed:
        nodes = [make(f"n{i}", [address(seed)]) for i in range(5)]
        try:
            for node in [seed, *nodes]:
                node.wait_for_peers(5, timeout=10)
        finally:
            for node in nodes:
                node.close()


def test_a_node_with_another_secret_gets_nothing_sends_nothing_and_is_listed() -> None:
    with (
        Node("member", secret=SECRET, **LOOPBACK) as member,  # type: ignore[arg-type]
        Node("stranger", secret=OTHER, **LOOPBACK) as stranger,  # type: ignore[arg-type]
    ):
        publisher, subscriber = member.publisher("t"), stranger.subscriber("**")
        client = stranger.client("s")
        member.service("s")(lambda request: request)
        until(lambda: stranger.id in member.untrusted, "the stranger in member.untrusted")
        until(lambda: member.id in stranger.untrusted, "the member in stranger.untrusted")
        assert member.untrusted[stranger.id].name == "stranger"
        publisher.send("secret")
        for wait in (
            lambda: subscriber.recv(timeout=0.1),
            lambda: client.request(1, timeout=0.1),
            lambda: member.wait_for_peers(1, timeout=0.1),
        ):
            with pytest.raises(Timeout):
                wait()
        assert publisher.subscribers == 0


def test_a_node_without_the_secret_is_a_stranger_too() -> None:
    with Node("member", secret=SECRET, **LOOPBACK) as member, Node("open") as open_node:  # type: ignore[arg-type]
        until(lambda: open_node.id in member.untrusted)
        until(lambda: member.id in open_node.untrusted)
        assert not member.peers
        assert not open_node.peers


def test_a_seed_of_another_secret_is_listed_and_not_hammered() -> None:
    with (
        Node("member", secret=SECRET, interfaces=["127.0.0.1"], discovery=[]) as member,
        Node(
            "stranger",
            secret=OTHER,
            interfaces=["127.0.0.1"],
            discovery=[],
            seeds=[address(member)],
        ) as stranger,
    ):
        until(lambda: stranger.untrusted, "the refusal")
        assert f"tcp://{address(member)}" in {u.address for u in stranger.untrusted.values()}
        monitor = member._parts._control._bound[-1].socket.get_monitor_socket(zmq.EVENT_ACCEPTED)
        dials = 0
        end = time.monotonic() + 1.0
        while (left := end - time.monotonic()) > 0:
            if monitor.poll(round(left * 1000)):
                monitor.recv_multipart()
                dials += 1
        assert dials <= 4, "with a redial every 0.15 s it would be 7"
        member._parts._control._bound[-1].socket.disable_monitor()
        monitor.close()
        assert not stranger.peers


def test_raw_sockets_get_nothing_from_a_node_with_a_secret() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with Node("a", secret=SECRET, **LOOPBACK) as node:  # type: ignore[arg-type]
        publisher = node.publisher("t")
        topics = node._parts.topics["drop"].endpoints()[-1].replace("*", "127.0.0.1")
        keys, wrong = derive_keys("default", SECRET), derive_keys("default", OTHER)
        public, private = zmq.curve_keypair()
        peers = []
        for server_key, mine in (
            (None, None),
            (wrong.public, (wrong.public, wrong.private)),
            (keys.public, (public, private)),  # knows whom to ask, but is no member
        ):
            peer = context.socket(zmq.SUB)
            peer.linger = 0
            if server_key and mine:
                peer.curve_serverkey = server_key
                peer.curve_publickey, peer.curve_secretkey = mine
            peer.subscribe(b"")
            peer.connect(topics)
            peers.append(peer)
        member = context.socket(zmq.SUB)
        member.linger = 0
        member.curve_serverkey = keys.public
        member.curve_publickey, member.curve_secretkey = keys.public, keys.private
        member.subscribe(b"")
        member.connect(topics)
        until(lambda: publisher.send("x") or member.poll(10), "a message to the member")  # type: ignore[func-returns-value]
        assert [peer.poll(50) for peer in peers] == [0, 0, 0]
        until(lambda: node.stats().dropped.get("key refused"), "the count of the refused key")
    context.destroy(linger=0)


def test_garbage_on_every_port_is_dropped_and_the_node_goes_on() -> None:
    with (
        Node("a", secret=SECRET, **LOOPBACK) as node,  # type: ignore[arg-type]
        Node("b", secret=SECRET, **LOOPBACK) as other,  # type: ignore[arg-type]
    ):
        node.service("s")(lambda request: request)
        puller = node.puller("q")
        pusher = node.pusher("q")
        pusher.send(1, timeout=5)
        assert puller.recv(timeout=5).payload == 1
        for address_, port in listening_tcp():
            assert address_ == "0100007F"
            for garbage in (b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(1000), b"\xff" * 64):
                with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
                    raw.sendall(garbage)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        directory = Path(os.environ["MESH_RUNTIME_DIR"])
        for path in directory.glob(f"{node.id}.*[0-9]"):
            for kind in (zmq.DEALER, zmq.PUSH, zmq.SUB):
                raw_zmq = context.socket(kind)
                raw_zmq.linger = 500
                raw_zmq.connect(f"ipc://{path}")
                if kind == zmq.SUB:
                    raw_zmq.subscribe(os.urandom(500))
                    raw_zmq.subscribe(b"@0123456789abcdef:a//*\0")
                    raw_zmq.close()
                    continue
                for parts in ([b""], [os.urandom(200)], [b"\0" + b"\x01" * 40], [b"x"] * 20):
                    # Where the kinds do not match, libzmq ends the connection as soon as it sees.
                    with suppress(zmq.Again):
                        raw_zmq.send_multipart(parts, zmq.NOBLOCK)
                raw_zmq.close()
        context.term()
        until(
            lambda: node.stats().dropped.get("malformed", 0) >= 4, "the count of what was dropped"
        )
        other.wait_for_peers(1, timeout=5)
        assert other.client("s").request("still there", timeout=5) == "still there"
        pusher.send(2, timeout=5)
        assert puller.recv(timeout=5).payload == 2


@pytest.mark.parametrize("secret", ["", "x" * 15])
def test_short_secrets_are_refused(secret: str) -> None:
    with pytest.raises(InvalidOption, match="16 characters or more, not"):
        Node("a", secret=secret)


def test_keys_depend_on_realm_and_secret_and_show_neither() -> None:
    one = derive_keys("realm", SECRET)
    assert one == derive_keys("realm", SECRET)
    assert (
        len({one.public, derive_keys("other", SECRET).public, derive_keys("realm", OTHER).public})
        == 3
    )
    assert one.private.decode() not in repr(one)


def sight(node: Node, sighting: Sighting) -> None:
    """What the control thread does when a source has something."""
    node._parts.loop._apply(node._parts.membership.sighted(sighting, time.monotonic()))


def test_forged_hints_change_nothing_about_a_live_peer() -> None:
    """A hint that names another address, and one that withdraws: hints, no more."""
    with Node("a") as a, Node("b") as b:
        a.wait_for_peers(1, timeout=5)
        forged = Announcement(b.id, "b", "default", ("ipc:///nowhere",))
        for present in (True, False):
            sighting = Sighting("mdns", forged, present)
            a._parts.on_loop(partial(sight, a, sighting))
        assert set(a.peers) == {b.id}
        b.service("s")(lambda request: request)
        assert a.client("s").request(1, timeout=5) == 1
