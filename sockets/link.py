"""A link: ZeroMQ sockets under one lock, used and waited for in the caller's own thread.

Promises: whoever waits is woken when what it waits for may have come, from whichever socket or
thread; nobody spins; every wait ends by its deadline, or when the link is closed. The lock is not
held while waiting, but for a moment where nobody else is about (`mesh.sockets.moment`), so that the
control thread can always connect and disconnect peers.

Why it is written as it is. A ZeroMQ socket's descriptor says only "look at the socket", and any
operation, by any thread, can swallow that: so whoever leaves the link while others wait looks
whether there is something left, and wakes the next of them, or keeps it in mind for itself. The
*first* waiting thread watches the sockets; the others sleep on a wake-up descriptor of their own,
and are promoted in turn, so that one message wakes one thread. An event loop watches for itself,
since it may be stopped at any time.

A pattern builds on it with *attempts*: functions called under the lock that return what was waited
for, or None after having read their sockets until these were empty. Knows nothing of frames.
"""

from __future__ import annotations

import math
import select
import threading
import time
from collections.abc import Callable
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import zmq

from mesh.errors import Closed, Forked, Timeout
from mesh.sockets.parts import POLLIN, look
from mesh.sockets.sleeping import Sleeper
from mesh.sockets.sleeping import own as _own
from mesh.timeouts import within

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from mesh.sockets.link_asyncio import LoopWaiter

T = TypeVar("T")

_serials = count(1)


_loops: Any = None
"""`mesh.sockets.link_asyncio`, once somebody needed it."""


def _load_loops() -> Any:
    global _loops
    from mesh.sockets import link_asyncio

    _loops = link_asyncio
    return _loops


class Waiter(Protocol):
    def wake(self) -> None:
        """Have it attempt again. Called under the link's lock, from any thread."""


class Recipient(Waiter, Protocol):
    def hand(self, result: Any) -> None:
        """Have it return `result`. Called under the link's lock, from any thread."""


