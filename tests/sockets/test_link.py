"""The contract of links, before any pattern: no wake-up missed, no busy loop, every wait ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import select
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import uvloop
import zmq

from mesh.errors import Closed, Timeout
from mesh.sockets.link import Link
from mesh.sockets.link_asyncio import LoopWaiter
from mesh.sockets.parts import read_parts
from tests.support.links import Box, Inbox, Slot, Taker, endpoint_of, push
from tests.support.waiting import until

MESSAGES = 400
LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


@pytest.mark.parametrize("disturbed", [True, False], ids=["churn", "quiet"])
@pytest.mark.parametrize(("thread_count", "loop_count"), [(8, 1), (8, 0), (1, 0), (0, 2), (1, 1)])
def test_threads_and_loops_miss_no_wake_up_while_peers_come_and_go(
    context: zmq.Context[zmq.Socket[bytes]],
    inbox: Inbox,
    thread_count: int,
    loop_count: int,
    disturbed: bool,
) -> None:
    """Each message is sent only once the one before it was taken, so that a wake-up that goes
    missing stops everything: no later message comes to cover for it."""
    endpoint = endpoint_of(inbox)
    taken: list[bytes] = []
    progress = threading.Semaphore(1)
    stop = threading.Event()

    def note(message: bytes) -> None:
        taken.append(message)
        progress.release()

    def consume() -> None:
        while not stop.is_set():
            try:
                note(inbox.link.wait(inbox.take, 20, "message"))
            except Closed:
                return

    async def consume_async() -> None:
        async def one() -> None:
            while True:
                note(await inbox.link.wait_async(inbox.take, 20, "message"))

        with pytest.raises(Closed):
            await asyncio.gather(one(), one())

    def churn() -> None:
        """The control thread: connects and disconnects, and operates on the socket under the lock,
        which is what swallows edges."""
        peer = context.socket(zmq.PUSH)
        while not stop.is_set():
            peer.connect(endpoint)
            for _ in range(100):
                if stop.wait(0.00001):
                    break
                try:
                    with inbox.link:
                        inbox.socket.getsockopt(zmq.EVENTS)
                except Closed:
                    break
            peer.disconnect(endpoint)
        peer.close(linger=0)

    threads = [threading.Thread(target=consume) for _ in range(thread_count)]
    threads += [
        threading.Thread(target=lambda: asyncio.run(consume_async())) for _ in range(loop_count)
    ]
    churner = threading.Thread(target=churn if disturbed else stop.wait)
    for thread in [*threads, churner]:
        thread.start()
    producers = [push(context, endpoint_of(inbox)) for _ in range(4)]
    sent = []
    try:
        for i in range(MESSAGES):
            assert progress.acquire(timeout=10), (
                f"a wake-up went missing after {len(taken)} messages"
            )
            message = b"%d" % i
            sent.append(message)
            producers[i % 4].send(message)
        assert progress.acquire(timeout=10), "the last wake-up went missing"
    finally:
        stop.set()
        inbox.link.close()
        for thread in [*threads, churner]:
            thread.join(timeout=10)
        for producer in producers:
            producer.close(linger=0)
    assert sorted(taken) == sorted(sent)
    assert not any(thread.is_alive() for thread in threads)
    # One wake-up for each message, one to pass the sockets on, and what the churn stirs up.
    assert inbox.link.attempts < MESSAGES * 30


def test_an_operation_that_swallows_the_edge_wakes_whoever_waits(
    context: zmq.Context[zmq.Socket[bytes]], inbox: Inbox
) -> None:
    """The loop does not poll while this runs in its thread, so by the time it does, the descriptor
    says nothing any more: only the wake-up tells."""

    async def run() -> bytes:
        task = asyncio.ensure_future(inbox.link.wait_async(inbox.take, 5, "message"))
        await asyncio.sleep(0)
        peer = push(context, endpoint_of(inbox))
        peer.send(b"x")
        with inbox.link:
            while not inbox.link.readable():
                pass
        started = time.monotonic()
        message = await task
        assert time.monotonic() - started < 2
        peer.close()
        return message

    assert asyncio.run(run()) == b"x"


def test_what_is_connected_while_somebody_sleeps_wakes_him(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: object
) -> None:
    """libzmq signals only a reader that has found the pipe empty once: whoever connects a socket
    has to look at it, or the first message comes without a sound."""
    link = Link("dealer")
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{tmp_path}/router")
    dealer = context.socket(zmq.DEALER)
    with link:
        link.add(dealer)
    got: list[bytes] = []

    def take() -> bytes | None:
        parts = read_parts(dealer)
        return None if parts is None else bytes(parts[0])

    waiting = threading.Thread(target=lambda: got.append(link.wait(take, 5, "message")))
    waiting.start()
    while not link._threads:
        pass
    with link:
        dealer.connect(f"ipc://{tmp_path}/router")
        dealer.send(b"hello", zmq.NOBLOCK)
    started = time.monotonic()
    sender, _ = router.recv_multipart()
    router.send_multipart([sender, b"welcome"])
    waiting.join(10)
    assert got == [b"welcome"]
    assert time.monotonic() - started < 2, "only the deadline found it"
    link.close()
    router.close()


def test_waiting_for_what_never_comes_does_not_spin(inbox: Inbox) -> None:
    before = time.thread_time()
    with pytest.raises(Timeout, match=r"no message within 0\.1 s"):
        inbox.link.wait(inbox.take, 0.1, "message")
    assert inbox.link.attempts <= 3
    assert time.thread_time() - before < 0.05


def test_waiting_for_room_does_not_spin(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: object
) -> None:
    """An XPUB with XPUB_NODROP reports POLLOUT although it refuses: 55,004 retries in 0.5 s when
    guided by that. Here it is tried again every 2 ms, or when somebody makes room."""
    link = Link("publisher")
    publisher = context.socket(zmq.XPUB)
    publisher.setsockopt(zmq.XPUB_NODROP, 1)
    publisher.setsockopt(zmq.SNDHWM, 1)
    publisher.bind(f"ipc://{tmp_path}/room")
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt(zmq.RCVHWM, 1)
    subscriber.connect(f"ipc://{tmp_path}/room")
    subscriber.subscribe(b"")
    assert publisher.recv() == b"\x01"
    with link:
        link.add(publisher)

    def send() -> bool | None:
        try:
            publisher.send(bytes(100_000), zmq.NOBLOCK)
        except zmq.Again:
            link.readable()
            return None
        return True

    def fill() -> None:
        while True:
            link.wait(send, 0.1, "room", retry_s=0.002)

    with pytest.raises(Timeout, match="no room"):
        fill()
    tried = link.attempts
    with pytest.raises(Timeout, match="no room"):
        link.wait(send, 0.2, "room", retry_s=0.002)
    assert link.attempts - tried < 110
    waiting = threading.Thread(target=link.wait, args=(send, 10, "room"), kwargs={"retry_s": 0.002})
    waiting.start()
    while waiting.is_alive():
        if subscriber.poll(20):
            subscriber.recv()
    subscriber.close()
    link.close()


def test_a_coroutine_tries_again_as_often_as_it_was_told_to(inbox: Inbox) -> None:
    """Though nobody wakes it: the second and the first to wait alike."""

    async def run() -> None:
        def trying() -> Callable[[], int | None]:
            tries = iter((None, None, None, 4))
            return lambda: next(tries)

        waits = [inbox.link.wait_async(trying(), 5, "luck", retry_s=0.001) for _ in range(2)]
        assert await asyncio.gather(*waits) == [4, 4]

    asyncio.run(run())


def test_what_comes_before_a_loop_watches_is_not_overlooked(
    context: zmq.Context[zmq.Socket[bytes]], inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first attempt something comes."""
    sender = push(context, endpoint_of(inbox))
    begin = LoopWaiter.begin

    def late(waiter: LoopWaiter, *wait: Any) -> Any:
        sender.send(b"x")
        assert select.select([inbox.link], [], [], 5)[0]
        return begin(waiter, *wait)

    monkeypatch.setattr(LoopWaiter, "begin", late)
    assert asyncio.run(inbox.link.wait_async(inbox.take, 2, "message")) == b"x"
    sender.close()


