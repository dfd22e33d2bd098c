"""Messages of several parts, and a Ctrl-C in their midst: what is sent next is no part of them."""

from __future__ import annotations

import contextlib
import signal
from collections import Counter
from collections.abc import Iterator
from types import FrameType

import pytest
import zmq

from mesh.sockets import parts
from mesh.sockets.codec import DETACH_BYTES_MIN
from mesh.sockets.frame import CUT_OFF, Malformed, decode
from tests.support.homes import Homes
from tests.support.queues import Net as QueueNet
from tests.support.sockets import Pair, pipe
from tests.support.topics import Net

LARGE = bytes(DETACH_BYTES_MIN)


class Interrupting:
    """A `send` in whose midst a Ctrl-C comes: before or behind those calls, counted from 0."""

    def __init__(self, *calls: tuple[int, str]) -> None:
        self.calls = dict(calls)
        self.count = 0
        self.send = parts.send

    def __call__(self, *arguments: object) -> object:
        when = self.calls.get(self.count)
        self.count += 1
        if when == "before":
            raise KeyboardInterrupt
        sent = self.send(*arguments)
        if when == "behind":
            raise KeyboardInterrupt
        return sent


@contextlib.contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, *calls: tuple[int, str]) -> Iterator[None]:
    """A Ctrl-C comes then."""
    with monkeypatch.context() as patch:
        patch.setattr(parts, "send", Interrupting(*calls))
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.fixture
def queue() -> Iterator[Pair]:
    with pipe(hwm=1000) as pair:
        yield pair


@pytest.mark.parametrize(
    ("calls", "first"),
    [
        ([(0, "before")], [CUT_OFF]),
        ([(0, "behind")], [b"head", CUT_OFF]),
        ([(1, "before")], [b"head", CUT_OFF]),
        ([(1, "behind")], [b"head", b"body"]),
        ([(0, "behind"), (1, "before")], [b"head", CUT_OFF]),
        ([(0, "behind"), (1, "behind")], [b"head", CUT_OFF]),
    ],
)
def test_a_message_that_was_cut_off_ends_there(
    queue: Pair,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[tuple[int, str]],
    first: list[bytes],
) -> None:
    push, pull = queue
    with interrupted(monkeypatch, *calls):
        parts.send_parts(push, [b"head", b"body"])
    assert parts.send_parts(push, [b"next", b"one"])
    assert pull.recv_multipart() == first
    while (message := pull.recv_multipart()) == [CUT_OFF]:
        pass
    assert message == [b"next", b"one"]


def test_an_interrupted_message_of_one_part_needs_no_end(
    queue: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, pull = queue
    with interrupted(monkeypatch, (0, "before")):
        parts.send_parts(push, [b"alone"])
    assert parts.send_parts(push, [b"next"])
    assert pull.recv_multipart() == [b"next"]


def test_where_there_is_no_room_nothing_had_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.linger = 0
        with interrupted(monkeypatch, (0, "before")):
            parts.send_parts(push, [b"head", b"body"])


@pytest.mark.slow
def test_whenever_a_signal_comes_the_messages_around_it_are_whole(queue: Pair) -> None:
    push, pull = queue

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    got: Counter[tuple[bytes, ...]] = Counter()
    interrupts = 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for n in range(1000):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.00002 + n % 50 * 0.000002)
                for _ in range(400):
                    parts.send_parts(push, [b"head", b"body"])
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
            with contextlib.suppress(zmq.Again):
                while True:
                    got[tuple(pull.recv_multipart(zmq.NOBLOCK))] += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 100
    assert got.keys() <= {(b"head", b"body"), (b"head", CUT_OFF), (CUT_OFF,)}
    assert got[b"head", b"body"] > interrupts


@pytest.mark.parametrize("message", [[CUT_OFF], [b"head", CUT_OFF], [b"id", b"head", CUT_OFF]])
def test_what_was_cut_off_is_no_frame_and_counted_as_that(message: list[bytes]) -> None:
    with pytest.raises(Malformed) as caught:
        decode(message)
    assert caught.value.reason == "cut off"


@pytest.mark.parametrize("call", [(0, "behind"), (1, "before"), (1, "behind")])
def test_a_subscriber_gets_what_was_published_before_and_after_and_counts_the_loss(
    net: Net, monkeypatch: pytest.MonkeyPatch, call: tuple[int, str]
) -> None:
    publisher, subscriber = net.publisher("a"), net.subscriber("a")
    publisher.send(b"before")
    assert subscriber.recv(timeout=5).payload == b"before"
    with interrupted(monkeypatch, call):
        publisher.send(LARGE)
    publisher.send(b"after")
    whole = call == (1, "behind")
    if whole:
        assert subscriber.recv(timeout=5).payload == LARGE
    assert subscriber.recv(timeout=5).payload == b"after"
    assert sum(subscriber.lost.values()) == (not whole)
    assert net.cores[0].counters.dropped == ({} if whole else {"cut off": 1})


@pytest.mark.parametrize("call", [(0, "behind"), (1, "before"), (1, "behind")])
def test_a_worker_gets_the_tasks_before_and_after(
    homes: Homes, monkeypatch: pytest.MonkeyPatch, call: tuple[int, str]
) -> None:
    net = QueueNet(homes)
    try:
        pusher, puller = net.pusher(), net.puller()
        pusher.send(b"before", timeout=5)
        with interrupted(monkeypatch, call):
            pusher.send(LARGE, timeout=5)
        pusher.send(b"after", timeout=5)
        got = [puller.recv(timeout=5).payload for _ in range(2)]
        if call == (1, "behind"):
            assert got.pop() == LARGE
            got.append(puller.recv(timeout=5).payload)
        assert got == [b"before", b"after"]
    finally:
        net.close()
