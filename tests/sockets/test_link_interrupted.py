"""Links whose waits are interrupted, by Ctrl-C or by signal handlers that use links themselves."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import zmq

from mesh.errors import Closed, Timeout
from mesh.sockets.sleeping import Sleeper
from tests.support.links import Box, Inbox, Slot, Taker, endpoint_of, long_before_its_deadline, push
from tests.support.waiting import until


@contextlib.contextmanager
def ctrl_c_in(name: str) -> Iterator[None]:
    """A Ctrl-C that is noticed on entering that function of this package, for once."""

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code.co_name == name and "/sockets/" in frame.f_code.co_filename:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)

    traced = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(traced)


@contextlib.contextmanager
def handling(handler: Callable[[], object], when: Callable[[], object]) -> Iterator[None]:
    """The main thread gets a signal once it waits, and `handler` runs in the midst of that."""
    before = signal.signal(signal.SIGUSR1, lambda *_: handler())

    def interrupt() -> None:
        until(when)
        time.sleep(0.05)  # on its way from there into its sleep
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    try:
        yield
    finally:
        interrupting.join()
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_handler_that_waits_on_the_link_it_interrupted_hears_of_what_comes(
    context: zmq.Context[zmq.Socket[bytes]], inbox: Inbox
) -> None:
    peer = push(context, endpoint_of(inbox))
    got: list[object] = []

    def handler() -> None:
        sending = threading.Timer(0.05, peer.send, (b"1",))
        sending.start()
        with long_before_its_deadline():
            got.append(inbox.link.wait(inbox.take, 10, "message"))
        sending.join()
        peer.send(b"2")

    with handling(handler, lambda: inbox.link._threads):
        assert inbox.link.wait(inbox.take, 5, "message") == b"2"
    assert got == [b"1"]
    peer.close()


def test_a_signal_handler_that_waits_takes_no_wake_up_from_the_wait_it_interrupts(box: Box) -> None:
    """Both in one thread, which has one descriptor to be woken by."""
    other = Box()

    def handler(number: int, frame: object) -> None:
        box.link.run(lambda: box.put(1))  # wakes the wait that it interrupts
        with pytest.raises(Timeout):
            other.link.wait(other.take, 0.01, "message")

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        main = threading.main_thread().ident
        assert main == threading.get_ident()

        def interrupt() -> None:
            until(lambda: box.link._threads, "the wait")
            signal.pthread_kill(main, signal.SIGUSR1)

        interrupting = threading.Thread(target=interrupt)
        interrupting.start()
        began = time.monotonic()
        assert box.link.wait(box.take, 5, "message") == 1
        assert time.monotonic() - began < 4, "its deadline made it look again"
        interrupting.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
        other.link.close()


def test_a_signal_handler_in_a_loops_thread_wakes_that_loop(inbox: Inbox) -> None:
    """It runs while the loop sleeps, which what is called soon does not end."""

    async def run() -> None:
        with pytest.raises(Closed):
            await inbox.link.wait_async(inbox.take, 10, "message")

    with long_before_its_deadline(), handling(inbox.link.close, lambda: inbox.link._waiting_loops):
        asyncio.run(run())


def test_ctrl_c_as_a_wait_ends_leaves_nobody_to_watch_who_is_gone(
    context: zmq.Context[zmq.Socket[bytes]], inbox: Inbox
) -> None:
    with pytest.raises(KeyboardInterrupt), ctrl_c_in("_leave"):
        inbox.link.wait(inbox.take, 0.01, "message")
    assert inbox.link._threads == []
    taker = Taker(inbox.link, inbox.take)
    with contextlib.closing(push(context, endpoint_of(inbox))) as peer:
        peer.send(b"1")
        assert taker.join() == b"1"


def test_ctrl_c_before_somebody_is_woken_with_his_result_costs_him_a_nap_at_most(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot, hand = Slot(), Sleeper.hand
    taker = Taker(inbox.link, inbox.take, slot)

    def interrupted(sleeper: Sleeper, result: object) -> None:
        monkeypatch.setattr(Sleeper, "hand", hand)
        raise KeyboardInterrupt

    monkeypatch.setattr(Sleeper, "hand", interrupted)
    with pytest.raises(KeyboardInterrupt), inbox.link.lock:
        inbox.link.hand(slot, "result")
    assert taker.join() == "result"
