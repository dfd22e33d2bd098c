"""The mesh, by its public API alone.

Over tcp the workers are two hosts to each other: each has a runtime directory that the other cannot
see, since the path of it goes through ``/proc/self/cwd``, and one is the other's seed. That it is
tcp in plain text is checked.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

from bench.roles import Caller, Receiver, Role, Sender, Server
from bench.roles_asyncio import AsyncCaller, AsyncServer
from bench.setting import Address, Setting
from mesh import InsecureWarning, Node

TRANSPORTS = ("ipc", "tcp")
PREFETCH = 1024
CONNECT_S = 20.0


def missing() -> str | None:
    return None


def node_of(role: Role, *, first: bool = False) -> Node:
    """A node; over tcp it dials the `first`."""
    setting, address = role.setting, role.address
    for variable in ("MESH_SECRET", "MESH_SEEDS"):
        os.environ.pop(variable, None)
    os.environ["MESH_REALM"] = "bench"
    options = {"compress": setting.compress} | dict(setting.options)
    if setting.transport == "ipc":
        os.environ["MESH_RUNTIME_DIR"] = f"{address.directory}/run"
    else:
        os.environ["MESH_RUNTIME_DIR"] = "/proc/self/cwd/run"
        warnings.simplefilter("ignore", InsecureWarning)
        options |= {"insecure_lan": True, "interfaces": ("127.0.0.1",), "discovery": ()}
        options |= {"port": address.port} if first else {"seeds": (f"127.0.0.1:{address.port}",)}
    return Node(type(role).__name__.lower(), **options)


def check_transport(node: Node, transport: str) -> None:
    found = {peer.transport for peer in node.peers.values()}
    if found != {transport}:
        raise RuntimeError(f"peers are reached over {found or 'nothing'}, not {transport}")


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
}
