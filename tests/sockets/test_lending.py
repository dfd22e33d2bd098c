"""Large payloads while pyzmq's thread is late in freeing them: it is held up, for as long as a test
likes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest
import zmq
from zmq.utils import garbage

from mesh.sockets import parts, transport
from mesh.sockets.lending import Lending, lending
from mesh.sockets.parts import NO_COPY_BYTES_MIN
from tests.support.topics import Net

SIZE = 2 * NO_COPY_BYTES_MIN
BUFFER_BYTES = 8 * SIZE
COUNT = 40


@pytest.fixture
def go_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """That thread frees nothing until this is called."""
    arrived, go = threading.Event(), threading.Event()

    def getpid() -> int:  # it looks before each one whether it was forked
        if threading.current_thread() is garbage.gc.thread:
            arrived.set()
            assert go.wait(30)
        return os.getpid()

    zmq.Frame(b".", copy=False)  # so that there is one
    monkeypatch.setattr(garbage, "getpid", getpid)
    zmq.Frame(b".", copy=False)
    assert arrived.wait(10)
    yield go.set
    go.set()


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Lending:
    """As in a process whose nodes have small buffers."""
    own = Lending()
    monkeypatch.setattr(parts, "lending", own)
    monkeypatch.setattr(transport, "lending", own)
    return own


@pytest.fixture
def net(own: Lending, nets: Callable[..., Net]) -> Net:
    return nets(buffer_bytes=BUFFER_BYTES)


def payload(n: int) -> bytes:
    return bytes([n]) * SIZE


def lend(lending: Lending) -> int:
    """As many as may be; returns how many that were."""
    for count in range(COUNT):
        if not lending.may():
            return count
        lending.lent(SIZE)
    return COUNT


def kept() -> int:
    """How many payloads are lent and not freed."""
    return sum(len(ref.obj) == SIZE for ref in garbage.gc.refs.copy().values())  # type: ignore[arg-type]


def test_payloads_that_nobody_takes_are_not_kept_though_python_is_late_in_freeing_them(
    net: Net, go_on: Callable[[], None]
) -> None:
    publisher = net.publisher("a")
    for n in range(COUNT):
        publisher.send(payload(n))
    assert BUFFER_BYTES // 2 <= kept() * SIZE <= BUFFER_BYTES + 2 * SIZE


def test_payloads_that_are_read_are_not_kept_either_and_none_is_missing(
    net: Net, go_on: Callable[[], None]
) -> None:
    publisher, subscriber = net.publisher("a", when_full="wait"), net.subscriber("a")
    for n in range(COUNT):
        publisher.send(payload(n), timeout=5)
        assert subscriber.recv(timeout=5).payload == payload(n)
    assert kept() * SIZE <= BUFFER_BYTES + 2 * SIZE


def test_payloads_are_lent_again_once_python_has_freed_the_others(
    own: Lending, go_on: Callable[[], None]
) -> None:
    own.allow(BUFFER_BYTES)
    assert 0 < lend(own) * SIZE <= BUFFER_BYTES
    assert lend(own) == 0
    go_on()
    own._probe.wait(10)
    for _ in range(COUNT):
        assert own.may()
        own.lent(SIZE)
        own._probe.wait(10)


def test_a_forked_child_does_not_wait_for_what_its_parent_lent(
    go_on: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lending, "_bytes_max", BUFFER_BYTES // 2)
    assert lend(lending) < COUNT
    if (child := os.fork()) == 0:
        os._exit(not lending.may())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
