"""What users hold of a stream: `Node.stream`.

Guarantee: an append that returned a receipt is in the log, once, and as safe as the receipt says.
One that raised `Timeout` is still under way, and what the same handle appends later comes behind
it; any other error means that it was not written, unless it says that this is not known.

The handle is one producer at one partition at a time: the nearest sidecar, or the one that `home`
names. While something is under way it stays with that; a producer with a name stays for good, since
only that partition knows its sequence.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, Final, Literal, TypeVar

import msgspec

from mesh import limits
from mesh.durable.appender import Appender, Pending
from mesh.durable.batch import Batch
from mesh.durable.consumer import Consumer, Consuming
from mesh.durable.deliveries import AskedOptions
from mesh.durable.encoding import batches_of, one_record, producer_number
from mesh.durable.partition import NOWHERE
from mesh.durable.replay import Replay, Start
from mesh.durable.streams import Streams
from mesh.durable.waiting import Order
from mesh.errors import InvalidOption
from mesh.message import Receipt
from mesh.names import check_name
from mesh.options import StreamOptions, check_count, check_timeout
from mesh.sockets.codec import Headers
from mesh.sockets.handle import Handle

T = TypeVar("T")

_WINDOW_BYTES: Final = 16 * 1024 * 1024
"""Under way at one time: who appends more waits."""
_AGAIN_S: Final = 0.05
"""How often who waits without an ask of its own looks again."""


class Appending(msgspec.Struct, frozen=True, eq=False):
    """An append under way, from `Stream.append_nowait`. Wait for it, or ``await`` it; or do not,
    and have `Stream.flush` do so for all."""

    _stream: Stream
    _pending: Pending
    _appender: Appender

    @property
    def done(self) -> bool:
        """Whether its outcome is known here. Does not block, nor look."""
        return self._pending.done

    def wait(self, timeout: float | None = None) -> Receipt:
        """Block until its outcome is known. Raises what `Stream.append` raises."""
        self._stream._wait(self._appender, self._pending, check_timeout(timeout))
        return self._stream._receipt(self._appender, self._pending)

    def __await__(self) -> Generator[Any, None, Receipt]:
        yield from self._stream._await(self._appender, self._pending, None).__await__()
        return self._stream._receipt(self._appender, self._pending)


class Stream(Handle):
    """A handle to append to a stream, replay it and consume it. Safe from several threads and
    tasks, whose appends are then in the order in which they were made."""

    def __init__(
        self,
        streams: Streams,
        name: str,
        options: StreamOptions | None,
        producer: str | None,
        home: str | None,
        owner: object,
        release: Callable[[], None],
    ) -> None:
        super().__init__(f"stream {name!r}", owner, release)
        self.name = name
        self._streams = streams
        self._options = options
        self._producer = secrets.randbits(63) | 1 if producer is None else producer_number(producer)
        self._named = producer is not None
        self._home = home
        self._appender: Appender | None = None

    # -- Appending ---------------------------------------------------------------------------

    def append(
        self,
        payload: Any,
        *,
        key: str | bytes | None = None,
        headers: Headers | None = None,
        dedup_id: str | bytes | None = None,
        delay: float | None = None,
        timeout: float | None = 10.0,
    ) -> Receipt:
        """Append one record, and return once it is in the log, as safe as the stream is.

        `payload`: see docs/payloads.md. `key`: at most 1,024 bytes; what groups with
        ``order="key"`` keep in order. `headers`: str keys, plain values. `dedup_id`: 1 to 255
        bytes; an append with one that was used within the stream's window changes nothing, and
        returns the receipt of the first. `delay`: seconds before groups may have it.

        Blocks for `timeout` seconds (None: for ever). Raises `Timeout`: not known, and still being
        tried; `NoSidecar`: there is no log to append to; `LogFull`, `StorageFailed`: not written;
        `OutcomeUnknown`: the log no longer knows; `ProducerFenced`: another run of this producer
        has begun; `OptionsDiffer`, `NotSerializable`, `PayloadTooLarge`, `Closed`.
        """
        batch = self._one(payload, key, headers, dedup_id, delay)
        deadline = _deadline(timeout)
        appender = self._bind(_left(deadline))
        pending = appender.route.link.run(lambda: appender.submit(batch))
        self._wait(appender, pending, _left(deadline))
        return self._receipt(appender, pending)

    async def aappend(
        self,
        payload: Any,
        *,
        key: str | bytes | None = None,
        headers: Headers | None = None,
        dedup_id: str | bytes | None = None,
        delay: float | None = None,
        timeout: float | None = 10.0,
    ) -> Receipt:
        """`append` for asyncio. Cancelled, the record is still under way."""
        batch = self._one(payload, key, headers, dedup_id, delay)
        deadline = _deadline(timeout)
        appender = await self._abind(_left(deadline))
        pending = appender.route.link.run(lambda: appender.submit(batch))
        await self._await(appender, pending, _left(deadline))
        return self._receipt(appender, pending)

    def append_nowait(
        self,
        payload: Any,
        *,
        key: str | bytes | None = None,
        headers: Headers | None = None,
        dedup_id: str | bytes | None = None,
        delay: float | None = None,
        timeout: float | None = 10.0,
    ) -> Appending:
        """Begin to append one record, and return something to wait for it with. Blocks, for
        `timeout` seconds at most, only while there is no sidecar or 16 MiB are under way."""
        batch = self._one(payload, key, headers, dedup_id, delay)
        deadline = _deadline(timeout)
        appender = self._bind(_left(deadline))
        self._wait_for_room(appender, _left(deadline))
        pending = appender.route.link.run(lambda: appender.submit(batch))
        return Appending(self, pending, appender)

    def append_many(
        self, payloads: Iterable[Any], *, timeout: float | None = 10.0
    ) -> list[Receipt]:
        """Append each of `payloads`, in order, and return once all are in the log: a receipt for
        each range of consecutive offsets. `timeout` in seconds, for the whole. Raises what `append`
        raises, for the first batch that fails; those before it are written, those behind it may
        be."""
        deadline = _deadline(timeout)
        appender = self._bind(_left(deadline))
        link = appender.route.link
        pendings: list[Pending] = []
        for batch in batches_of(payloads, self._streams.bytes_max):
            self._wait_for_room(appender, _left(deadline))
            pendings.append(link.run(lambda batch=batch: appender.submit(batch)))  # type: ignore[misc]
        receipts: list[Receipt] = []
        for pending in pendings:
            self._wait(appender, pending, _left(deadline))
            _join(receipts, self._receipt(appender, pending))
        return receipts

    async def aappend_many(
        self, payloads: Iterable[Any], *, timeout: float | None = 10.0
    ) -> list[Receipt]:
        """`append_many` for asyncio."""
        deadline = _deadline(timeout)
        appender = await self._abind(_left(deadline))
        link = appender.route.link
        pendings: list[Pending] = []
        for batch in batches_of(payloads, self._streams.bytes_max):
            await link.wait_async(
                lambda: self._has_room(appender), _left(deadline), "room", retry_s=_AGAIN_S
            )
            pendings.append(link.run(lambda batch=batch: appender.submit(batch)))  # type: ignore[misc]
        receipts: list[Receipt] = []
        for pending in pendings:
            await self._await(appender, pending, _left(deadline))
            _join(receipts, self._receipt(appender, pending))
        return receipts

    def flush(self, *, timeout: float | None = 10.0) -> None:
        """Block until nothing is under way any more. Raises `Timeout`, `Closed`."""
        appender = self._appender
        if appender is not None:
            appender.route.link.wait(
                lambda: self._has_nothing(appender),
                check_timeout(timeout),
                f"end of what is under way to {self._what}",
                retry_s=_AGAIN_S,
            )

    async def aflush(self, *, timeout: float | None = 10.0) -> None:
        """`flush` for asyncio."""
        appender = self._appender
        if appender is not None:
            await appender.route.link.wait_async(
                lambda: self._has_nothing(appender),
                check_timeout(timeout),
                f"end of what is under way to {self._what}",
                retry_s=_AGAIN_S,
            )

    # -- Reading -----------------------------------------------------------------------------

    def replay(
        self,
        start: Start = "earliest",
        *,
        partition: str | None = None,
        follow: bool = False,
        partitions: int = 1,
        timeout: float | None = 10.0,
    ) -> Replay:
        """Read from `start` on: ``"earliest"``, ``"latest"`` (what comes from now on), a `datetime`
        with a time zone, or an offset together with `partition`. Iterate over what is returned.

        With `follow` it goes on with what comes, until it is closed; else it ends with what is
        there now, several partitions merged by time. `partition`: read only that one. `partitions`:
        wait until so many are there. Iterating raises `NoSidecar` if they are not within `timeout`
        seconds (None: for ever), `LogDamaged`, `StorageFailed`, `Timeout` if one that was there
        does not answer any more, `Closed`. Raises `InvalidOption` itself. Does not block.
        """
        self._check_open()
        return Replay(
            self._streams,
            self.name,
            start,
            partition=partition,
            follow=follow,
            partitions=partitions,
            timeout=timeout,
        )

    def consumer(
        self,
        group: str,
        *,
        order: Order | None = None,
        ack_wait: float | None = None,
        max_deliver: int | None = None,
        prefetch: int = 256,
        start: Literal["earliest", "latest"] = "earliest",
    ) -> Consumer:
        """Become a member of `group`, which is made if there is none: its members share the records
        of all partitions. Does not block; partitions that appear later are consumed as well.

        `order`: ``"any"``; ``"key"``: the records of one key one after the other; ``"exclusive"``:
        one member has all, the others stand by. `ack_wait`: seconds in which a record is to be
        settled, 30 by default; `max_deliver`: deliveries before a record becomes a dead letter, in
        the stream ``NAME.dead``, 20 by default. None: whatever the group has. `prefetch`: how many
        records may be here unsettled. `start`: where a new group begins. Raises `InvalidName`,
        `InvalidOption`, `Closed`.
        """
        self._check_open()
        check_name(group)
        check_count(prefetch, "prefetch", 1, limits.PREFETCH_MAX)
        if start not in ("earliest", "latest"):
            raise InvalidOption(f"a group starts at 'earliest' or 'latest', not {start!r}")
        asked = AskedOptions(order=order, ack_wait_s=ack_wait, max_deliver=max_deliver)
        asked.all()
        core = Consuming(
            self._streams,
            self.name,
            group,
            prefetch=prefetch,
            options=asked,
            latest=start == "latest",
        )
        self._streams.add(core)
        return Consumer(core, self._owner, self._streams.release_of(core))

    def _one(
        self,
        payload: Any,
        key: str | bytes | None,
        headers: Headers | None,
        dedup_id: str | bytes | None,
        delay: float | None,
    ) -> Batch:
        return one_record(
            payload,
            bytes_max=self._streams.bytes_max,
            key=key,
            headers=headers,
            dedup_id=dedup_id,
            delay=delay,
        )

    # -- Its producer ------------------------------------------------------------------------

    def _bind(self, timeout: float | None) -> Appender:
        appender = self._appender
        if appender is None or self._may_move(appender):
            partition = self._streams.find(self.name, self._home, timeout)
            appender = self._at(partition)
        return appender

    async def _abind(self, timeout: float | None) -> Appender:
        appender = self._appender
        if appender is None or self._may_move(appender):
            partition = await self._streams.afind(self.name, self._home, timeout)
            appender = self._at(partition)
        return appender

    def _may_move(self, appender: Appender) -> bool:
        """Whether its sidecar is gone, and nothing binds it to that."""
        self._check_open()
        return (
            not self._named
            and self._home is None
            and not self._streams.is_there(appender.route.partition)
            and appender.idle
        )

    def _at(self, partition: str) -> Appender:
        self._check_open()
        with self._streams.lock:
            appender = self._appender
            if appender is None or appender.route.partition != partition:
                route = self._streams.route(partition)
                appender = Appender(route, self.name, self._producer, self._options)
                self._appender = appender
            return appender

    # -- Waiting -----------------------------------------------------------------------------

    def _wait(self, appender: Appender, pending: Pending, timeout: float | None) -> None:
        link, deadline = appender.route.link, _deadline(timeout)
        while not pending.done:
            ask = link.run(lambda: appender.claim(pending))
            try:
                link.wait(
                    _attempt(appender, pending, ask),
                    _left(deadline),
                    _RECEIPT,
                    slot=ask,
                    retry_s=None if ask is not None else _AGAIN_S,
                )
            finally:
                with link.lock:
                    appender.release(ask)

    async def _await(self, appender: Appender, pending: Pending, timeout: float | None) -> None:
        link, deadline = appender.route.link, _deadline(timeout)
        while not pending.done:
            ask = link.run(lambda: appender.claim(pending))
            try:
                await link.wait_async(
                    _attempt(appender, pending, ask),
                    _left(deadline),
                    _RECEIPT,
                    slot=ask,
                    retry_s=None if ask is not None else _AGAIN_S,
                )
            finally:
                with link.lock:
                    appender.release(ask)

    def _wait_for_room(self, appender: Appender, timeout: float | None) -> None:
        if appender.bytes_waiting >= _WINDOW_BYTES:
            appender.route.link.wait(
                lambda: self._has_room(appender), timeout, "room for an append", retry_s=_AGAIN_S
            )

    def _has_room(self, appender: Appender) -> bool | None:
        if appender.bytes_waiting >= _WINDOW_BYTES:
            appender.advance(None)
        return appender.bytes_waiting < _WINDOW_BYTES or None

    def _has_nothing(self, appender: Appender) -> bool | None:
        appender.advance(None)
        return appender.idle or None

    def _receipt(self, appender: Appender, pending: Pending) -> Receipt:
        if pending.error is not None:
            raise type(pending.error)(*pending.error.args)
        appended = pending.appended
        assert appended is not None
        return Receipt(
            appender.route.partition,
            None if appended.offset == NOWHERE else appended.offset,
            appended.count,
            appended.time_ns,
            "fsynced" if appender.durability == "fsync" else "written",
            appended.repeated,
        )


_RECEIPT: Final = "receipt"


def _attempt(appender: Appender, pending: Pending, ask: Any) -> Callable[[], bool | None]:
    def attempt() -> bool | None:
        for first in (ask, None):  # who goes on waiting has to have read all there is
            appender.advance(first)
            if pending.done or not appender.depends_on(pending, ask):
                return True
        return None

    return attempt


def _deadline(timeout: float | None) -> float | None:
    timeout = check_timeout(timeout)
    return None if timeout is None else time.monotonic() + timeout


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _join(receipts: list[Receipt], receipt: Receipt) -> None:
    """Append it, or make one range of it and the last."""
    if receipts and receipt.offset is not None:
        last = receipts[-1]
        follows = last.offset is not None and last.offset + last.count == receipt.offset
        if follows and last.partition == receipt.partition and not receipt.repeated:
            receipts[-1] = msgspec.structs.replace(last, count=last.count + receipt.count)
            return
    receipts.append(receipt)
