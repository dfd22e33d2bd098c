"""What users hold of a stream: `Node.stream`.

Guarantee: an append that returned a receipt is in the log, once, and as safe as the receipt says.
One that raised `Timeout` is still under way, and what the same handle appends later comes behind
it; any other error means that it was not written, unless it says that this is not known.

Where that is, `mesh.durable.producing` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, Literal, TypeVar

from mesh import limits
from mesh.durable.appender import Pending
from mesh.durable.appending import (
    Appending,
    aflush,
    append,
    await_,
    await_room,
    flush,
    join,
    receipt_of,
    wait,
    wait_for_room,
)
from mesh.durable.consumer import Consumer, Consuming
from mesh.durable.deliveries import AskedOptions
from mesh.durable.encoding import HeadersOf, KeyOf, batches_of, derived_of, item_of
from mesh.durable.producing import Producing
from mesh.durable.protocol import Find, Inspect, Inspected, Place, Query
from mesh.durable.reading import Record
from mesh.durable.records import Item, batch_of
from mesh.durable.replay import Replay, Start
from mesh.durable.route import aanswer, answer, expected
from mesh.durable.streams import Streams
from mesh.durable.waiting import Order
from mesh.errors import InvalidOption
from mesh.message import Receipt, StreamStats
from mesh.names import check_name
from mesh.options import StreamOptions, check_count
from mesh.sockets.codec import Headers
from mesh.sockets.handle import Handle
from mesh.timeouts import deadline_of, left_of

R = TypeVar("R", Place, Inspected)
_ANSWER: Final = "answer of a partition"


class Stream(Handle):
    """A handle to append to a stream, replay it and consume it. Safe from several threads and
    tasks, whose appends are then in the order in which they were made. Closed, it takes no more
    appends; those that are under way go on, and whoever waits for one has its outcome."""

    def __init__(
        self,
        streams: Streams,
        name: str,
        options: StreamOptions | None,
        producer: str | None,
        home: str | None,
        waits: bool,
        owner: object,
        release: Callable[[], None],
    ) -> None:
        super().__init__(f"stream {name!r}", owner, release)
        self._name = name
        self._streams = streams
        self._producing = Producing(
            streams, name, options=options, producer=producer, home=home, waits=waits
        )

    @property
    def name(self) -> str:
        """What it is called."""
        return self._name

    # -- Appending ---------------------------------------------------------------------------

    def append(
        self,
        payload: Any,
        *,
        key: str | bytes | None = None,
        headers: Headers | None = None,
        dedup_id: str | bytes | None = None,
        delay: float | None = None,
        derived_from: Record | None = None,
        output: int = 0,
        timeout: float | None = 10.0,
    ) -> Receipt:
        """Append one record, and return once it is in the log, as safe as the stream is.

        `payload`: see docs/payloads.md. `key`: at most 1,024 bytes; what groups with
        ``order="key"`` keep in order. `headers`: str keys, plain values. `dedup_id`: 1 to 255
        bytes; an append with one that was used within the stream's window changes nothing, and
        returns the receipt of the first. `delay`: seconds before groups may have it.
        `derived_from`: a record (of this or another stream) that this one was made of, as its
        output number `output`: made of it again, by whichever consumer of the same group and
        whenever, it is not appended again. It is appended at the sidecar that has that record,
        unless the stream has a `home`, which has to be the same for all of these consumers then.

        Blocks for `timeout` seconds (None: for ever). Raises `Timeout`: not known, and still being
        tried; `Busy`: 16 MiB were under way there all the time, and nothing of this is;
        `NoSidecar`: there is no log to append to; `LogFull`, `StorageFailed`: not written;
        `OutcomeUnknown`: the log no longer knows; `ProducerFenced`: another run of this producer
        has begun; `OptionsDiffer`; `InvalidOption`: of an argument, or several nodes have the name
        that `home` is; `NotSerializable`, `PayloadTooLarge`, `Closed`.
        """
        item, _ = self._item(payload, key, headers, dedup_id, delay, derived_from, output)
        deadline = deadline_of(timeout)
        appender = self._writing().bind(left_of(deadline), derived_from)
        wait_for_room(appender, deadline)
        return append(appender, batch_of([item]), deadline)

    async def aappend(
        self,
        payload: Any,
        *,
        key: str | bytes | None = None,
        headers: Headers | None = None,
        dedup_id: str | bytes | None = None,
        delay: float | None = None,
        derived_from: Record | None = None,
        output: int = 0,
        timeout: float | None = 10.0,
    ) -> Receipt:
        """`append` for asyncio. Cancelled, the record is still under way."""
        item, _ = self._item(payload, key, headers, dedup_id, delay, derived_from, output)
        deadline = deadline_of(timeout)
        appender = await self._writing().abind(left_of(deadline), derived_from)
        await await_room(appender, deadline)
        pending = appender.route.link.run(lambda: appender.submit(batch_of([item])))
        await await_(appender, pending, deadline)
        return receipt_of(appender, pending)

    def append_nowait(
        self,
        payload: Any,
        *,
        key: str | bytes | None = None,
        headers: Headers | None = None,
        dedup_id: str | bytes | None = None,
        delay: float | None = None,
        derived_from: Record | None = None,
        output: int = 0,
        timeout: float | None = 10.0,
    ) -> Appending:
        """Begin to append one record, and return something to wait for it with. Blocks, for
        `timeout` seconds at most, only while there is no sidecar or 16 MiB are under way. Those
        that come closely behind each other share a batch, for which half a millisecond is
        waited (`batch_window_ms`): they are written, or refused, together. Arguments and errors are
        those of `append`; what comes of the append itself is for `Appending` to raise."""
        item, size = self._item(payload, key, headers, dedup_id, delay, derived_from, output)
        return self._writing().begin(
            lambda appender: appender.submit_item(item, size), timeout, derived_from
        )

    def append_many(
        self,
        payloads: Iterable[Any],
        *,
        key: KeyOf | None = None,
        headers: HeadersOf | None = None,
        timeout: float | None = 10.0,
    ) -> list[Receipt]:
        """Append each of `payloads`, in order, and return once all are in the log: a receipt for
        each range of consecutive offsets. `key` and `headers`: functions, called with each
        payload, which return the key and the headers of its record, or None if it has none.
        `timeout` in seconds, for the whole. Raises what `append` raises, for the first batch that
        fails, and what these functions do; what is before it is written, what is behind it may be.
        `Busy`: its text says how many records were begun; these stay under way (`flush` waits for
        them; what becomes of them is not told), and nothing of those behind them is.
        `InvalidOption` if `payloads` is a str, bytes or a mapping: that is one."""
        deadline = deadline_of(timeout)
        appender = self._writing().bind(left_of(deadline))
        link = appender.route.link
        pendings: list[Pending] = []
        bytes_max = min(self._streams.bytes_max, appender.route.bytes_max)
        for batch in batches_of(payloads, bytes_max, key, headers):
            wait_for_room(appender, deadline, pendings)
            pendings.append(link.run(lambda batch=batch: appender.submit(batch)))  # type: ignore[misc]
        receipts: list[Receipt] = []
        for pending in pendings:
            wait(appender, pending, deadline)
            join(receipts, receipt_of(appender, pending))
        return receipts

    async def aappend_many(
        self,
        payloads: Iterable[Any],
        *,
        key: KeyOf | None = None,
        headers: HeadersOf | None = None,
        timeout: float | None = 10.0,
    ) -> list[Receipt]:
        """`append_many` for asyncio."""
        deadline = deadline_of(timeout)
        appender = await self._writing().abind(left_of(deadline))
        link = appender.route.link
        pendings: list[Pending] = []
        bytes_max = min(self._streams.bytes_max, appender.route.bytes_max)
        for batch in batches_of(payloads, bytes_max, key, headers):
            await await_room(appender, deadline, pendings)
            pendings.append(link.run(lambda batch=batch: appender.submit(batch)))  # type: ignore[misc]
        receipts: list[Receipt] = []
        for pending in pendings:
            await await_(appender, pending, deadline)
            join(receipts, receipt_of(appender, pending))
        return receipts

    def flush(self, *, timeout: float | None = 10.0) -> None:
        """Block until nothing is under way any more, up to `timeout` seconds (None: for ever).
        Raises `Timeout`, `Closed`. What became of each append, its `Appending` says."""
        deadline = deadline_of(timeout)
        for appender in self._producing.appenders:
            flush(appender, deadline, f"answer to all appends to {self._what}")

    async def aflush(self, *, timeout: float | None = 10.0) -> None:
        """`flush` for asyncio."""
        deadline = deadline_of(timeout)
        for appender in self._producing.appenders:
            await aflush(appender, deadline, f"answer to all appends to {self._what}")

    def _writing(self) -> Producing:
        self._check_open()
        return self._producing

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
        there now, several partitions merged by time. `partition`: read only that one, which may be
        named by its node. An offset that is not there yet is waited for with `follow`; else there
        is nothing. `partitions`: wait until so many are there. Iterating raises `NoSidecar` if they
        are not within `timeout` seconds (None: for ever), `InvalidOption` if several nodes have the
        name that `partition` gives, `LogDamaged`, `StorageFailed`, `PayloadTooLarge` if what comes
        next is over this node's `message_bytes_max`, `Timeout` if one that was there does not
        answer any more, `Closed`. Raises `InvalidName`, `InvalidOption` itself. Does not
        block.
        """
        self._check_open()
        return Replay(
            self._streams,
            self._owner,
            self.name,
            start,
            partition=partition,
            follow=follow,
            partitions=partitions,
            timeout=timeout,
        )

    def bounds(self, *, timeout: float | None = 10.0) -> dict[str, tuple[int, int]]:
        """Of each partition that is there: the offset of its first record, and that of its next
        one. Blocks until they have answered, up to `timeout` seconds (None: for ever). Raises
        `NoSidecar`, `Timeout`, `StorageFailed`, `Closed`."""
        places = self._told(Find(self.name), Place, timeout)
        return {partition: (each.start, each.end) for partition, each in places.items()}

    async def abounds(self, *, timeout: float | None = 10.0) -> dict[str, tuple[int, int]]:
        """`bounds` for asyncio."""
        places = await self._atold(Find(self.name), Place, timeout)
        return {partition: (each.start, each.end) for partition, each in places.items()}

    def stats(self, *, timeout: float | None = 10.0) -> dict[str, StreamStats]:
        """Of each partition that is there: what it holds, what was refused or went wrong, and how
        far each group has come. Blocks and raises as `bounds` does."""
        found = self._told(Inspect(self.name), Inspected, timeout)
        return {partition: each.stats for partition, each in found.items()}

    async def astats(self, *, timeout: float | None = 10.0) -> dict[str, StreamStats]:
        """`stats` for asyncio."""
        found = await self._atold(Inspect(self.name), Inspected, timeout)
        return {partition: each.stats for partition, each in found.items()}

    def _told(self, query: Query, kind: type[R], timeout: float | None) -> dict[str, R]:
        """What each partition answers to that."""
        self._check_open()
        deadline = deadline_of(timeout)
        replies = {}
        for partition in self._streams.all_of(
            self.name, None, 1, left_of(deadline), self._check_open
        ):
            route = self._streams.route_to(partition)
            ask = route.link.run(partial(route.begin, query))
            reply = answer(route, ask, left_of(deadline), _ANSWER)
            replies[partition] = expected(kind, reply, route)
        return replies

    async def _atold(self, query: Query, kind: type[R], timeout: float | None) -> dict[str, R]:
        self._check_open()
        deadline = deadline_of(timeout)
        replies = {}
        for partition in await self._streams.aall_of(
            self.name, None, 1, left_of(deadline), self._check_open
        ):
            route = self._streams.route_to(partition)
            ask = route.link.run(partial(route.begin, query))
            reply = await aanswer(route, ask, left_of(deadline), _ANSWER)
            replies[partition] = expected(kind, reply, route)
        return replies

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
        check_name(group, "group name")
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
        self._streams.under_way.add_consumer(core)
        return Consumer(core, self._owner, self._streams.release_of(core))

    def _item(
        self,
        payload: Any,
        key: str | bytes | None,
        headers: Headers | None,
        dedup_id: str | bytes | None,
        delay: float | None,
        derived_from: Record | None,
        output: int,
    ) -> tuple[Item, int]:
        return item_of(
            payload,
            bytes_max=self._streams.bytes_max,
            key=key,
            headers=headers,
            dedup_id=dedup_id,
            delay=delay,
            derived=derived_of(derived_from, output),
        )
