"""Single connections: the one that is meant is cut, and one that libzmq gave up is seen."""

from __future__ import annotations

import contextlib
import os
import socket as kernel
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
import zmq

from mesh.sockets.connections import Accepted, Draining, Watch
from tests.support.homes import Homes
from tests.support.topics import NETWORKED
from tests.support.waiting import until


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class Sides:
    """A bound XPUB, and as many connections to it as wanted."""

    def __init__(self, homes: Homes, scheme: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.connected: list[zmq.Socket[bytes]] = []
        home = homes.make(1, **NETWORKED)
        self._all = ipc, tcp = home.transport.bind(zmq.XPUB, "pub")
        self.bound = (ipc if scheme == "ipc" else tcp).socket
        self.bound.setsockopt(zmq.XPUB_VERBOSER, 1)
        self.bound.setsockopt(zmq.RCVTIMEO, 5000)
        tcp_endpoint = f"tcp://127.0.0.1:{tcp.port}"
        self.endpoint = ipc.endpoint if scheme == "ipc" else tcp_endpoint

    def connect(self) -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.SUB)
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        socket.connect(self.endpoint)
        socket.subscribe(b"")
        self.connected.append(socket)
        return socket

    def accepted(self) -> Accepted:
        return Accepted.of(self.bound.recv(copy=False))

    def disconnect(self) -> None:
        self.context.destroy(linger=0)

    def close(self) -> None:
        self.disconnect()
        for each in self._all:
            each.socket.close(linger=0)


@pytest.fixture(params=["ipc", "tcp"])
def sides(homes: Homes, request: pytest.FixtureRequest) -> Iterator[Sides]:
    sides = Sides(homes, request.param)
    yield sides
    sides.close()


def descriptors_of(file: HasFileno) -> int:
    """How many descriptors of this process stand for the same as `file`."""
    same = Path(f"/proc/self/fd/{file.fileno()}").readlink()
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            count += Path(f"/proc/self/fd/{fd}").readlink() == same
    return count


def test_a_connection_that_is_cut_ends_and_the_others_go_on(sides: Sides) -> None:
    first = sides.connect()
    accepted = sides.accepted()
    second = sides.connect()
    assert sides.accepted() != accepted
    assert accepted.cut()
    assert sides.bound.recv() == b"\0", "as if the other side had gone"
    sides.bound.send(b"still here")
    assert second.poll(5000)
    assert second.recv() == b"still here"
    assert not first.poll(0)


def test_two_messages_by_one_connection_tell_the_same(sides: Sides) -> None:
    socket = sides.connect()
    socket.subscribe(b"a")
    assert sides.accepted() == sides.accepted()


def test_a_connection_that_ended_is_not_cut(sides: Sides) -> None:
    sides.connect()
    accepted = sides.accepted()
    assert not accepted.ended
    sides.disconnect()
    assert sides.bound.recv() == b"\0"
    assert accepted.ended
    assert not accepted.cut()


def test_another_that_got_its_descriptor_since_is_left_alone() -> None:
    ours, theirs = kernel.socketpair()
    accepted = Accepted(ours.fileno(), os.fstat(ours.fileno()).st_ino + 1)
    with ours, theirs:
        assert accepted.ended
        assert not accepted.cut()
        assert descriptors_of(ours) == 1
        ours.send(b"unharmed")
        assert theirs.recv(8) == b"unharmed"


