"""Publishing to topics.

Guarantee: every subscriber gets each message at most once, in this node's order for each topic. A
subscriber without room loses the newest, which it counts (``when_full="drop"``; the publisher's
node counts only that it happened), or the
publisher waits (``when_full="wait"``), for all of its subscribers. A subscriber counted by
`Publisher.subscribers` misses nothing silently from then on.

The handle; what it works on is in `mesh.sockets.topics`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import msgspec

from mesh import limits
from mesh.options import check_count, check_timeout
from mesh.sockets import codec
from mesh.sockets.batch import BYTES_MAX, LIST_MESSAGES_MAX, Batch, Item, leading
from mesh.sockets.handle import Sending
from mesh.sockets.outgoing import Outgoing, encode_batch, encode_message
from mesh.sockets.topic import Topic
from mesh.sockets.topics import Topics

_BUFFERS: Final = frozenset({bytes, bytearray, memoryview})
_TOGETHER_MIN: Final = 8
"""Fewer that come together do not pay."""
_ALONE: Final = 64
"""How many to send one by one before it is looked again whether what follows goes together."""


class Publisher(Sending):
    """A handle to a topic, from `Node.publisher`. Safe from several threads; the order of their
    messages is the order in which their calls got the lock."""

    def __init__(
        self, topics: Topics, topic: Topic, owner: object, release: Callable[[], None]
    ) -> None:
        super().__init__(f"publisher {topic.name!r}", owner, release)
        self._topics = topics
        self._topic = topic
        self._batch = topic.batch
        """The topic's, or once this handle is closed one that is shut."""
        self._frame_bytes_max = min(BYTES_MAX, topic.batch.message_bytes_max)
        """So that no message in it is larger than a peer lets in."""

    @property
    def channel(self) -> str:
        """The name of the topic."""
        return self._topic.name

    @property
    def subscribers(self) -> int:
        """How many subscribers are connected and miss nothing from now on. Does not block."""
        return self._topics.link.run(lambda: self._topics.subscribers(self._topic))

    def send(
        self,
        payload: Any,
        headers: codec.Headers | None = None,
        timeout: float | None = None,
    ) -> None:
        """Publish one message.

        `payload`: see docs/payloads.md. A buffer that may be written to is copied; one that is
        read-only is not, and must not change. `headers`: str keys, plain values. With
        ``when_full="drop"`` it does not block; with ``"wait"`` it blocks while some subscriber has
        no room, up to `timeout` seconds (None: for ever). Raises `NotSerializable`,
        `PayloadTooLarge` (nothing was sent), `Timeout` (nothing was sent), `Closed`.
        """
        batch = self._batch
        if headers is None and len(batch.items) < batch.room:
            item = payload if type(payload) is bytes else msgspec.Raw(codec.pack(payload))
            if len(item) <= batch.item_bytes_max:
                batch.items.append(item)
                if not batch.room:
                    self._topics.settle(self._topic, item)
                return
        attempt = self._sending(payload, headers)
        if self._topics.link.run(attempt) is None:
            self._topics.link.wait(
                attempt, check_timeout(timeout), self._room, retry_s=limits.WAIT_FOR_ROOM_S
            )

    def send_many(self, payloads: Iterable[Any], *, timeout: float | None = None) -> int:
        """Send each of `payloads` in order; returns how many. `timeout` is for each of them.

        Of a list or tuple, small ones share frames at once; what an iterator yields is sent as it
        comes. An error ends it where it occurred: what came before was sent.
        """
        if not isinstance(payloads, list | tuple):
            return super().send_many(payloads, timeout=timeout)
        sent = 0
        while sent < len(payloads):
            chunk = payloads[sent : sent + LIST_MESSAGES_MAX]
            frame = self._frame_of(chunk)
            if frame is None:
                sent += super().send_many(chunk[:_ALONE], timeout=timeout)
                continue
            self._topics.link.wait(
                self._sending_frame(frame, chunk[frame.count - 1]),
                check_timeout(timeout),
                self._room,
                retry_s=limits.WAIT_FOR_ROOM_S,
            )
            sent += frame.count
        return sent

    def _frame_of(self, payloads: Sequence[Any]) -> Outgoing | None:
        """Those of `payloads` that come first, in a frame; None if they do not go together."""
        try:
            together, size = leading(payloads, self._frame_bytes_max)
            if together < min(len(payloads), _TOGETHER_MIN):
                return None
            frame = encode_batch(payloads[:together])
        except (TypeError, BufferError):  # no bytes, or buffers of another kind, such as arrays
            return None
        # Short bytes have two more each in MessagePack. Where that is not so, there may be others
        # among them that have a form there, but are refused if they are sent alone.
        short = len(frame.body) == size + 2 * together + (1 if together < 16 else 3)
        return frame if short or _BUFFERS.issuperset(map(type, payloads)) else None

    async def asend(
        self,
        payload: Any,
        headers: codec.Headers | None = None,
        timeout: float | None = None,
    ) -> None:
        """`send` for asyncio. Cancelled, the message was sent or was not, as with any send."""
        batch = self._batch
        if headers is None and len(batch.items) < batch.room:
            item = payload if type(payload) is bytes else msgspec.Raw(codec.pack(payload))
            if len(item) <= batch.item_bytes_max:
                batch.items.append(item)
                if not batch.room:
                    self._topics.settle(self._topic, item)
                return
        attempt = self._sending(payload, headers)
        await self._topics.link.wait_async(
            attempt, check_timeout(timeout), self._room, retry_s=limits.WAIT_FOR_ROOM_S
        )

    def close(self) -> None:
        """Give the handle back; whoever sends with it gets `Closed`. Does not block; idempotent."""
        super().close()
        self._batch = Batch()
        with self._topics.link.lock:
            self._topics.link.wake_all()

    def wait_for(self, count: int, *, timeout: float | None = None) -> None:
        """Block until at least `count` subscribers are connected. Raises `Timeout`, `Closed`."""
        self._topics.link.wait(*self._connected(count, timeout))

    async def await_for(self, count: int, *, timeout: float | None = None) -> None:
        """`wait_for` for asyncio."""
        await self._topics.link.wait_async(*self._connected(count, timeout))

    def _connected(self, count: int, timeout: float | None) -> tuple[Any, float | None, str]:
        check_count(count, "count", 0, limits.READERS_MAX)

        def attempt() -> bool | None:
            self._check_open()
            return self._topics.subscribers(self._topic) >= count or None

        what = f"{count} subscribers of {self.channel!r}"
        return attempt, check_timeout(timeout), what

    @property
    def _room(self) -> str:
        return f"room at the subscribers of {self.channel!r}"

    def _sending_frame(self, frame: Outgoing, last: Item) -> Callable[[], bool | None]:
        def attempt() -> bool | None:
            self._check_open()
            return self._topics.send_frame(self._topic, frame, last)

        return attempt

    def _sending(self, payload: Any, headers: codec.Headers | None) -> Callable[[], bool | None]:
        """Encode in the caller's thread, before the lock is taken; returns the attempt to send."""
        topics, topic = self._topics, self._topic
        message = encode_message(payload, headers, topics.message_bytes_max)

        def attempt() -> bool | None:
            self._check_open()
            return topics.send(topic, message)

        return attempt
