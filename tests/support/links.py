"""The smallest patterns there are, to try a link with, and a thread that waits on one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import zmq

from mesh.sockets.link import Link, Recipient
from mesh.sockets.parts import read_parts
from tests.support.waiting import until


class Inbox:
    """The smallest pattern: a PULL socket, and an attempt that takes one message."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.link = Link("inbox")
        self.messages: deque[bytes] = deque()
        self.socket = context.socket(zmq.PULL)
        self.socket.bind(endpoint)
        with self.link:
            self.link.add(self.socket)

    def take(self) -> bytes | None:
        parts = read_parts(self.socket)
        return None if parts is None else bytes(parts[0])

    def give_back(self, message: bytes) -> None:
        raise AssertionError("this inbox has nowhere to put it")


def push(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.PUSH)
    socket.linger = 5000
    socket.connect(endpoint)
    return socket


def endpoint_of(inbox: Inbox) -> str:
    return inbox.socket.getsockopt_string(zmq.LAST_ENDPOINT)


class Box:
    """A pattern without sockets: what is waited for lies in an inbox."""

    def __init__(self) -> None:
        self.items: deque[int] = deque()
        self.link = Link("box", partial(bool, self.items))

    def take(self) -> int | None:
        return self.items.popleft() if self.items else None

    def put(self, *items: int) -> None:
        """Without a word to anybody. Under the lock."""
        self.items.extend(items)


@contextlib.contextmanager
def long_before_its_deadline(deadline_s: float = 10) -> Iterator[None]:
    """Who waits that long would look again in the end, woken or not."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < deadline_s - 2, "its deadline made it look again"


class Slot:
    """As a pattern keeps it with a call."""

    waiter: Recipient | None = None


class Taker:
    """A thread that takes one, and is gone."""

    def __init__(self, link: Link, take: Callable[[], object], slot: Slot | None = None) -> None:
        self.got: object = None
        self._link, self._take, self._slot = link, take, slot
        self.thread = threading.Thread(target=self._run)
        waiting = len(link._threads)
        self.thread.start()
        until(lambda: len(link._threads) > waiting, "the wait")

    def _run(self) -> None:
        self.got = self._link.wait(self._take, 10, "message", slot=self._slot)

    def join(self) -> object:
        self.thread.join(5)
        assert not self.thread.is_alive(), "a wake-up went missing"
        return self.got
