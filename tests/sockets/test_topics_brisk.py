"""A lone receiver of messages that follow each other closely waits a moment inside ZeroMQ, and then
only: everybody else is served as if there were no such thing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
import zmq

from mesh.errors import Closed, Timeout
from mesh.sockets import moment, parts, subscription
from mesh.sockets.frame import Kind, encode, wire_name
from mesh.sockets.moment import CALM_S, IN_A_ROW, MOMENT_S, Pace
from mesh.sockets.publisher import Publisher
from mesh.sockets.subscriber import Subscriber
from tests.support.topics import Net
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("no_signal_handlers")


def brisk(net: Net, *, latest_only: bool = False) -> tuple[Publisher, Subscriber]:
    """Of which the receiver may wait a moment."""
    publisher, subscriber = net.publisher("a"), net.subscriber("a", latest_only=latest_only)

    def is_brisk() -> bool:
        for _ in range(5):
            publisher.send("quick")
            subscriber.recv(timeout=5)
        return subscriber._core._pace.allows()

    until(is_brisk)
    return publisher, subscriber


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each `recv` that may wait inside ZeroMQ."""
    waits: list[int] = []

    def recv(socket: zmq.Socket[bytes], flags: int) -> bytes:
        waits.append(flags)
        return parts.recv(socket, flags)

    monkeypatch.setattr(subscription, "recv", recv)
    return waits


def test_what_comes_within_the_moment_is_received_without_sleeping(
    net: Net, waits: list[int]
) -> None:
    publisher, subscriber = brisk(net)
    attempts, waits[:] = subscriber._core.link.attempts, []
    publisher.send("next")
    assert subscriber.recv(timeout=5).payload == "next"
    assert waits == [0]
    assert subscriber._core.link.attempts == attempts


def test_what_comes_later_is_received_all_the_same(net: Net) -> None:
    publisher, subscriber = brisk(net)
    later = threading.Timer(20 * MOMENT_S, publisher.send, ["late"])
    later.start()
    assert subscriber.recv(timeout=5).payload == "late"
    later.join()
    assert not subscriber._core._pace.allows()


@pytest.mark.parametrize("timeout", [0, MOMENT_S])
def test_who_has_no_time_does_not_wait_so(net: Net, waits: list[int], timeout: float) -> None:
    _, subscriber = brisk(net)
    waits.clear()
    with pytest.raises(Timeout):
        subscriber.recv(timeout=timeout)
    assert waits == []


def next_by(receive: Callable[[], object], publisher: Publisher, waits: list[int]) -> None:
    """Receive what comes a little later, without such a wait."""
    waits.clear()
    later = threading.Timer(5 * MOMENT_S, publisher.send, ["x"])
    later.start()
    receive()
    later.join()
    assert waits == []


def test_nor_does_who_wants_the_newest(net: Net, waits: list[int]) -> None:
    publisher, subscriber = brisk(net, latest_only=True)
    next_by(lambda: subscriber.recv(timeout=5), publisher, waits)


def test_nor_does_an_event_loop(net: Net, waits: list[int]) -> None:
    publisher, subscriber = brisk(net)
    next_by(lambda: asyncio.run(subscriber.arecv(timeout=5)), publisher, waits)


def test_nor_does_one_of_several(net: Net, waits: list[int]) -> None:
    publisher, subscriber = brisk(net)
    core = subscriber._core
    others = [threading.Thread(target=subscriber.recv, args=[5]) for _ in range(2)]
    with core.link.lock:
        core._pace.slow()
    for other in others:
        other.start()
    until(lambda: len(core.link._threads) == 2)
    core._pace._left = IN_A_ROW
    assert core._pace.allows()
    waits.clear()
    assert core.take_soon() is None
    assert waits == []
    publisher.send_many(["for one", "for the other"])
    for other in others:
        other.join(5)
        assert not other.is_alive()


def test_nor_does_who_finds_the_lock_taken(net: Net, waits: list[int]) -> None:
    _, subscriber = brisk(net)
    core = subscriber._core
    waits.clear()
    with core.link.lock:
        assert core.take_soon() is None
    assert waits == []


def test_nor_does_who_finds_it_closed(net: Net, waits: list[int]) -> None:
    _, subscriber = brisk(net)
    subscriber.close()
    waits.clear()
    with pytest.raises(Closed):
        subscriber.recv(timeout=5)
    assert waits == []


def test_frames_for_others_do_not_hold_the_lock_for_long(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, subscriber = brisk(net)
    core, read = subscriber._core, 0

    def recv(socket: zmq.Socket[bytes], flags: int) -> bytes:
        nonlocal read
        read += 1
        return encode(wire_name("other"), Kind.DATA, b"\x91\x01", sender=5, seq=read)

    with monkeypatch.context() as patch:
        patch.setattr(subscription, "recv", recv)
        assert core.take_soon() is None
    assert read == 8
    publisher.send("next")
    assert subscriber.recv(timeout=5).payload == "next"


def test_a_ctrl_c_in_that_moment_loses_nothing(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher, subscriber = brisk(net)

    def recv(socket: zmq.Socket[bytes], flags: int) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subscription, "recv", recv)
        with pytest.raises(KeyboardInterrupt):
            subscriber.recv(timeout=5)
    publisher.send("next")
    assert subscriber.recv(timeout=5).payload == "next"


# -- The pace by itself


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("mesh.sockets.moment.time.monotonic", lambda: now[0])
    return now


def quick(pace: Pace, now: list[float], times: int = 2, met_at: float = 0.0) -> None:
    for _ in range(times):
        now[0] += MOMENT_S / 2
        pace.came(met_at)


def test_two_that_follow_closely_allow_it_and_a_pause_ends_it(now: list[float]) -> None:
    pace = Pace()
    quick(pace, now, times=1)
    assert not pace.allows(), "it is not known what was before"
    quick(pace, now, times=1)
    assert pace.allows()
    now[0] += 2 * MOMENT_S
    pace.came(0.0)
    assert not pace.allows()
    quick(pace, now)
    pace.slow()
    assert not pace.allows()


def test_it_is_not_allowed_where_others_were_about_lately(now: list[float]) -> None:
    pace = Pace()
    quick(pace, now, times=5, met_at=now[0])
    assert not pace.allows()
    now[0] += CALM_S
    quick(pace, now, met_at=100.0)
    assert pace.allows()


def test_it_is_allowed_to_the_thread_that_was_quick(now: list[float]) -> None:
    pace, allowed = Pace(), []
    quick(pace, now)
    other = threading.Thread(target=lambda: allowed.append(pace.allows()))
    other.start()
    other.join()
    assert allowed == [False]
    assert pace.allows()


def test_whether_signals_are_handled_is_looked_at_again(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = Pace()
    quick(pace, now)
    monkeypatch.setattr(moment, "may_hold", lambda: False)
    quick(pace, now, times=IN_A_ROW - 1)
    assert pace.allows()
    quick(pace, now, times=2)
    assert not pace.allows()