class Slot(Protocol):
    """For `Link.hand` and directed wake-ups: a pattern keeps it with a call, the link says who
    waits."""

    waiter: Recipient | None


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
        self.rang = False
        """Under the lock, in an attempt: the descriptor has just said that a socket has something,
        so that who has one socket may read at once. Looking first costs as much as reading."""
        self.met_at = -math.inf
        """When a thread last found the lock taken as it was about to wait."""
        self._poll = select.epoll()
        self._fd = self._poll.fileno()
        self._serial = next(_serials)
        self._stirred = False
        """Whether there may be something that nobody is sure to read: who attempts, and does not
        wait yet, looks again."""
        self._sockets: dict[zmq.Socket[bytes], int] = {}
        self.looks: list[tuple[zmq.Socket[bytes], int]] = []
        """The sockets, as `look` wants them."""
        self._threads: list[Sleeper] = []
        """Those that wait; the first watches the sockets."""
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
        self.looks.append((socket, POLLIN))

    def discard(self, socket: zmq.Socket[bytes], linger_ms: int = 0) -> None:
        """Close `socket` and forget it. What it still has to send goes on for `linger_ms`."""
        fd = self._sockets.pop(socket)
        self.looks.remove((socket, POLLIN))
        self._poll.unregister(fd)
        socket.close(linger=linger_ms)

    def readable(self) -> bool:
        """Whether a socket has something to read. Takes notice of all that came since."""
        return bool(look(self.looks, 0))

    def wake_all(self) -> None:
        """Have every waiter attempt again: something other than a message changed."""
        self._stirred = True
        waiters: list[Waiter] = [*self._threads, *self._waiting_loops]
        for waiter in waiters:
            waiter.wake()

    def hand(self, slot: Slot, result: object) -> None:
        """What the wait with `slot` is for is here: have it return `result`, which needs neither
        the lock nor another attempt. If it does not wait yet, its first attempt finds that out."""
        waiter, slot.waiter = slot.waiter, None
        if waiter is None:
            return
        threads = self._threads
        if isinstance(waiter, Sleeper) and waiter in threads:
            waiter.result = result  # first: if Ctrl-C comes before it is woken, its nap ends
            led = threads[0] is waiter
            threads.remove(waiter)
            if led and threads:
                threads[0].wake()  # somebody has to watch the sockets
        waiter.hand(result)

    def has_loops(self) -> bool:
        """Whether an event loop has waited here, and may again. Under the lock."""
        if self.loops:
            for loop in [loop for loop in self.loops if loop.is_closed()]:
                del self.loops[loop]
        return bool(self.loops)

    @property
    def alone(self) -> bool:
        """Whether nobody waits. Under the lock."""
        return not self._threads and not self._waiting_loops

    @property
    def may_be_held(self) -> bool:
        """Whether nobody waits, nor a loop is about to, and it is open: so that who has the lock
        may keep it for a moment (`mesh.sockets.moment`)."""
        return not (self._threads or self._waiting_loops or self._closed or self.has_loops())

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
        sleeper = _own.sleeper
        nested = sleeper.busy
        if nested:
            sleeper = Sleeper()  # a signal handler waits in the midst of a wait
        threads = self._threads
        if self.lock.locked():
            self.met_at = time.monotonic()
        try:
            with self.lock:
                result = self._first(attempt)
                if result is not None:
                    return result
                if timeout == 0:
                    raise Timeout(f"no {what} {within(timeout)}")
                # Under the lock still: nothing that anybody took notice of can have come since.
                sleeper.busy = True
                sleeper.result = None
                # A nested one comes first: this thread's other one cannot watch meanwhile.
                threads.insert(0 if nested else len(threads), sleeper)
                if slot is not None:
                    slot.waiter = sleeper
                leads = threads[0] is sleeper
                if self._stirred:
                    sleeper.wake()
            return self._sleep(sleeper, leads, attempt, timeout, what, slot, retry_s)
        finally:
            if sleeper.busy:
                try:
                    self._end(sleeper, slot)
                except BaseException:  # Ctrl-C: who is gone must not stay the one that watches
                    self._end(sleeper, slot)
                    raise

    def _end(self, sleeper: Sleeper, slot: Slot | None) -> None:
        """A wait is over, however it ended."""
        if sleeper in self._threads:
            with self.lock:
                self._leave(sleeper, slot)
        sleeper.busy = False

    def _sleep(
        self,
        sleeper: Sleeper,
        leads: bool,
        attempt: Callable[[], T | None],
        timeout: float | None,
        what: str,
        slot: Slot | None,
        retry_s: float | None,
    ) -> T:
        """The part of `wait` that waits."""
        left_s = math.inf if timeout is None else timeout
        until = time.monotonic() + left_s
        while True:
            if retry_s is not None and retry_s < left_s:
                left_s = retry_s
            rang = sleeper.sleep(self._fd if leads else -1, self._serial, left_s)
            if sleeper.result is not None:
                return cast(T, sleeper.result)
            with self.lock:
                if self._closed is not None:
                    raise self._closed_error()
                self.attempts += 1
                self.rang = rang
                result = attempt()
                if result is not None:
                    self._leave(sleeper, slot)
                    return result
                if sleeper.result is not None:  # handed to it since it woke, or in the attempt
                    return cast(T, sleeper.result)
                leads = self._threads[0] is sleeper
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise Timeout(f"no {what} {within(timeout)}")

    def _first(self, attempt: Callable[[], T | None]) -> T | None:
        """The first attempt of a wait. Under the lock."""
        if self._closed is not None:
            raise self._closed_error()
        self.rang = self._stirred = False
        if not (self._threads or self._waiting_loops):
            return attempt()
        try:
            return attempt()
        finally:
            self.pass_on(False)

    def _leave(self, sleeper: Sleeper, slot: Slot | None) -> None:
        """A thread waits no longer. Under the lock."""
        if sleeper not in self._threads:
            return
        led = self._threads[0] is sleeper
        self._threads.remove(sleeper)
        if slot is not None:
            slot.waiter = None
        if self._threads or self._waiting_loops:
            self.pass_on(led)

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
        loops = _loops or _load_loops()
        loop = loops.running_loop()
        if self.lock.locked():
            self.met_at = time.monotonic()
        with self.lock:
            result = self._first(attempt)
            if result is not None:
                return result
            if timeout == 0:
                raise Timeout(f"no {what} {within(timeout)}")
            waiter = self.loops.get(loop) or loops.loop_waiter(self, loop)
            wait = waiter.begin(attempt, timeout, what, slot, retry_s)
            if self._stirred:
                waiter.wake()
        try:
            return await wait.future
        except (loops.CancelledError, GeneratorExit):
            waiter.end(wait, give_back)
            raise
        finally:
            # It may hold an error, whose traceback holds this frame: a circle around the link.
            del wait

    def run(self, operation: Callable[[], T]) -> T:
        """Do `operation` under the lock; if others wait, see that nothing is left lying that they
        wait for. Raises `Closed`."""
        with self.lock:
            self.check_open()
            try:
                return operation()
            finally:
                if self._threads or self._waiting_loops:
                    self.pass_on(False)

    def __enter__(self) -> None:
        """`run` as a context, for a node's own threads, and for links that nobody else has yet: in
        the main thread a KeyboardInterrupt could come between taking the lock and being inside, and
        nobody would ever release it."""
        if self.lock.locked():
            self.met_at = time.monotonic()
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
                self.pass_on(False)
        finally:
            self.lock.release()

    def pass_on(self, led: bool) -> None:
        """Somebody leaves, or an operation ended: wake the next if there is something for it, or if
        it has to take over watching the sockets from a thread that `led`."""
        if self._closed is not None:
            return
        if (led and self._threads) or self._ready() or self.readable():
            if self._threads:
                self._threads[0].wake()
                return
            self._stirred = True  # a loop may be busy, or stopped
            for waiter in tuple(self._waiting_loops):
                waiter.wake()

    # -- For event loops, under the lock -----------------------------------------------------

    def join(self, waiter: LoopWaiter) -> None:
        self._waiting_loops.append(waiter)

    def leave(self, waiter: LoopWaiter) -> None:
        if waiter in self._waiting_loops:
            self._waiting_loops.remove(waiter)
            if self._threads or self._waiting_loops:
                self.pass_on(False)

    def check_open(self) -> None:
        if self._closed is not None:
            raise self._closed_error()

    def fileno(self) -> int:
        """Readable while a socket wants to be looked at; for a poll set, never to be read."""
        return self._fd

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
                for waiter in self.loops.values():
                    waiter.wake()  # also one that watches though nobody waits
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
        self.looks.clear()

    def _closed_error(self) -> Closed:
        assert self._closed is not None
        return type(self._closed)(*self._closed.args)
