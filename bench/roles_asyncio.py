"""What a worker can be in asyncio: it has a loop of its own, which stands still between blocks."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any, TypeVar

from bench.roles import Role, Server
from bench.setting import Address, Setting

T = TypeVar("T")


class Looped:
    """Has an event loop, of uvloop's if the setting says so."""

    def __init__(self, uvloop: bool) -> None:
        if uvloop:
            import uvloop as faster

            self.loop: asyncio.AbstractEventLoop = faster.new_event_loop()
        else:
            self.loop = asyncio.new_event_loop()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(coroutine)


class AsyncServer(Server, ABC):
    """Serves in a loop for ever."""

    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.looped = Looped(setting.uvloop)

    @abstractmethod
    async def start(self) -> None:
        """Be ready to answer."""

    @abstractmethod
    async def serve(self) -> None:
        """Answer for ever."""


class AsyncCaller(Role, ABC):
    """Calls from coroutines."""

    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.looped = Looped(setting.uvloop)

    @abstractmethod
    async def start(self) -> None:
        """Be ready to call: once, before the first."""

    @abstractmethod
    async def call(self, payload: bytes) -> Any:
        """Call once and return the answer's payload. So many as are in flight run at once."""

    def connect(self) -> None:
        self.looped.run(asyncio.wait_for(self.start(), 20))

    def calls(self, count: int, in_flight: int, seconds: float) -> dict[str, Any]:
        """`count` calls by each of so many tasks at once: what each took, in seconds."""
        self.in_flight = in_flight
        return self.looped.run(asyncio.wait_for(self._calls(count, in_flight), seconds))

    async def _calls(self, count: int, in_flight: int) -> dict[str, Any]:
        payload = self.setting.payloads()[0]
        clock, took = time.perf_counter, []

        async def calling() -> None:
            for _ in range(count):
                start = clock()
                answer = await self.call(payload)
                took.append(clock() - start)
                if answer[-1] != payload[-1]:
                    raise ValueError("it answered something else")

        start = clock()
        if in_flight == 1:
            await calling()
        else:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(in_flight):
                    tasks.create_task(calling())
        return {"latencies": took, "elapsed": clock() - start, "count": len(took)}
