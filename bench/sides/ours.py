"""The mesh, by its public API alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.roles import Caller, Receiver, Sender, Server
from bench.roles_asyncio import AsyncCaller, AsyncServer
from bench.setting import Address, Setting
from bench.sides.ours_log import Host, Stream
from bench.sides.ours_nodes import CONNECT_S, check_transport, node_of
from mesh import Node

TRANSPORTS = ("ipc", "tcp", "disk")
PREFETCH = 1024


def missing() -> str | None:
    return None


class Publisher(Sender):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.node = node_of(self, first=True)
        names = ["bench/0"]
        if setting.topics > 1:
            names = [f"bench/{number}" for number in range(setting.topics)]
        self.publishers = [self.node.publisher(name, when_full="wait") for name in names]
        self.sends = [publisher.send for publisher in self.publishers]
        self.send_batch = self.publishers[0].send_many

    def connect(self) -> None:
        for publisher in self.publishers:
            publisher.wait_for(self.setting.receivers, timeout=CONNECT_S)
        check_transport(self.node, self.setting.transport)


class _Reader(Receiver):
    node: Node
    handle: Any

    def take(self, count: int, progress: list[int]) -> None:
        key, total, got = self.setting.key, 0, 0
        try:
            if self.setting.many:
                recv_many = self.handle.recv_many
                while got < count and not self.setting.messages:
                    payloads = recv_many().payloads
                    for payload in payloads:
                        total += payload[key]
                    got += len(payloads)
                while got < count:
                    messages = recv_many()
                    for message in messages:
                        total += message.payload[key]
                    got += len(messages)
            else:
                recv = self.handle.recv
                while got < count:
                    total += recv().payload[key]
                    got += 1
        finally:
            progress[:] = [got, total]

    def take_one(self) -> bytes:
        payload: bytes = self.handle.recv().payload
        return payload


class Subscriber(_Reader):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.node = node_of(self)
        pattern = "bench/*" if setting.topics > 1 else "bench/0"
        self.handle = self.node.subscriber(pattern, views=setting.large and setting.views)

    def connect(self) -> None:
        self.node.wait_for_peers(1, timeout=CONNECT_S)


class Pusher(Sender):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.node = node_of(self, first=True)
        self.pusher = self.node.pusher("bench")
        self.sends = [self.pusher.send]
        self.send_batch = self.pusher.send_many

    def connect(self) -> None:
        self.pusher.wait_for(self.setting.receivers, timeout=CONNECT_S)
        check_transport(self.node, self.setting.transport)


class Puller(_Reader):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.node = node_of(self)
        self.handle = self.node.puller("bench", prefetch=PREFETCH)


class Echo(Server):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.node = node_of(self, first=True)
        self.node.service("bench")(lambda request: request)


class Client(Caller):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.node = node_of(self)
        self.client = self.node.client("bench")

    def connect(self) -> None:
        self.client.wait_for(1, timeout=CONNECT_S)
        check_transport(self.node, self.setting.transport)

    def call(self) -> Callable[[bytes], Any]:
        return self.client.request


class AsyncEcho(AsyncServer):
    async def start(self) -> None:
        self.node = node_of(self, first=True)

        @self.node.service("bench", concurrency=64)
        async def echo(request: Any) -> Any:
            return request

    async def serve(self) -> None:
        await self.looped.loop.create_future()


class AsyncClient(AsyncCaller):
    async def start(self) -> None:
        self.node = node_of(self)
        self.client = self.node.client("bench")
        await self.client.await_for(1, timeout=CONNECT_S)
        check_transport(self.node, self.setting.transport)

    async def call(self, payload: bytes) -> Any:
        return await self.client.arequest(payload)


ROLES = {
    "publisher": Publisher,
    "subscriber": Subscriber,
    "pusher": Pusher,
    "puller": Puller,
    "server": Echo,
    "caller": Client,
    "async-server": AsyncEcho,
    "async-caller": AsyncClient,
    "host": Host,
    "log": Stream,
}