def test_a_cancelled_wait_gives_back_what_it_was_about_to_return(
    context: zmq.Context[zmq.Socket[bytes]], inbox: Inbox
) -> None:
    given_back: list[bytes] = []

    async def run() -> None:
        task = asyncio.ensure_future(
            inbox.link.wait_async(inbox.take, 5, "message", give_back=given_back.append)
        )
        await asyncio.sleep(0)
        peer = push(context, endpoint_of(inbox))
        peer.send(b"x")
        waiter = inbox.link.loops[asyncio.get_running_loop()]
        while waiter._calls:  # until the result is set, and the task has not run yet
            waiter._look()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        peer.close()

    asyncio.run(run())
    assert given_back == [b"x"]


def test_a_cancelled_wait_leaves_nothing_behind(inbox: Inbox) -> None:
    async def run() -> None:
        task = asyncio.ensure_future(inbox.link.wait_async(inbox.take, None, "message"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(inbox.link._waiting_loops) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert inbox.link._waiting_loops == []

    asyncio.run(run())


def test_closing_wakes_threads_and_coroutines_with_closed(inbox: Inbox) -> None:
    outcomes: list[BaseException] = []

    def wait() -> None:
        with pytest.raises(Closed, match="inbox is closed") as caught:
            inbox.link.wait(inbox.take, 10, "message")
        outcomes.append(caught.value)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()

    async def run() -> None:
        task = asyncio.ensure_future(inbox.link.wait_async(inbox.take, 10, "message"))
        while len(inbox.link._threads) < 3 or not inbox.link._waiting_loops:
            await asyncio.sleep(0)
        inbox.link.close()
        with pytest.raises(Closed):
            await task

    asyncio.run(run())
    for thread in threads:
        thread.join(timeout=5)
    assert len(outcomes) == 3
    with pytest.raises(Closed):
        inbox.link.wait(inbox.take, 0, "message")


def test_no_wait_at_all_raises_at_once(inbox: Inbox) -> None:
    with pytest.raises(Timeout, match="no message at once"):
        inbox.link.wait(inbox.take, 0, "message")


def test_a_loop_that_was_closed_under_its_coroutines_does_not_stop_the_threads(
    context: zmq.Context[zmq.Socket[bytes]], inbox: Inbox
) -> None:
    loop = asyncio.new_event_loop()
    task = loop.create_task(inbox.link.wait_async(inbox.take, None, "message"))
    loop.run_until_complete(asyncio.sleep(0))
    assert len(inbox.link._waiting_loops) == 1
    loop.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    peer = push(context, endpoint_of(inbox))
    peer.send(b"1")
    assert inbox.link.wait(inbox.take, 5, "message") == b"1"
    peer.close()
    task.get_coro().close()


def test_whoever_leaves_hands_the_sockets_on(
    context: zmq.Context[zmq.Socket[bytes]], inbox: Inbox
) -> None:
    """The first who waits watches them for all, and takes but one message."""
    first, second = (Taker(inbox.link, inbox.take) for _ in range(2))
    with contextlib.closing(push(context, endpoint_of(inbox))) as peer:
        peer.send(b"1")
        assert first.join() == b"1"
        peer.send(b"2")
        assert second.join() == b"2"


def test_what_an_operation_leaves_in_the_inbox_wakes_whoever_waits(box: Box) -> None:
    taker = Taker(box.link, box.take)
    box.link.run(lambda: box.put(1))
    assert taker.join() == 1
    taker = Taker(box.link, box.take)
    with box.link:
        box.put(2)
    assert taker.join() == 2


def test_a_loop_that_leaves_wakes_whoever_waits_for_what_it_left_over(box: Box) -> None:
    async def run() -> int:
        waiting = asyncio.ensure_future(box.link.wait_async(box.take, 10, "message"))
        await asyncio.sleep(0)
        taker = Taker(box.link, box.take)
        with box.link.lock:  # as if a frame of two messages had come, and only the loop heard
            box.put(1, 2)
            box.link._waiting_loops[0].wake()
        got = await waiting
        assert await asyncio.to_thread(taker.join) == 2
        return got

    assert asyncio.run(run()) == 1


def test_a_link_closes_its_sockets_also_if_what_comes_first_fails(inbox: Inbox) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    def wait() -> None:
        with pytest.raises(Closed):
            inbox.link.wait(inbox.take, 10, "message")

    taker = threading.Thread(target=wait)
    taker.start()
    until(lambda: inbox.link._threads, "the wait")
    with pytest.raises(ZeroDivisionError):
        inbox.link.close(first=fail)
    assert inbox.socket.closed
    taker.join(5)
    assert not taker.is_alive()
    inbox.link.close(first=fail)  # once


def test_a_link_that_is_closed_and_forgotten_is_gone_at_once() -> None:
    """With its descriptors: nobody has to wait for the cyclic garbage collector."""
    gc.disable()
    try:
        assert used_by_a_loop_and_closed()() is None
    finally:
        gc.enable()


def used_by_a_loop_and_closed() -> weakref.ref[Link]:
    box = Box()

    async def run() -> None:
        with pytest.raises(Timeout, match=r"no message within 0\.001 s"):
            await box.link.wait_async(box.take, 0.001, "message")

    asyncio.run(run())
    box.link.close()
    return weakref.ref(box.link)


def test_a_wait_may_be_longer_than_any_timer(box: Box) -> None:
    def close() -> None:
        until(lambda: box.link._threads, "the wait")
        box.link.close()

    closing = threading.Thread(target=close)
    closing.start()
    with pytest.raises(Closed):
        box.link.wait(box.take, 1e12, "message")
    closing.join(5)


def test_who_is_told_to_look_again_during_his_first_attempt_does_so(box: Box) -> None:
    """He does not wait yet: an attempt that has read enough for once, and leaves the rest."""

    def attempt() -> int | None:
        if not box.items:
            box.put(1)
            box.link.wake_all()
            return None
        return box.take()

    began = time.monotonic()
    assert box.link.wait(attempt, 5, "message") == 1

    async def run() -> int:
        return await box.link.wait_async(attempt, 5, "message")

    assert asyncio.run(run()) == 1
    assert time.monotonic() - began < 4, "a deadline made it look again"


def test_what_a_waiting_thread_is_handed_it_returns_and_another_watches_the_sockets(
    context: zmq.Context[zmq.Socket[bytes]], inbox: Inbox
) -> None:
    slots = [Slot(), Slot()]
    got: list[object] = []

    def wait(slot: Slot) -> None:
        got.append(inbox.link.wait(inbox.take, 10, "message", slot=slot))

    threads = [threading.Thread(target=wait, args=(slot,)) for slot in slots]
    for i, thread in enumerate(threads, 1):
        thread.start()
        until(partial(_wait, inbox.link, i))
    with inbox.link.lock:
        inbox.link.hand(slots[0], b"handed")
    threads[0].join(5)
    assert got == [b"handed"]
    assert slots[0].waiter is None
    began = time.monotonic()
    with contextlib.closing(push(context, endpoint_of(inbox))) as peer:
        peer.send(b"read")
        threads[1].join(15)
    assert got == [b"handed", b"read"]
    assert time.monotonic() - began < 8, "its deadline made it look again"


def _wait(link: Link, count: int) -> bool:
    return len(link._threads) == count


@pytest.mark.parametrize("new_loop", LOOPS)
def test_each_wait_of_a_loop_ends_by_its_own_deadline(
    box: Box, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Though one timer is there for all."""

    async def one(timeout: float) -> float:
        began = time.monotonic()
        with pytest.raises(Timeout, match=f"no message within {timeout:g} s"):
            await box.link.wait_async(box.take, timeout, "message")
        return time.monotonic() - began - timeout

    async def run() -> None:
        late = await asyncio.gather(*map(one, [0.09, 0.03, 0.06, 0.01, 0.03]))
        assert all(-0.005 < each < 2 for each in late)
        assert late == [pytest.approx(each, abs=2) for each in late]

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_loop_goes_on_watching_until_it_is_woken_for_nothing(
    context: zmq.Context[zmq.Socket[bytes]],
    inbox: Inbox,
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def run() -> None:
        peer.send(b"1")
        assert await inbox.link.wait_async(inbox.take, 5, "message") == b"1"
        with pytest.raises(Timeout):
            await inbox.link.wait_async(inbox.take, 0.001, "message")
        waiter = inbox.link.loops[asyncio.get_running_loop()]
        assert waiter._watching
        peer.send(b"2")
        while waiter._watching:
            await asyncio.sleep(0.001)
        assert not asyncio.get_running_loop().remove_reader(inbox.link.fileno())
        assert await inbox.link.wait_async(inbox.take, 5, "message") == b"2"
        with pytest.raises(Timeout):
            await inbox.link.wait_async(inbox.take, 0.001, "message")
        assert waiter._watching
        inbox.link.close()
        while waiter._watching:
            await asyncio.sleep(0.001)
        assert waiter._timer is None

    peer = push(context, endpoint_of(inbox))
    with contextlib.closing(peer), asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


def test_what_is_handed_in_an_attempt_that_finds_nothing_ends_the_wait() -> None:
    link, slot = Link("hand"), Slot()
    attempts: list[None] = []

    def attempt() -> str | None:
        attempts.append(None)
        if len(attempts) == 3:
            link.hand(slot, "handed")
        return None

    assert link.wait(attempt, 5, "thing", slot=slot, retry_s=0.001) == "handed"
    assert len(attempts) == 3
    assert link.alone
    link.close()
