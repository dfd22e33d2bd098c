"""A link: ZeroMQ sockets under one lock, used and waited for in the caller's own thread.

Promises: whoever waits is woken when what it waits for may have come, from whichever socket or
thread; nobody spins; every wait ends by its deadline, or when the link is closed. The lock is never
held while waiting, so the control thread can always connect and disconnect peers.

Why it is written as it is. A ZeroMQ socket's descriptor says only "look at the socket", and any
operation, by any thread, can swallow that: so whoever leaves the link while others wait looks
whether there is something left, and wakes the next of them. The *first* waiting thread watches the
sockets; the others sleep on a wake-up descriptor of their own and are promoted in turn, so that one
message wakes one thread. An event loop watches for itself, since it may be stopped at any time.

A pattern builds on it with *attempts*: functions called under the lock that return what was waited
for, or None after having read their sockets until these were empty. Knows nothing of frames.
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import zmq

from mesh.errors import Closed, Forked, Timeout
from mesh.sockets.frame import Part, is_array

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from mesh.sockets.link_asyncio import LoopWaiter

T = TypeVar("T")

# As plain integers: an enum member costs more than the call it is for.
_EVENTS = int(zmq.EVENTS)
_RCVMORE = int(zmq.RCVMORE)
_POLLIN = int(zmq.POLLIN)
_NOBLOCK = int(zmq.NOBLOCK)
_NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)

NO_COPY_BYTES_MIN: Final = 128 * 1024
"""A part from here on is sent without a copy. It costs a wake-up of pyzmq's own thread, which at
64 KiB is as dear as the copy; at 128 KiB it made 1.1 times as much, at 1 MiB 1.4 times."""


NAP_S = 0.5
"""Longest sleep of a thread, waking for nothing but Python's own sake: a signal that comes just
before the call that sleeps is noticed only after it (Ctrl-C would be lost until the next one)."""


class Waker:
    """A descriptor that a sleeping thread watches. One for each thread, for all its waits."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def wake(self) -> None:
        os.eventfd_write(self._fd, 1)

    def drain(self) -> None:
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return  # nobody woke us

    def __del__(self) -> None:
        os.close(self._fd)


class _Own(threading.local):
    def __init__(self) -> None:
        self.waker = Waker()


_own = _Own()


def _fresh_wakers() -> None:
    """A forked child shares its parent's descriptors: a wake-up meant for one would reach both."""
    global _own
    _own = _Own()


os.register_at_fork(after_in_child=_fresh_wakers)


class Waiter(Protocol):
    def wake(self) -> None:
        """Have it attempt again. Called under the link's lock, from any thread."""


class Slot:
    """For a directed wake-up: a pattern keeps it with a call, the link says who waits."""

    __slots__ = ("waiter",)

    def __init__(self) -> None:
        self.waiter: Waiter | None = None

    def wake(self) -> None:
        if self.waiter is not None:
            self.waiter.wake()


