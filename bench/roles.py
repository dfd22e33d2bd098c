"""What a worker can be, whoever's sockets it uses: the loops and the clock are these for all sides.

A throughput is timed from just before the first send to just after the last receipt; both ends read
the one monotonic clock of this machine. Each payload is looked into. A worker that gets nothing for
too long is interrupted (`Stalled`), and says how far it came.
"""

from __future__ import annotations

import contextlib
import mmap
import signal
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

from bench.setting import Address, Setting

BATCH = 1000
"""Payloads handed to one `send_many`, as long as they have no more than `BATCH_BYTES`."""
BATCH_BYTES = 16 << 20
STAMP = struct.Struct("<q")


class Stalled(Exception):
    """A block took longer than it may."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `Stalled` in this, the main thread, wherever it is by then. Costs nothing meanwhile: it
    is done by what handles Ctrl-C, with which everybody has to reckon anyway."""
    until = time.monotonic() + seconds
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except KeyboardInterrupt:
        if time.monotonic() < until:
            raise
        raise Stalled from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Role:
    """One end of one side."""

    def __init__(self, setting: Setting, address: Address) -> None:
        self.setting = setting
        self.address = address

    def connect(self) -> None:
        """Block until whoever belongs to it is there. Nothing may be lost from then on."""


class Sender(Role):
    """Sends to one or several."""

    sends: list[Callable[[Any], Any]]
    """What sends one payload: one for each topic."""

    send_batch: Callable[[list[Any]], Any] | None = None
    """What sends many in one call, where there is such a thing."""

    def finish(self) -> None:
        """Have what was accepted leave, for those that do not by themselves."""

    def send(self, count: int, seconds: float) -> dict[str, Any]:
        """Send `count` payloads as fast as it goes."""
        pool = cycle(self.setting.payloads())
        send_batch = self.send_batch if self.setting.many else None
        batch = max(1, min(BATCH, BATCH_BYTES // max(1, self.setting.size)))
        with at_most(seconds):
            start = time.perf_counter()
            if send_batch is not None:
                for done in range(0, count, batch):
                    send_batch(list(islice(pool, min(batch, count - done))))
            elif len(self.sends) == 1:
                (send,) = self.sends
                for payload in islice(pool, count):
                    send(payload)
            else:
                for send, payload in islice(zip(cycle(self.sends), pool, strict=False), count):
                    send(payload)
            self.finish()
            end = time.perf_counter()
        return {"start": start, "end": end}

    def trickle(self, count: int, hz: float, seconds: float) -> dict[str, Any]:
        """Send `count` payloads at a steady rate, each with its time of sending in front."""
        send, rest = self.sends[0], bytes(self.setting.size - STAMP.size)
        with at_most(seconds):
            due = time.perf_counter()
            for _ in range(count):
                due += 1 / hz
                time.sleep(max(0.0, due - time.perf_counter()))
                send(STAMP.pack(time.perf_counter_ns()) + rest)
        return {}


class Receiver(Role, ABC):
    """Receives what a `Sender` sends."""

    @abstractmethod
    def take(self, count: int, progress: list[int]) -> None:
        """Receive `count` payloads. ``progress[0]`` is how many were received, ``progress[1]`` the
        sum of what was looked up in them; both need to be right only at the end and when
        interrupted."""

    @abstractmethod
    def take_one(self) -> bytes:
        """Receive one."""

    def receive(self, count: int, seconds: float) -> dict[str, Any]:
        progress = [0, 0]
        with contextlib.suppress(Stalled), at_most(seconds):
            self.take(count, progress)
        end = time.perf_counter()
        return {"end": end, "count": progress[0], "total": progress[1]}

    def work(self, path: str) -> dict[str, Any]:
        """Receive for ever, and keep count where it can be looked at: two integers at `path`, how
        many and the sum of what was looked up."""
        with open(path, "r+b") as file:
            cells = memoryview(mmap.mmap(file.fileno(), 16)).cast("q")
        take, key = self.take_one, self.setting.key
        while True:
            cells[1] += take()[key]
            cells[0] += 1

    def latencies(self, count: int, seconds: float) -> dict[str, Any]:
        """How long each of `count` payloads of a trickle was on its way, in seconds."""
        took: list[float] = []
        with contextlib.suppress(Stalled), at_most(seconds):
            for _ in range(count):
                (sent_ns,) = STAMP.unpack_from(self.take_one())
                took.append((time.perf_counter_ns() - sent_ns) / 1e9)
        return {"latencies": took}


class Server(Role):
    """Answers requests with what they held, by threads of its own."""


class Caller(Role, ABC):
    """Calls a `Server`."""

    @abstractmethod
    def call(self) -> Callable[[bytes], Any]:
        """What calls it once and returns the answer's payload; one for each thread."""

    def calls(self, count: int, threads: int, seconds: float) -> dict[str, Any]:
        """`count` calls in each of so many threads at once: what each took, in seconds. The main
        thread keeps the deadline: by a signal, which no caller is to have to do with."""
        payload = self.setting.payloads()[0]
        functions = self._functions(threads)
        found: list[list[float]] = []
        barrier = threading.Barrier(threads + 1)

        def run(function: Callable[[bytes], Any]) -> None:
            barrier.wait()
            found.append(_calling(function, payload, count))

        running = [threading.Thread(target=run, args=[f], daemon=True) for f in functions]
        with at_most(seconds):
            for thread in running:
                thread.start()
            barrier.wait()
            start = time.perf_counter()
            for thread in running:
                thread.join()
            return {**_timed(found), "elapsed": time.perf_counter() - start}

    _made: list[Callable[[bytes], Any]]

    def _functions(self, count: int) -> list[Callable[[bytes], Any]]:
        if not hasattr(self, "_made"):
            self._made = []
        while len(self._made) < count:
            self._made.append(self.call())
        return self._made[:count]


def _calling(function: Callable[[bytes], Any], payload: bytes, count: int) -> list[float]:
    clock, took = time.perf_counter, []
    for _ in range(count):
        start = clock()
        answer = function(payload)
        took.append(clock() - start)
        if answer[-1] != payload[-1]:
            raise ValueError("it answered something else")
    return took


def _timed(found: list[list[float]]) -> dict[str, Any]:
    latencies = [value for values in found for value in values]
    return {"latencies": latencies, "elapsed": sum(latencies), "count": len(latencies)}
