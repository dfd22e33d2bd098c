"""Reading a stream from a place in its past, to its end or on into what comes: `Stream.replay`.

Guarantee: of each partition every record from that place on is yielded once, in order; what
retention has removed is a `Gap`, counted, never silence, and so is what was malformed when it was
appended; what does not read raises `LogDamaged`. A finite replay ends with what was there when it
began, and yields what several partitions hold in the order of time. One that follows goes on with
what comes, also of partitions that appear later, and promises no order between them. Nobody who
appends is held up.

Of a stream that shows records before they are on disk, a failure of the machine may take the last
ones, though they were yielded: that is a `Cut`, told in `Replay.cuts`. Those that were appended in
their place are yielded next, with the same offsets and a higher log epoch.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from functools import partial
from typing import Final, Self

import msgspec

from mesh import limits
from mesh.durable.cursor import Cut, Gap
from mesh.durable.feeds import Feeds
from mesh.durable.outcomes import BEGINS_AGAIN, Refused, error_of
from mesh.durable.protocol import Find, Place, Reply
from mesh.durable.reader import Chunk, PartitionReader, read
from mesh.durable.reading import Record, Run
from mesh.durable.route import Ask, Route, aanswer, answer, expected, wake
from mesh.durable.streams import Streams
from mesh.errors import Closed, InvalidOption, LogDamaged, Timeout
from mesh.names import check_node_name
from mesh.options import check_count, check_timeout

Start = int | str | datetime.datetime
_PLACE: Final = "place of a replay"
_CHUNK: Final = "part of a replay"
_NS: Final = 1_000_000_000
_TIME_NS_MAX: Final = (1 << 63) - 1
_GAPS_MAX: Final = 1024
_LOOK_S: Final = 0.25
"""How often one that follows looks for new partitions."""


class Replay:
    """Iterate over it, with ``for`` or ``async for``; it ends by itself, or with `close`. For one
    thread or task at a time."""

    def __init__(
        self,
        streams: Streams,
        owner: object,
        stream: str,
        start: Start,
        *,
        partition: str | None,
        follow: bool,
        partitions: int,
        timeout: float | None,
    ) -> None:
        self._gaps: deque[tuple[str, int, int]] = deque(maxlen=_GAPS_MAX)
        self._cuts: deque[tuple[str, int, int]] = deque(maxlen=_GAPS_MAX)
        self._streams = streams
        self._owner = owner  # a node lives as long as somebody may read from it
        self._stream = stream
        self._start = _checked(start, partition)
        self._only = partition
        self._follow = follow
        self._count = check_count(partitions, "partitions", 1, limits.PARTITIONS_MET_MAX)
        self._timeout = check_timeout(timeout)
        self._readers: dict[str, PartitionReader] = {}
        self._reached: dict[str, int] = {}
        """Offset of the next record of each that is to be yielded."""
        self._entering: Route | None = None
        """Where it was asked last what is there."""
        self._feeds: Feeds | None = None
        self._began_ns = 0
        self._has_begun = False
        """Whether all that was there at its beginning is being read."""
        self._reading = threading.Lock()
        """Held by who reads here: nobody else is to close what it reads from."""
        self._closed = False

    @property
    def partitions(self) -> frozenset[str]:
        """Those that are read."""
        return frozenset(self._readers)

    @property
    def missing(self) -> frozenset[str]:
        """Partitions of the stream that this node has met and cannot reach now."""
        if self._only is not None:
            return frozenset()
        return self._streams.missing(self._stream)

    @property
    def gaps(self) -> list[tuple[str, int, int]]:
        """What retention had removed before it could be read, and what nobody can read as it was
        malformed when it was appended, the latest of these: partition, first and last offset."""
        return list(self._gaps)

    @property
    def cuts(self) -> list[tuple[str, int, int]]:
        """What the log has lost after it was read, or after it was there when the replay began:
        likewise. What is yielded behind it begins with the first of these offsets again."""
        return list(self._cuts)

    def __repr__(self) -> str:
        return f"<replay of stream {self._stream!r}{' closed' if self._closed else ''}>"

    def close(self) -> None:
        """Read no more; what was read already may come still. Idempotent; from any thread."""
        self._closed = True
        if self._entering is not None:
            wake(self._entering)
        self._let_go()

    def _let_go(self) -> None:
        if self._feeds is not None:
            self._feeds.close()  # whose threads close the readers
        elif self._reading.acquire(blocking=False):
            try:
                for reader in self._readers.values():
                    reader.close()
            finally:
                self._reading.release()
        else:  # who reads does so, once it is told
            for reader in list(self._readers.values()):
                wake(reader.route)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    # -- Blocking ----------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Record]:
        try:
            self._begin()
            for partition in self._streams.all_of(
                self._stream, self._only, self._count, self._timeout, self._check_open
            ):
                self._enter(partition)
            steps = self._steps()
            chunk: Brought | None = None
            while (step := _next(steps, chunk)) is not None:
                if isinstance(step, _Need):
                    chunk = self._bring(step)
                else:
                    chunk = None
                    yield from step
        except Closed:
            if not self._closed:
                raise
        finally:
            self._let_go()

    def _enter(self, partition: str) -> None:
        """Begin to read that one."""
        route, ask = self._ask_for(partition)
        self._entered(route, answer(route, ask, self._timeout, _PLACE, stopped=self._is_closed))

    def _bring(self, need: _Need) -> Brought:
        self._check_open()
        if self._feeds is None:
            assert need.reader is not None
            with self._reading:
                read_now = read(need.reader, self._timeout, stopped=self._is_closed)
            self._check_open()
            return need.reader.partition, read_now
        look = partial(self._look, need)
        return self._feeds.link.wait(look, need.timeout(self), _CHUNK, retry_s=_LOOK_S)

    # -- In asyncio --------------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[Record]:
        try:
            self._begin()
            self._feeds = self._new_feeds()  # threads read the disk; the loop does not
            for partition in await self._streams.aall_of(
                self._stream, self._only, self._count, self._timeout, self._check_open
            ):
                await self._aenter(partition)
            steps = self._steps()
            chunk: Brought | None = None
            while (step := _next(steps, chunk)) is not None:
                if isinstance(step, _Need):
                    chunk = await self._abring(step)
                else:
                    chunk = None
                    for record in step:
                        yield record
        except Closed:
            if not self._closed:
                raise
        finally:
            self._let_go()

    async def _aenter(self, partition: str) -> None:
        route, ask = self._ask_for(partition)
        reply = await aanswer(route, ask, self._timeout, _PLACE, stopped=self._is_closed)
        self._entered(route, reply)

    async def _abring(self, need: _Need) -> Brought:
        assert self._feeds is not None
        self._check_open()
        look = partial(self._look, need)
        return await self._feeds.link.wait_async(look, need.timeout(self), _CHUNK, retry_s=_LOOK_S)

    def _begin(self) -> None:
        self._check_open()
        self._readers, self._feeds = {}, None
        self._began_ns, self._has_begun = time.time_ns(), False

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"replay of {self._stream!r} is closed")

    def _is_closed(self) -> bool:
        return self._closed

    # -- What is read ------------------------------------------------------------------------

    def _steps(self) -> Generator[_Need | Iterable[Record], Brought | None, None]:
        self._has_begun = True
        return self._live() if self._follow else self._past()

    def _past(self) -> Generator[_Need | Iterable[Record], Brought | None, None]:
        ends = {partition: reader.end for partition, reader in self._readers.items()}
        epochs = {partition: reader.log_epoch for partition, reader in self._readers.items()}
        heads: dict[str, deque[Run]] = {partition: deque() for partition in self._readers}
        while heads:
            for partition, runs in list(heads.items()):
                reader = self._readers[partition]
                while not runs and self._reached[partition] < ends[partition]:
                    brought = yield _Need(reader)
                    assert brought is not None
                    if not brought[1]:
                        if reader.log_epoch == epochs[partition]:
                            raise _cut_short(reader)
                        self._cuts.append((partition, reader.offset, ends[partition] - 1))
                        ends[partition] = reader.offset
                    runs.extend(self._accepted(*brought))
                if not runs:
                    del heads[partition]
            if len(heads) == 1:
                ((partition, runs),) = heads.items()
                yield _until(runs.popleft(), ends[partition])
            elif heads:
                first = min(heads, key=lambda each: (heads[each][0].source.time_ns, each))
                yield _until(heads[first].popleft(), ends[first])

    def _live(self) -> Generator[_Need | Iterable[Record], Brought | None, None]:
        while True:
            brought = yield _Need(None)
            assert brought is not None
            yield from self._accepted(*brought)

    def _accepted(self, partition: str, chunk: Chunk) -> list[Run]:
        """The records of a chunk; if it is a gap or a cut, that is noted."""
        if isinstance(chunk, Gap):
            self._gaps.append((partition, chunk.first, chunk.last))
            self._reached[partition] = chunk.last + 1
            return []
        if isinstance(chunk, Cut):
            self._cuts.append((partition, chunk.first, chunk.last))
            self._reached[partition] = chunk.first
            return []
        if chunk:
            last = chunk[-1]
            self._reached[partition] = last.source.offset + last.first + len(last.payloads)
        return chunk

    def _look(self, need: _Need) -> Brought | None:
        """What was brought. Begins to read partitions that have come, if it follows. Under the
        feeds' lock."""
        assert self._feeds is not None
        if need.reader is not None:
            return self._feeds.take(need.reader.partition)
        if self._only is None:
            for partition in self._streams.having(self._stream):
                if partition not in self._feeds:
                    route = self._streams.route_to(partition)
                    self._feeds.add(route, partial(self._begin_later, route))
        return self._feeds.take()

    def _begin_later(self, route: Route, stopped: Callable[[], bool]) -> PartitionReader | None:
        """Where to begin in a partition that has come, however long it takes to say so: the others
        are read meanwhile. In a thread of its own."""
        while not stopped():
            ask = route.link.run(lambda: route.begin(self._find))
            reply = answer(route, ask, None, _PLACE, stopped=stopped, refused=False)
            if not (isinstance(reply, Refused) and reply.code in BEGINS_AGAIN):
                return None if reply is None else self._reader_at(route, reply)
            with contextlib.suppress(Timeout):
                route.link.wait(lambda: stopped() or None, _LOOK_S, _PLACE)
        return None

    def _ask_for(self, partition: str) -> tuple[Route, Ask]:
        """Ask that one where to begin."""
        route = self._entering = self._streams.route_to(partition)
        return route, route.link.run(lambda: route.begin(self._find))

    def _entered(self, route: Route, reply: Reply | None) -> None:
        self._check_open()
        reader = self._reader_at(route, reply)
        if self._follow and self._feeds is None:
            self._feeds = self._new_feeds()
        if self._feeds is not None:
            self._feeds.add(route, lambda stopped: reader)

    def _reader_at(self, route: Route, reply: Reply | None) -> PartitionReader:
        if isinstance(reply, Refused):
            raise error_of(reply)
        place = expected(Place, reply, route)
        reader = PartitionReader(route, self._stream, self._streams.bytes_max)
        reader.offset, reader.end = self._offset(place), place.end
        reader.log_epoch = place.log_epoch if reader.offset <= place.end else None
        reader.follow = self._follow
        self._readers[reader.partition] = reader
        self._reached[reader.partition] = reader.offset
        return reader

    def _new_feeds(self) -> Feeds:
        feeds = Feeds(self._stream)
        self._streams.has_link(feeds.link)
        return feeds

    # -- Where it begins ---------------------------------------------------------------------

    @property
    def _find(self) -> Find:
        start, time_ns = self._start, None
        if start == "latest":
            time_ns = self._began_ns
        elif isinstance(start, datetime.datetime):
            time_ns = min(max(0, round(start.timestamp() * _NS)), _TIME_NS_MAX)
        return Find(self._stream, time_ns)

    def _offset(self, place: Place) -> int:
        if isinstance(self._start, int):
            return self._start
        if self._start == "latest" and not self._has_begun:
            return place.end
        return place.start if self._start == "earliest" else place.offset


