"""How a node's sockets are made: nothing is left of what cannot be, and no peer is given up."""

from __future__ import annotations

import os
import socket as kernel
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from mesh.sockets.transport import Bound, Socket, Transport

RECONNECT_STOP = 109


@pytest.fixture
def make(private_runtime_dir: str) -> Iterator[Callable[..., Transport]]:
    """Transports whose ipc sockets lie in the test's folder, as a node's do."""
    made: list[Transport] = []

    def make(**options: object) -> Transport:
        def path(label: str) -> str:
            return f"{private_runtime_dir}/{len(made)}.{label}"

        transport = Transport(socket_path=path, remove_path=os.unlink, **options)  # type: ignore[arg-type]
        made.append(transport)
        return transport

    yield make
    for transport in made:
        transport.context.destroy(linger=0)


def free_port() -> tuple[kernel.socket, int]:
    """A port that somebody has, until the socket is closed."""
    taken = kernel.socket()
    taken.bind(("0.0.0.0", 0))
    taken.listen()
    return taken, taken.getsockname()[1]


def close(bound: list[Bound]) -> None:
    for each in bound:
        each.socket.close(linger=0)


@pytest.mark.parametrize("kind", [zmq.PUSH, zmq.DEALER, zmq.SUB])
def test_a_link_to_a_peer_never_stops_dialling(make: Callable[..., Transport], kind: int) -> None:
    """Whoever was stopped during the handshake is reached once it goes on. Only a control link, of
    which there will be another, stops where CURVE refuses it."""
    transport = make()
    for socket, stops in (
        (transport.connecting(kind, "tcp"), 0),
        (transport.connect(kind, "ipc:///nowhere"), 0),
        (transport.connecting(kind, "tcp", stop_if_refused=True), 2),
    ):
        assert socket.getsockopt(RECONNECT_STOP) == stops
        socket.close()


@pytest.mark.parametrize("endpoint", ["ipc:///" + "a" * 150, "tcp://127.0.0.1:none", "carrier://x"])
def test_where_it_cannot_connect_no_socket_is_left(
    make: Callable[..., Transport], endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, made = make(), list[Socket]()
    connecting = transport.connecting

    def noting(*args: object, **options: object) -> Socket:
        made.append(connecting(*args, **options))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(transport, "connecting", noting)
    with pytest.raises(zmq.ZMQError):
        transport.connect(zmq.PUSH, endpoint)
    assert [socket.closed for socket in made] == [True]


def test_the_file_of_a_released_socket_is_gone_and_the_others_go_in_the_end(
    make: Callable[..., Transport], private_runtime_dir: str
) -> None:
    transport = make()
    first, second = transport.bind(zmq.PULL, "pull"), transport.bind(zmq.PULL, "pull")
    folder = Path(private_runtime_dir)
    assert {str(path) for path in folder.iterdir()} == {first[0].path, second[0].path}
    close(first)
    transport.release(first)
    transport.release(first)
    assert [str(path) for path in folder.iterdir()] == [second[0].path]
    close(second)
    transport.close()
    assert not list(folder.iterdir())


def test_a_path_is_of_a_node_only_where_nodes_sockets_are_and_under_its_name(
    make: Callable[..., Transport], private_runtime_dir: str
) -> None:
    is_of = make().is_of
    assert is_of(f"{private_runtime_dir}/00ab.direct3", "00ab")
    for path in (
        "",
        "00ab.direct3",
        f"{private_runtime_dir}/00ac.direct3",
        f"{private_runtime_dir}/00abc.direct3",
        f"{private_runtime_dir}/below/00ab.direct3",
        f"{private_runtime_dir}/../00ab.direct3",
        "/run/docker.sock",
    ):
        assert not is_of(path, "00ab"), path


def test_where_the_port_is_taken_nothing_is_bound(
    make: Callable[..., Transport], private_runtime_dir: str
) -> None:
    taken, port = free_port()
    transport = make(networked=True)
    with taken, pytest.raises(OSError, match=f"tcp port {port} cannot be had"):
        transport.bind(zmq.ROUTER, "control", port=port)
    assert not list(Path(private_runtime_dir).iterdir())
    transport.close()  # which would wait for a socket that is open


def test_where_there_is_no_socket_for_the_network_nothing_is_bound(
    make: Callable[..., Transport], private_runtime_dir: str
) -> None:
    transport = make(networked=True)
    transport.context.set(zmq.MAX_SOCKETS, 1)
    with pytest.raises(OSError, match="Too many open files"):
        transport.bind(zmq.PULL, "pull")
    assert not list(Path(private_runtime_dir).iterdir())
    transport.close()


def test_a_socket_follows_the_addresses_of_its_interfaces(
    make: Callable[..., Transport], caplog: pytest.LogCaptureFixture
) -> None:
    """Also from none; on the same port."""
    transport = make(networked=True, interfaces_named=True)
    bound = transport.bind(zmq.PULL, "pull")
    tcp = bound[1]
    assert tcp.hosts == {"127.0.0.1"}
    transport.addresses = ("127.0.0.2", "192.0.2.1")  # the second is not there
    transport.follow(bound)
    transport.follow(bound)
    assert tcp.hosts == {"127.0.0.1", "127.0.0.2"}
    assert not caplog.messages
    for host in sorted(tcp.hosts):
        kernel.create_connection((host, tcp.port), timeout=5).close()
    with pytest.raises(OSError, match="refused"):
        kernel.create_connection(("127.0.0.3", tcp.port), timeout=5)
    close(bound)


def test_a_socket_that_listens_everywhere_has_nowhere_to_follow_to(
    make: Callable[..., Transport],
) -> None:
    transport = make(networked=True)
    bound = transport.bind(zmq.PULL, "pull")
    transport.addresses = ("127.0.0.2",)
    transport.follow(bound)
    assert bound[1].hosts == set()
    close(bound)
