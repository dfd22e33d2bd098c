"""NATS JetStream with a push consumer: the server sends a queue group what it consumes, unasked.

Its documentation recommends pulling, which `bench.sides.jetstream` does; to a callback of `nats-py`
pushing was 2.5 times as fast here. All the rest is the same.
"""

from __future__ import annotations

import asyncio
from typing import Any

from bench.sides import jetstream
from bench.sides.jetstream import GROUP, HELD_BYTES_MAX, HELD_MESSAGES_MAX, SUBJECT, Stream

TRANSPORTS = jetstream.TRANSPORTS
missing = jetstream.missing
helpers = jetstream.helpers


class PushedStream(Stream):
    async def _consume(self, count: int, progress: list[int]) -> None:
        done = asyncio.Event()

        async def received(message: Any) -> None:
            progress[1] += message.data[-1]
            await message.ack()
            progress[0] += 1
            if progress[0] == count:
                done.set()

        subscription = await self.context.subscribe(
            SUBJECT,
            queue=GROUP,  # and the consumer's name
            cb=received,
            manual_ack=True,
            pending_msgs_limit=HELD_MESSAGES_MAX,
            pending_bytes_limit=HELD_BYTES_MAX,
        )
        await done.wait()
        await self.client.flush()
        await subscription.unsubscribe()


ROLES = {"log": PushedStream}
