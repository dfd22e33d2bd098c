"""Handles: given back once, whoever forgets them; and they leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import Iterator

import pytest

from mesh.errors import Closed, Timeout
from mesh.sockets.handle import Handle
from tests.support.homes import Homes
from tests.support.topics import NETWORKED, Net
from tests.support.waiting import until


def test_a_handle_is_given_back_once_however_often_it_is_closed() -> None:
    given_back: list[int] = []
    with Handle("handle", None, lambda: given_back.append(1)) as handle:
        assert not handle.closed
        handle._check_open()
    handle.close()
    assert handle.closed
    assert given_back == [1]
    with pytest.raises(Closed, match="handle is closed"):
        handle._check_open()


def test_a_handle_that_is_forgotten_is_given_back() -> None:
    given_back: list[int] = []
    Handle("handle", None, lambda: given_back.append(1))
    assert given_back == [1]


def test_a_handle_keeps_its_owner() -> None:
    class Owner:
        gone = False

        def __del__(self) -> None:
            Owner.gone = True

    handle = Handle("handle", Owner(), lambda: None)
    assert not Owner.gone
    del handle
    assert Owner.gone


@pytest.fixture
def no_cycles() -> Iterator[None]:
    """What refers to itself in a circle stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def descriptors() -> dict[str, int]:
    kinds: dict[str, int] = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            kind = os.readlink(f"/proc/self/fd/{fd}").partition("[")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


@pytest.mark.usefixtures("no_cycles")
def test_closed_subscribers_leave_no_descriptors_behind(homes: Homes) -> None:
    """Whether they were used by threads or by an event loop."""
    net = Net(homes, **NETWORKED)
    publisher = net.publisher("a", when_full="wait")

    def come_and_go() -> None:
        for scheme in ("ipc", "tcp"):
            subscriber = net.subscriber("a", scheme=scheme)
            publisher.send(1)
            assert subscriber.recv(timeout=5).payload == 1

            async def use() -> None:
                with pytest.raises(Timeout):
                    await subscriber.arecv(timeout=0.001)  # noqa: B023

            asyncio.run(use())
            subscriber.close()
        net.cores.clear()
        net.until(lambda: not net.topics["drop"]._readers and not net.topics["wait"]._readers)

    come_and_go()
    before = descriptors()
    for _ in range(5):
        come_and_go()

    def as_before() -> bool:
        return all(count <= before.get(kind, 0) for kind, count in descriptors().items())

    until(as_before, "the end of all that was opened")
    net.close()
