"""What users hold of a stream: `Node.stream`.

Guarantee: an append that returned a receipt is in the log, once, and as safe as the receipt says.
One that raised `Timeout` is still under way, and what the same handle appends later comes behind
it; any other error means that it was not written, unless it says that this is not known.

The handle is one producer at one partition at a time: the nearest sidecar, or the one that `home`
names, by its partition or its node. While something is under way it stays with that; with a `home`
it stays for good, and so does a producer with a name, since only that partition knows its sequence.
What is derived from a record goes where that record is, unless `home` names another: only one
partition can know whether it is there already.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, Literal, TypeVar

from mesh import limits
from mesh.durable.appender import Appender, Pending
from mesh.durable.appending import (
    AGAIN_S,
    Appending,
    aflush,
    append,
    await_,
    deadline_of,
    flush,
    has_room,
    join,
    left_of,
    receipt_of,
    wait,
    wait_for_room,
)
from mesh.durable.batch import Batch
from mesh.durable.consumer import Consumer, Consuming
from mesh.durable.deliveries import AskedOptions
from mesh.durable.encoding import (
    batches_of,
    derived_of,
    is_plain,
    one_record,
    plain_item,
    producer_number,
)
from mesh.durable.protocol import Find, Inspect, Inspected, Place, Query, Reply
from mesh.durable.reading import Record
from mesh.durable.replay import Replay, Start
from mesh.durable.route import Route, aanswer, answer
from mesh.durable.streams import Streams
from mesh.durable.waiting import Order
from mesh.errors import InvalidOption, StorageFailed
from mesh.message import Receipt, StreamStats
from mesh.names import check_name
from mesh.options import StreamOptions, check_count, check_timeout
from mesh.sockets.codec import Headers
from mesh.sockets.handle import Handle

R = TypeVar("R", Place, Inspected)
_ANSWER: Final = "answer of a partition"


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
        waits: bool,
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
        self._waits = waits
        self._nearest: Appender | None = None
        """For what may be anywhere."""
        self._appenders: dict[str, Appender] = {}
        """One for each partition, or its runs would fence each other."""

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
        tried; `NoSidecar`: there is no log to append to; `LogFull`, `StorageFailed`: not written;
        `OutcomeUnknown`: the log no longer knows; `ProducerFenced`: another run of this producer
        has begun; `OptionsDiffer`, `NotSerializable`, `PayloadTooLarge`, `Closed`.
        """
        batch = self._one(payload, key, headers, dedup_id, delay, derived_from, output)
        deadline = deadline_of(timeout)
        appender = self._bind(left_of(deadline), derived_from)
        return append(appender, batch, left_of(deadline))

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
        batch = self._one(payload, key, headers, dedup_id, delay, derived_from, output)
        deadline = deadline_of(timeout)
        appender = await self._abind(left_of(deadline), derived_from)
        pending = appender.route.link.run(lambda: appender.submit(batch))
        await await_(appender, pending, left_of(deadline))
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
        `timeout` seconds at most, only while there is no sidecar or 16 MiB are under way. Plain
        ones that come closely behind each other share a batch, for which half a millisecond is
        waited (`batch_window_ms`): they are written, or refused, together."""
        if is_plain(key, headers, dedup_id, delay, derived_from):
            item = plain_item(payload, self._streams.bytes_max)
            return self._begin(lambda appender: appender.submit_item(item), timeout)
        batch = self._one(payload, key, headers, dedup_id, delay, derived_from, output)
        return self._begin(lambda appender: (appender.submit(batch), None), timeout, derived_from)

    def submit(self, batch: Batch, timeout: float | None) -> Appending:
        """`append_nowait` of a batch that is made already: not for users. After `Timeout` nothing
        of it is under way."""
        return self._begin(lambda appender: (appender.submit(batch), None), timeout)

    def _begin(
        self,
        submit: Callable[[Appender], tuple[Pending, int | None]],
        timeout: float | None,
        derived_from: Record | None = None,
    ) -> Appending:
        deadline = deadline_of(timeout)
        appender = self._bind(left_of(deadline), derived_from)
        wait_for_room(appender, left_of(deadline))
        return Appending(appender, *appender.route.link.run(lambda: submit(appender)))

    def bind(self, timeout: float | None) -> str:
        """The partition that is appended to next: not for users. Raises what `append` raises."""
        return self._bind(check_timeout(timeout)).route.partition

    def append_many(
        self, payloads: Iterable[Any], *, timeout: float | None = 10.0
    ) -> list[Receipt]:
        """Append each of `payloads`, in order, and return once all are in the log: a receipt for
        each range of consecutive offsets. `timeout` in seconds, for the whole. Raises what `append`
        raises, for the first batch that fails; those before it are written, those behind it may
        be."""
        deadline = deadline_of(timeout)
        appender = self._bind(left_of(deadline))
        link = appender.route.link
        pendings: list[Pending] = []
        for batch in batches_of(payloads, self._streams.bytes_max):
            wait_for_room(appender, left_of(deadline))
            pendings.append(link.run(lambda batch=batch: appender.submit(batch)))  # type: ignore[misc]
        receipts: list[Receipt] = []
        for pending in pendings:
            wait(appender, pending, left_of(deadline))
            join(receipts, receipt_of(appender, pending))
        return receipts

    async def aappend_many(
        self, payloads: Iterable[Any], *, timeout: float | None = 10.0
    ) -> list[Receipt]:
        """`append_many` for asyncio."""
        deadline = deadline_of(timeout)
        appender = await self._abind(left_of(deadline))
        link = appender.route.link
        pendings: list[Pending] = []
        for batch in batches_of(payloads, self._streams.bytes_max):
            await link.wait_async(
                lambda: has_room(appender), left_of(deadline), "room", retry_s=AGAIN_S
            )
            pendings.append(link.run(lambda batch=batch: appender.submit(batch)))  # type: ignore[misc]
        receipts: list[Receipt] = []
        for pending in pendings:
            await await_(appender, pending, left_of(deadline))
            join(receipts, receipt_of(appender, pending))
        return receipts

    def flush(self, *, timeout: float | None = 10.0) -> None:
        """Block until nothing is under way any more. Raises `Timeout`, `Closed`."""
        deadline = deadline_of(timeout)
        for appender in list(self._appenders.values()):
            flush(appender, left_of(deadline), f"end of appends to {self._what}")

    async def aflush(self, *, timeout: float | None = 10.0) -> None:
        """`flush` for asyncio."""
        deadline = deadline_of(timeout)
        for appender in list(self._appenders.values()):
            await aflush(appender, left_of(deadline), f"end of appends to {self._what}")

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
        named by its node. `partitions`: wait until so many are there. Iterating raises `NoSidecar`
        if they are not within `timeout` seconds (None: for ever), `InvalidOption` if several nodes
        have the name that `partition` gives, `LogDamaged`, `StorageFailed`, `Timeout` if one that
        was there does not answer any more, `Closed`. Raises `InvalidName`, `InvalidOption` itself.
        Does not block.
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

    def bounds(self, *, timeout: float | None = 10.0) -> dict[str, tuple[int, int]]:
        """Of each partition that is there: the offset of its first record, and that of its next
        one. Blocks until they have answered. Raises `NoSidecar`, `Timeout`, `StorageFailed`,
        `Closed`."""
        places = self._told(Find(self.name), Place, timeout)
        return {partition: (each.start, each.end) for partition, each in places.items()}

    async def abounds(self, *, timeout: float | None = 10.0) -> dict[str, tuple[int, int]]:
        """`bounds` for asyncio."""
        places = await self._atold(Find(self.name), Place, timeout)
        return {partition: (each.start, each.end) for partition, each in places.items()}

    def stats(self, *, timeout: float | None = 10.0) -> dict[str, StreamStats]:
        """Of each partition that is there: what it holds, what was refused or went wrong, and how
        far each group has come. Blocks until they have answered. Raises what `bounds` raises."""
        found = self._told(Inspect(self.name), Inspected, timeout)
        return {partition: each.stats for partition, each in found.items()}

    async def astats(self, *, timeout: float | None = 10.0) -> dict[str, StreamStats]:
        """`stats` for asyncio."""
        found = await self._atold(Inspect(self.name), Inspected, timeout)
        return {partition: each.stats for partition, each in found.items()}

    def _told(self, query: Query, kind: type[R], timeout: float | None) -> dict[str, R]:
        """What each partition answers to that."""
        deadline = deadline_of(timeout)
        replies = {}
        for partition in self._streams.all_of(self.name, None, 1, left_of(deadline)):
            route = self._streams.route_to(partition)
            ask = route.link.run(partial(route.begin, query))
            reply = answer(route, ask, left_of(deadline), _ANSWER)
            replies[partition] = _of_kind(kind, reply, route)
        return replies

    async def _atold(self, query: Query, kind: type[R], timeout: float | None) -> dict[str, R]:
        deadline = deadline_of(timeout)
        replies = {}
        for partition in await self._streams.aall_of(self.name, None, 1, left_of(deadline)):
            route = self._streams.route_to(partition)
            ask = route.link.run(partial(route.begin, query))
            reply = await aanswer(route, ask, left_of(deadline), _ANSWER)
            replies[partition] = _of_kind(kind, reply, route)
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
        derived_from: Record | None,
        output: int,
    ) -> Batch:
        return one_record(
            payload,
            bytes_max=self._streams.bytes_max,
            key=key,
            headers=headers,
            dedup_id=dedup_id,
            delay=delay,
            derived=derived_of(derived_from, output),
        )

    # -- Its producer ------------------------------------------------------------------------

    def _bind(self, timeout: float | None, derived_from: Record | None = None) -> Appender:
        home = self._home_of(derived_from)
        appender = self._bound(home)
        if appender is None:
            appender = self._at(self._streams.find(self.name, home, timeout), home)
        return appender

    async def _abind(self, timeout: float | None, derived_from: Record | None = None) -> Appender:
        home = self._home_of(derived_from)
        appender = self._bound(home)
        if appender is None:
            appender = self._at(await self._streams.afind(self.name, home, timeout), home)
        return appender

    def _home_of(self, derived_from: Record | None) -> str | None:
        """The partition that has to be it, if one has."""
        if self._home is None and derived_from is not None:
            return derived_from.partition
        return self._home

    def _bound(self, home: str | None) -> Appender | None:
        """What is used so far, if there is any, and no reason to look for another."""
        self._check_open()
        if home is not None:
            return self._appenders.get(home)
        nearest = self._nearest
        return None if nearest is None or self._may_move(nearest) else nearest

    def _may_move(self, appender: Appender) -> bool:
        """Whether its sidecar is gone, and nothing binds it to that."""
        return (
            not self._named
            and not self._streams.is_there(appender.route.partition)
            and appender.idle
        )

    def _at(self, partition: str, home: str | None) -> Appender:
        self._check_open()
        with self._streams.lock:
            appender = self._appenders.get(partition)
            if appender is None:
                route = self._streams.route(partition)
                appender = Appender(
                    route,
                    self.name,
                    self._producer,
                    self._options,
                    flusher=self._streams.flusher,
                    bytes_max=self._streams.bytes_max,
                    waits=self._waits,
                )
                if len(self._appenders) >= limits.PARTITIONS_MET_MAX:
                    self._appenders = {k: v for k, v in self._appenders.items() if not v.idle}
                self._appenders[partition] = appender
                self._streams.look_after(appender)
            if home is not None and home == self._home:
                self._home = partition  # of a node that may have another some day
            if home is None and appender is not self._nearest:
                if self._nearest is not None:  # whose sidecar is gone
                    self._appenders.pop(self._nearest.route.partition, None)
                self._nearest = appender
            return appender


def _of_kind(kind: type[R], reply: Reply | None, route: Route) -> R:
    if not isinstance(reply, kind):
        raise StorageFailed(f"sidecar {route.partition} gave an answer to another question")
    return reply
