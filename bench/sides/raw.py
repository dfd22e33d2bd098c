"""pyzmq as it is: what the mesh is built on, and so the measure of what it adds.

Topics: XPUB with ``XPUB_NODROP`` and SUB. A plain PUB drops what a subscriber has no room for; with
that option a blocking send waits instead, which is what ``when_full="wait"`` promises too. Payloads
of one topic go as a single frame, subscribed to by the empty prefix: the fastest there is. The
high-water mark is 10,000 messages, or 64 MiB of them: 20 % faster here than libzmq's 1000. Large
payloads are neither copied by the sender nor by the receiver; below that, copying is faster.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import msgpack
import zmq
import zmq.asyncio

from bench.roles import Caller, Receiver, Sender, Server
from bench.roles_asyncio import AsyncCaller, AsyncServer
from bench.setting import Address, Setting

TRANSPORTS = ("ipc", "tcp")
HELD_BYTES_MAX = 64 << 20
Socket = zmq.Socket[bytes]


def missing() -> str | None:
    return None


def socket_of(kind: int, setting: Setting) -> Socket:
    socket: Socket = zmq.Context.instance().socket(kind)
    socket.set_hwm(max(64, min(10_000, HELD_BYTES_MAX // setting.size)))
    return socket


def sending(socket: Socket, setting: Setting) -> Callable[[Any], Any]:
    if setting.shape == "dict":
        return lambda payload: socket.send(msgpack.packb(payload))
    return functools.partial(socket.send, copy=False) if setting.large else socket.send


def sending_on(socket: Socket, topic: bytes) -> Callable[[Any], Any]:
    """Topic and payload in one frame: twice as fast as in two."""
    return lambda payload: socket.send(topic + b" " + payload)


class Publisher(Sender):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.socket = socket_of(zmq.XPUB, setting)
        self.socket.setsockopt(zmq.XPUB_NODROP, 1)
        self.socket.setsockopt(zmq.XPUB_VERBOSE, 1)  # each subscriber is seen to arrive
        self.socket.bind(address.zmq)
        self.sends = [sending(self.socket, setting)]
        if setting.topics > 1:
            names = (f"bench/{number}".encode() for number in range(setting.topics))
            self.sends = [sending_on(self.socket, name) for name in names]

    def connect(self) -> None:
        for _ in range(self.setting.receivers):
            assert self.socket.recv()[:1] == b"\1"


class _Reader(Receiver):
    socket: Socket

    def take(self, count: int, progress: list[int]) -> None:
        recv, key, total, got = self.socket.recv, self.setting.key, 0, 0
        try:
            if self.setting.topics > 1:
                while got < count:
                    _topic, _, payload = recv().partition(b" ")
                    total += payload[key]
                    got += 1
            elif self.setting.shape == "dict":
                while got < count:
                    total += msgpack.unpackb(recv())[key]
                    got += 1
            elif self.setting.large:
                while got < count:
                    total += recv(copy=False).buffer[key]
                    got += 1
            else:
                while got < count:
                    total += recv()[key]
                    got += 1
        finally:
            progress[:] = [got, total]

    def take_one(self) -> bytes:
        return self.socket.recv()


class Subscriber(_Reader):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.socket = socket_of(zmq.SUB, setting)
        self.socket.connect(address.zmq)
        self.socket.subscribe(b"")


class Pusher(Sender):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.socket = socket_of(zmq.PUSH, setting)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self.socket.bind(address.zmq)
        self.sends = [sending(self.socket, setting)]

    def connect(self) -> None:
        for _ in range(self.setting.receivers):
            self.monitor.recv_multipart()
        self.socket.disable_monitor()


class Puller(_Reader):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.socket = socket_of(zmq.PULL, setting)
        self.socket.connect(address.zmq)


class Router(Server):
    """Echoes in one thread."""

    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.socket = socket_of(zmq.ROUTER, setting)
        self.socket.bind(address.zmq)
        threading.Thread(target=self._echo, daemon=True).start()

    def _echo(self) -> None:
        recv, send = self.socket.recv_multipart, self.socket.send_multipart
        while True:
            send(recv())


class Dealer(Caller):
    """A socket for each thread, since sockets are not to be shared."""

    def call(self) -> Callable[[bytes], Any]:
        socket = socket_of(zmq.DEALER, self.setting)
        socket.connect(self.address.zmq)
        send, recv = socket.send, socket.recv

        def call(payload: bytes) -> bytes:
            send(payload)
            return recv()

        return call


class AsyncRouter(AsyncServer):
    async def start(self) -> None:
        self.socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self.socket.bind(self.address.zmq)

    async def serve(self) -> None:
        while True:
            await self.socket.send_multipart(await self.socket.recv_multipart())


class AsyncDealer(AsyncCaller):
    """One socket. Answers come in the order of the requests, since one server has them all: a call
    alone reads its own, and of several in flight a task reads for all, which is faster than a
    socket for each."""

    async def start(self) -> None:
        self.socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self.socket.connect(self.address.zmq)
        self.waiting: deque[asyncio.Future[bytes]] = deque()
        self.reader: asyncio.Task[None] | None = None

    async def call(self, payload: bytes) -> bytes:
        if self.in_flight == 1:
            await self.socket.send(payload)
            answer: bytes = await self.socket.recv()
            return answer
        if self.reader is None:
            self.reader = asyncio.create_task(self._read())
        future: asyncio.Future[bytes] = self.looped.loop.create_future()
        self.waiting.append(future)
        await self.socket.send(payload)
        return await future

    async def _read(self) -> None:
        while True:
            answer = await self.socket.recv()
            self.waiting.popleft().set_result(answer)


ROLES = {
    "publisher": Publisher,
    "subscriber": Subscriber,
    "pusher": Pusher,
    "puller": Puller,
    "server": Router,
    "caller": Dealer,
    "async-server": AsyncRouter,
    "async-caller": AsyncDealer,
}
