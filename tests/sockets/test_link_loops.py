"""Links whose event loops are busy, stopped or closed, and loops with several waits on one link."""

from __future__ import annotations

import asyncio
import select
import threading
from collections.abc import Callable

import pytest
import zmq

from mesh.errors import Timeout
from mesh.sockets.link import Link
from tests.support.links import Inbox, endpoint_of, long_before_its_deadline, push


def comes_between(
    inbox: Inbox, peer: zmq.Socket[bytes], attempts: list[int]
) -> Callable[[], bytes | None]:
    """An attempt that finds nothing at its first try, just behind which a message comes."""

    def take() -> bytes | None:
        attempts.append(1)
        if len(attempts) > 1:
            return inbox.take()
        assert inbox.take() is None
        peer.send(b"1")
        assert select.select([inbox.link], [], [], 5)[0]
        return None

    return take


def waits_in(loop: asyncio.AbstractEventLoop, inbox: Inbox) -> asyncio.Task[bytes]:
    """A coroutine of a loop that is stopped as soon as it waits."""
    task = loop.create_task(inbox.link.wait_async(inbox.take, None, "message"))
    loop.run_until_complete(asyncio.sleep(0))
    assert len(inbox.link._waiting_loops) == 1
    return task


def forget(loop: asyncio.AbstractEventLoop, task: asyncio.Task[bytes]) -> None:
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    task.get_coro().close()


@pytest.mark.parametrize("how", ["thread", "loop"])
@pytest.mark.parametrize("state", ["stopped", "closed", "woken and closed"])
def test_what_comes_as_one_begins_is_not_left_to_a_loop_that_may_never_run(
    context: zmq.Context[zmq.Socket[bytes]], inbox: Inbox, how: str, state: str
) -> None:
    loop, peer = asyncio.new_event_loop(), push(context, endpoint_of(inbox))
    task = waits_in(loop, inbox)
    if state == "woken and closed":
        with inbox.link.lock:
            inbox.link._waiting_loops[0].wake()
    if "closed" in state:
        loop.close()
    take = comes_between(inbox, peer, [])
    try:
        with long_before_its_deadline():
            if how == "thread":
                assert inbox.link.wait(take, 10, "message") == b"1"
            else:
                assert asyncio.run(inbox.link.wait_async(take, 10, "message")) == b"1"
    finally:
        peer.close()
        forget(loop, task)


def test_what_comes_as_one_begins_is_not_left_to_a_loop_that_is_busy(
    context: zmq.Context[zmq.Socket[bytes]], inbox: Inbox
) -> None:
    waits, taken = threading.Event(), threading.Event()

    async def run() -> None:
        waiting = asyncio.ensure_future(inbox.link.wait_async(inbox.take, None, "message"))
        await asyncio.sleep(0)
        waits.set()
        assert taken.wait(9), "the message waited for the loop"
        waiting.cancel()

    busy = threading.Thread(target=asyncio.run, args=(run(),))
    busy.start()
    peer = push(context, endpoint_of(inbox))
    try:
        waits.wait()
        with long_before_its_deadline():
            assert inbox.link.wait(comes_between(inbox, peer, []), 10, "message") == b"1"
        taken.set()
    finally:
        busy.join()
        peer.close()


@pytest.mark.parametrize("way", ["watched", "woken"])
def test_of_two_waits_of_a_loop_the_first_hears_of_what_came_behind_its_attempt(
    context: zmq.Context[zmq.Socket[bytes]], inbox: Inbox, way: str
) -> None:
    """It finds nothing; then two messages come, of which the second wait takes one."""
    peer = push(context, endpoint_of(inbox))
    come: list[bool] = []

    def take() -> bytes | None:
        message = inbox.take()
        if come and message is None:
            come.clear()
            peer.send(b"1")
            peer.send(b"2")
            assert select.select([inbox.link], [], [], 5)[0]
        return message

    async def run() -> None:
        first = asyncio.ensure_future(inbox.link.wait_async(take, 5, "message"))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(inbox.link.wait_async(inbox.take, 5, "message"))
        await asyncio.sleep(0.01)  # what connecting left on the descriptor is looked at
        come.append(True)
        waiter = inbox.link._waiting_loops[0]
        if way == "watched":
            waiter._readable()
        else:
            with inbox.link.lock:
                waiter.wake()
        assert sorted(await asyncio.gather(first, second)) == [b"1", b"2"]

    asyncio.run(run())
    peer.close()


def test_a_coroutine_that_is_closed_as_it_waits_leaves_nothing_behind(inbox: Inbox) -> None:
    async def run() -> None:
        waiting = inbox.link.wait_async(inbox.take, None, "message")
        waiting.send(None)
        waiting.close()
        assert inbox.link._waiting_loops == []

    asyncio.run(run())


def test_a_loop_that_is_gone_does_not_keep_others_from_the_short_way(inbox: Inbox) -> None:
    async def wait(link: Link) -> None:
        with pytest.raises(Timeout):
            await link.wait_async(inbox.take, 0.001, "message")
        assert not link.may_be_held

    asyncio.run(wait(inbox.link))
    assert inbox.link.may_be_held