def test_a_file_that_got_its_descriptor_since_is_left_alone(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        accepted = Accepted(file.fileno(), 1)
        assert accepted.ended
        assert not accepted.cut()
        assert descriptors_of(file) == 1
        file.write(b"unharmed")
    assert (tmp_path / "file").read_bytes() == b"unharmed"


def test_what_had_ended_before_it_was_looked_at_is_never_cut() -> None:
    ours, theirs = kernel.socketpair()
    with ours, theirs:
        accepted = Accepted(ours.fileno(), 0)
        assert accepted.ended
        assert not accepted.cut()
        ours.send(b"unharmed")
        assert theirs.recv(8) == b"unharmed"


@pytest.fixture
def watched(homes: Homes) -> Iterator[tuple[zmq.Socket[bytes], Watch]]:
    """A SUB that takes no more than a kilobyte at a time."""
    socket = homes.make(2).transport.connecting(zmq.SUB, "ipc")
    socket.setsockopt(zmq.MAXMSGSIZE, 1024)
    watch = Watch(socket)
    yield socket, watch
    watch.close()
    socket.close(linger=0)


def test_a_connection_that_libzmq_gave_up_is_named_until_it_is_forgotten(
    sides: Sides, watched: tuple[zmq.Socket[bytes], Watch]
) -> None:
    socket, watch = watched
    socket.connect(sides.endpoint)
    socket.subscribe(b"")
    sides.accepted()
    assert watch.look() == (False, [])
    sides.bound.send(bytes(2000))
    looks = []
    until(lambda: looks.append(watch.look()) or looks[-1][1], "the end")  # type: ignore[func-returns-value]
    assert [lost for lost, _ in looks].count(True) == 1
    assert looks[-1] == (False, [sides.endpoint])
    watch.forget(sides.endpoint)
    assert watch.look() == (False, [])


def test_a_connection_that_libzmq_dials_again_is_not_given_up(
    sides: Sides, watched: tuple[zmq.Socket[bytes], Watch]
) -> None:
    socket, watch = watched
    socket.connect(sides.endpoint)
    socket.subscribe(b"")
    sides.accepted().cut()
    until(lambda: watch.look()[0], "the loss")
    assert sides.bound.recv() == b"\0"
    # A connection that is back subscribes again when its socket is used next.
    until(lambda: socket.getsockopt(zmq.EVENTS) or sides.bound.poll(0), "it")
    assert sides.bound.recv() == b"\1"
    for _ in range(5):
        assert watch.look() == (False, [])


def send_buffer_of(accepted: Accepted) -> int:
    held = accepted.hold()
    assert held is not None
    with held:
        return held.getsockopt(kernel.SOL_SOCKET, kernel.SO_SNDBUF)


def test_the_kernel_holds_more_of_a_connection_on_this_host(sides: Sides) -> None:
    sides.connect()
    accepted = sides.accepted()
    before = send_buffer_of(accepted)
    accepted.widen()
    assert (send_buffer_of(accepted) > before) is sides.endpoint.startswith("ipc")
    sides.disconnect()
    assert sides.bound.recv() == b"\0"
    accepted.widen()
    assert accepted.hold() is None


Ends = tuple[kernel.socket, kernel.socket, Accepted]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Both ends of a connection on this host, and the first as it was accepted."""
    ours, theirs = kernel.socketpair()
    with ours, theirs:
        yield ours, theirs, Accepted(ours.fileno(), os.fstat(ours.fileno()).st_ino)


@pytest.fixture
def draining() -> Iterator[Draining]:
    draining = Draining()
    yield draining
    draining.release()


def test_a_connection_is_held_until_the_other_side_has_read(ends: Ends, draining: Draining) -> None:
    ours, theirs, connection = ends
    ours.send(b"the last")
    draining.hold([connection])
    ours.close()
    by = time.monotonic() + 10
    waiting = threading.Thread(target=draining.wait, args=[lambda: by])
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    assert theirs.recv(100) == b"the last"
    waiting.join(10)
    assert not waiting.is_alive()
    assert theirs.recv(100) == b"", "it has ended"


def test_it_is_held_no_longer_than_wanted(ends: Ends, draining: Draining) -> None:
    ours, theirs, connection = ends
    ours.send(b"the last")
    draining.hold([connection, connection])
    ours.close()
    looks: list[None] = []

    def until() -> float:
        """Long, and then at once."""
        looks.append(None)
        return time.monotonic() + (100 if len(looks) < 3 else -1)

    assert draining.wait(until) == 2
    assert len(looks) == 3
    assert theirs.recv(100) == b"the last"
    assert theirs.recv(100) == b""


def test_one_that_has_ended_is_not_held(ends: Ends, draining: Draining) -> None:
    ours, theirs, connection = ends
    ours.send(b"the last")
    theirs.close()
    draining.hold([connection])
    assert draining.wait(lambda: time.monotonic() + 10) == 0, "nobody will read it"
    ours.close()
    draining.hold([connection])
    assert draining.wait(lambda: time.monotonic() + 10) == 0


def test_one_to_another_host_is_not_held(homes: Homes, draining: Draining) -> None:
    sides = Sides(homes, "tcp")
    sides.connect()
    draining.hold([sides.accepted()])
    assert draining._held == []
    sides.close()


def test_what_is_no_socket_is_neither_widened_nor_kept(tmp_path: Path) -> None:
    """The descriptor of a connection that ended before anybody looked may be any file's."""
    with (tmp_path / "file").open("wb") as file:
        fd = file.fileno()
        for accepted in (Accepted(fd, os.fstat(fd).st_ino), Accepted(fd, 0)):
            accepted.widen()
            assert accepted.hold() is None
            assert not accepted.cut()
            assert descriptors_of(file) == 1