class Link:
    """Sockets under one lock. A pattern's core has one, and adds sockets under `lock`."""

    def __init__(self, what: str, ready: Callable[[], bool] = lambda: False) -> None:
        """`ready` says whether a waiter may find something beside the sockets, in an inbox say. It
        must not refer to the link's owner: the link would keep it, and its descriptors, alive."""
        self.what = what
        """How the link is called in errors: ``subscriber 'a/*'``."""
        self._ready = ready
        self.on_abandon: Callable[[], object] = lambda: None
        """Closes what is used without the lock. Must not refer to the link's owner either."""
        self.lock = threading.Lock()
        self.attempts = 0
        """How often waiters were woken to try again; a busy loop would show here."""
        self._poll = select.epoll()
        self._sockets: dict[zmq.Socket[bytes], int] = {}
        self._threads: list[_ThreadWaiter] = []
        self._waiting_loops: list[LoopWaiter] = []
        self.loops: dict[AbstractEventLoop, LoopWaiter] = {}
        self._closed: Closed | None = None

    # -- Sockets: all of these under the lock ------------------------------------------------

    def add(self, socket: zmq.Socket[bytes]) -> None:
        """Watch `socket` from now on; the link closes it in the end."""
        fd = socket.getsockopt(zmq.FD)
        assert isinstance(fd, int)
        self._poll.register(fd, select.EPOLLIN)
        self._sockets[socket] = fd

    def discard(self, socket: zmq.Socket[bytes], linger_ms: int = 0) -> None:
        """Close `socket` and forget it. What it still has to send goes on for `linger_ms`."""
        fd = self._sockets.pop(socket)
        self._poll.unregister(fd)
        socket.close(linger=linger_ms)

    def readable(self) -> bool:
        """Whether a socket has something to read. Takes notice of all that came since."""
        return any([has_input(socket) for socket in self._sockets])

    def wake_all(self) -> None:
        """Have every waiter attempt again: something other than a message changed."""
        waiters: list[Waiter] = [*self._threads, *self._waiting_loops]
        for waiter in waiters:
            waiter.wake()

    # -- Waiting -----------------------------------------------------------------------------

    def wait(
        self,
        attempt: Callable[[], T | None],
        timeout: float | None,
        what: str,
        *,
        slot: Slot | None = None,
        retry_s: float | None = None,
    ) -> T:
        """Return what `attempt` returns once that is not None, blocking this thread until then.

        `timeout` in seconds: None waits for ever, 0 does not wait. `what` completes the sentence
        "no … within 2 s" of `Timeout`. With `retry_s` it is tried again at least that often.
        Raises `Timeout`, `Closed`, and whatever `attempt` raises. Safe from any thread.
        """
        result = self.run(attempt)
        if result is not None:
            return result
        if timeout == 0:
            raise Timeout(f"no {what} at once")
        deadline = None if timeout is None else time.monotonic() + timeout
        waiter = _ThreadWaiter(_own.waker)
        try:
            with self.lock:
                self.check_open()
                self._threads.append(waiter)
                if slot is not None:
                    slot.waiter = waiter
                self.attempts += 1
                result = attempt()  # what came since, when nobody was waiting for it yet
                if result is not None:
                    return result
                leads = self._threads[0] is waiter
            while True:
                waiter.sleep(self._poll if leads else None, deadline, retry_s)
                with self.lock:
                    self.check_open()
                    self.attempts += 1
                    result = attempt()
                    if result is not None:
                        return result
                    leads = self._threads[0] is waiter
                if deadline is not None and time.monotonic() >= deadline:
                    raise Timeout(f"no {what} within {timeout:g} s")
        finally:
            if waiter in self._threads:
                with self.lock:
                    led = self._threads[0] is waiter
                    self._threads.remove(waiter)
                    if slot is not None:
                        slot.waiter = None
                    self._pass_on(led)

    async def wait_async(
        self,
        attempt: Callable[[], T | None],
        timeout: float | None,
        what: str,
        *,
        give_back: Callable[[T], None] = lambda result: None,
        slot: Slot | None = None,
        retry_s: float | None = None,
    ) -> T:
        """`wait` for a coroutine of the running event loop. Cancelling it leaves nothing behind.

        A result that came together with the cancellation goes to `give_back`, under the lock.
        """
        result = self.run(attempt)
        if result is not None:
            return result
        if timeout == 0:
            raise Timeout(f"no {what} at once")
        from mesh.sockets.link_asyncio import loop_waiter

        return await loop_waiter(self).wait(
            attempt, timeout, what, give_back=give_back, slot=slot, retry_s=retry_s
        )

    def run(self, operation: Callable[[], T]) -> T:
        """Do `operation` under the lock; if others wait, see that nothing is left lying that they
        wait for. Raises `Closed`."""
        with self.lock:
            self.check_open()
            try:
                return operation()
            finally:
                if self._threads or self._waiting_loops:
                    self._pass_on(False)

    def __enter__(self) -> None:
        """`run` as a context, for a node's own threads, and for links that nobody else has yet: in
        the main thread a KeyboardInterrupt could come between taking the lock and being inside, and
        nobody would ever release it."""
        self.lock.acquire()
        if self._closed is not None:
            self.lock.release()
            raise self._closed_error()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            if self._threads or self._waiting_loops:
                self._pass_on(False)
        finally:
            self.lock.release()

    def _pass_on(self, led: bool) -> None:
        """Somebody leaves, or an operation ended: wake the next if there is something for it, or if
        it has to take over watching the sockets from a thread that `led`."""
        if self._closed is not None:
            return
        if (led and self._threads) or self._ready() or self.readable():
            if self._threads:
                self._threads[0].wake()
            else:
                for waiter in tuple(self._waiting_loops):
                    waiter.wake()

    # -- For event loops, under the lock -----------------------------------------------------

    def join(self, waiter: LoopWaiter) -> None:
        self._waiting_loops.append(waiter)

    def leave(self, waiter: LoopWaiter) -> None:
        if waiter in self._waiting_loops:
            self._waiting_loops.remove(waiter)
            self._pass_on(False)

    def check_open(self) -> None:
        if self._closed is not None:
            raise self._closed_error()

    def fileno(self) -> int:
        """Readable while a socket wants to be looked at; for a poll set, never to be read."""
        return self._poll.fileno()

    # -- Its end -----------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closed is not None

    def close(self, linger_ms: int = 0, *, first: Callable[[], object] = lambda: None) -> None:
        """Close the sockets and have every waiter raise `Closed`. Idempotent, does not wait.

        What is to be done `first` is done under the lock, once. The poll set goes with the last
        reference: nobody may be asleep on it when it does.
        """
        with self.lock:
            if self._closed is not None:
                return  # also in a forked child, where the sockets are the parent's
            try:
                first()
            finally:
                self._closed = Closed(f"{self.what} is closed")
                for socket in list(self._sockets):
                    self.discard(socket, linger_ms)
                self.wake_all()
                self.loops.clear()  # they refer to this link

    def abandon(self) -> None:
        """In a forked child: the sockets belong to the parent, and nothing may touch them here."""
        self.lock = threading.Lock()
        self._closed = Forked(
            f"{self.what} belongs to the parent of this process; make a new Node after fork()"
        )
        self.on_abandon()
        self._threads.clear()
        self._waiting_loops.clear()
        self._sockets.clear()

    def _closed_error(self) -> Closed:
        assert self._closed is not None
        return type(self._closed)(*self._closed.args)