Brought = tuple[str, Chunk]


class _Need(msgspec.Struct, frozen=True):
    """A replay needs more of that partition, or of any."""

    reader: PartitionReader | None

    def timeout(self, replay: Replay) -> float | None:
        """What is there has to come in time; what is to come may take as long as it likes."""
        return None if self.reader is None else replay._timeout


def _next(
    steps: Generator[_Need | Iterable[Record], Brought | None, None], brought: Brought | None
) -> _Need | Iterable[Record] | None:
    try:
        return steps.send(brought)
    except StopIteration:
        return None


def _cut_short(reader: PartitionReader) -> LogDamaged:
    what = f"partition {reader.partition}"
    return LogDamaged(what, 0, reader.offset, "it ended before what it had when it was asked")


def _until(run: Run, end: int) -> Iterator[Record]:
    """Those of its records that are before `end`."""
    first = run.source.offset + run.first
    if first + len(run.payloads) <= end:
        return iter(run)
    return iter(Run(run.payloads[: max(0, end - first)], run.first, run.source))


def _checked(start: Start, partition: str | None) -> Start:
    if partition is not None:
        check_node_name(partition, "partition")
    if isinstance(start, bool) or not isinstance(start, int | str | datetime.datetime):
        raise InvalidOption(
            f"a replay starts at 'earliest', 'latest', an offset or a datetime, not {start!r}"
        )
    if isinstance(start, str) and start not in ("earliest", "latest"):
        raise InvalidOption(f"a replay starts at 'earliest' or 'latest', not {start!r}")
    if isinstance(start, int) and (start < 0 or partition is None):
        raise InvalidOption(
            f"offset {start} needs partition=: offsets are each partition's own"
            if start >= 0
            else f"a replay starts at an offset from 0, not {start}"
        )
    if isinstance(start, datetime.datetime) and start.tzinfo is None:
        raise InvalidOption("a datetime without tzinfo says no time")
    return start