class _ThreadWaiter:
    def __init__(self, waker: Waker) -> None:
        self._waker = waker
        self.wake = waker.wake

    def sleep(
        self, sockets: select.epoll | None, deadline: float | None, retry_s: float | None
    ) -> None:
        poller = select.poll()
        waker = self._waker.fileno()
        poller.register(waker, select.POLLIN)
        if sockets is not None:
            poller.register(sockets, select.POLLIN)
        until = math.inf if deadline is None else deadline
        if retry_s is not None:
            until = min(until, time.monotonic() + retry_s)
        fired: list[tuple[int, int]] = []
        while not fired and (left := until - time.monotonic()) > 0:
            fired = poller.poll(math.ceil(min(left, NAP_S) * 1000))
        if any(fd == waker for fd, _ in fired):
            self._waker.drain()


def has_input(socket: zmq.Socket[bytes]) -> bool:
    """Whether `socket` has something to read. Looking re-arms its descriptor."""
    return bool(int(socket.getsockopt(_EVENTS)) & _POLLIN)


def read_parts(socket: zmq.Socket[bytes], parts_max: int) -> list[Part] | None:
    """One whole ZeroMQ message without waiting, or None. Parts beyond `parts_max` are read and
    thrown away, all but one, so that the caller sees that there were too many.

    The bytes of an array are a view of what libzmq received. Nothing else is: while the main thread
    frees a `zmq.Frame`, pyzmq loses a Ctrl-C that comes just then.
    """
    try:
        parts: list[Part] = [socket.recv(_NOBLOCK)]
    except zmq.Again:
        return None
    while socket.getsockopt(_RCVMORE):
        if len(parts) == parts_max - 1 and is_array(parts[-1]):
            parts.append(socket.recv(_NOBLOCK, copy=False).buffer)
            continue
        part = socket.recv(_NOBLOCK)
        if len(parts) <= parts_max:
            parts.append(part)
    return parts


def send_parts(socket: zmq.Socket[bytes], parts: Sequence[Part]) -> bool:
    """Send one message without waiting; False if there is no room for it (nothing was sent). A
    large part is not copied: it must not change before it has left, whenever that is."""
    try:
        if len(parts) == 1:
            socket.send(parts[0], _NOBLOCK)
        else:
            for part in parts[:-1]:
                socket.send(part, _NOBLOCK_MORE)
            socket.send(parts[-1], _NOBLOCK, copy=len(parts[-1]) < NO_COPY_BYTES_MIN)
    except zmq.Again:
        return False
    return True
