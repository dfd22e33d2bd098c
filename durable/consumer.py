"""Consuming a stream as a member of a group: `Stream.consumer`.

Guarantee, at least once: every record of every partition that is reached is delivered to the group
until a member acknowledges it, and to one member at a time. What a member holds when it leaves,
dies, or does not say for `ack_wait` what became of it, goes to others. Order is that of the group,
within a partition. An acknowledgement is told soon; until it is remembered (`flush`) a crash may
bring the record back. What is said of a record that its log has lost (`Consumer.cuts`) is never
taken for a word about the one that has its offset now.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from itertools import takewhile
from types import TracebackType
from typing import Final

from mesh.durable.complaint import Complaint
from mesh.durable.consumed import ConsumedRecord
from mesh.durable.cursor import Cut
from mesh.durable.deliveries import AskedOptions
from mesh.durable.seat import Seat, Taken
from mesh.durable.streams import Streams, nobody_has
from mesh.errors import Closed, InvalidOption, MeshError, NoSidecar, Timeout
from mesh.options import check_timeout
from mesh.sockets.control import Offer, OfferKind
from mesh.sockets.handle import Receiving
from mesh.sockets.home import Counters, node_text
from mesh.sockets.link import Link
from mesh.timeouts import deadline_of, left_of

logger = logging.getLogger(__name__)

_GAPS_MAX: Final = 1024
_FLUSH_S: Final = 0.02
"""How often who waits for all to be remembered looks."""
_CLOSE_S: Final = 1.0
"""What closing gives a sidecar to hear what was done last."""
_ANSWERS: Final = "answer to all that was said of records"
_HEARD: Final = "word that it was heard"


class Consuming:
    """The core of a consumer: its seats, and what they have brought."""

    kind = "stream"
    seeks: OfferKind | None = None

    def __init__(
        self,
        streams: Streams,
        stream: str,
        group: str,
        *,
        prefetch: int,
        options: AskedOptions,
        latest: bool,
    ) -> None:
        self.channel = stream
        self.counters = Counters()
        self.link = Link(f"consumer {group!r} of stream {stream!r}")
        self.gaps: deque[tuple[str, int, int, int]] = deque(maxlen=_GAPS_MAX)
        self.cuts: deque[tuple[str, int, int]] = deque(maxlen=_GAPS_MAX)
        self.group = group
        self._streams = streams
        self._prefetch = prefetch
        self._options = options
        self._from_ns = time.time_ns() if latest else None
        self._member = f"{node_text(streams.node_id)}{secrets.token_hex(8)}"
        self._seats: dict[str, Seat] = {}
        self._resume: dict[str, int] | None = None
        """By partition: all below is done with, as the user keeps account of."""
        self._begun = False
        """Whether somebody takes records: until then it sits nowhere."""
        self._inbox: deque[ConsumedRecord] = deque()
        self.link.on_abandon = self._inbox.clear
        self._error: MeshError | None = None
        self._waits = Complaint(logger)
        self._taken_at = time.monotonic()
        self._closed = False

    # -- Records -----------------------------------------------------------------------------

    def pop(self) -> ConsumedRecord | None:
        """The next record, if one is here. In any thread, without a lock."""
        while True:
            try:
                record = self._inbox.popleft()
            except IndexError:
                return None
            if not record._seat.passes_over(record):
                self._taken_at = time.monotonic()
                return record

    def take(self) -> ConsumedRecord | None:
        """Likewise, for the link to wait with. Raises what ended it."""
        record = self.pop()
        if record is None and self._error is not None:
            raise copy(self._error)
        return record

    def explained(self, late: Timeout) -> Timeout:
        """`late`, which says so if there is nobody to wait for, a disk is in the way, or what came
        before is to be settled first."""
        if not self._seats:
            return NoSidecar(f"{late}: {nobody_has(self.channel)}")
        if self._refusal:
            return Timeout(f"{late}: {self._refusal}")
        unsettled = max(seat.unsettled for seat in list(self._seats.values()))
        if unsettled >= self._prefetch:
            return Timeout(
                f"{late}: {unsettled:,} that came before were not settled, and no more than "
                f"{self._prefetch:,} (prefetch) are here at a time: ack(), nak() or reject() them"
            )
        return late

    @property
    def _refusal(self) -> str:
        """Why it has no seat at one of its partitions, if that is known."""
        return next((seat.refusal for seat in list(self._seats.values()) if seat.refusal), "")

    def give_back(self, record: ConsumedRecord) -> None:
        """Its receiver was cancelled before it saw it: it goes before what came behind it."""
        ahead = takewhile(lambda each: _is_before(each, record), list(self._inbox))
        self._inbox.insert(sum(1 for _ in ahead), record)

    def about_to_wait(self) -> None:
        """Nothing is here: say what was done, and look for partitions."""
        self._taken_at = time.monotonic()
        self._begun = True
        with self.link.lock:
            if not self._inbox:
                for seat in self._seats.values():
                    seat.nothing_here()
        for seat in list(self._seats.values()):
            seat.say()
        self.look()

    def look(self) -> None:
        """Take a seat at each partition that is there."""
        for partition in self._streams.having(self.channel):
            if partition not in self._seats and not self._closed:
                self._sit(partition)

    def resume(self, done: dict[str, int]) -> None:
        """All below these offsets is done with. Raises `InvalidOption`."""
        if (order := self._options.order) != "exclusive":
            given = "and none was given" if order is None else f"not {order!r}"
            raise InvalidOption(
                f"a position says that all before it is done, which takes order='exclusive', "
                f"{given}"
            )
        with self.link.lock:
            if self._begun:
                raise InvalidOption("a consumer resumes before its first recv, not after it")
            self._resume = done

    @property
    def partitions(self) -> frozenset[str]:
        return frozenset(list(self._seats))

    @property
    def missing(self) -> frozenset[str]:
        return self._streams.missing(self.channel)

    def settled(self) -> bool:
        """Whether all that was done is remembered."""
        return all(
            seat.route.link.run(lambda seat=seat: seat.settled)  # type: ignore[misc]
            for seat in list(self._seats.values())
        )

    def tell_unheard(self) -> None:
        """Log of which partitions it is not known whether they remember all that was done."""
        for seat in list(self._seats.values()):
            if seat.unheard:
                logger.warning(
                    "%s had done with records of partition %s when it was closed, and was not "
                    "heard there in time: they may come again",
                    self.link.what,
                    seat.partition,
                )

    def say(self) -> None:
        for seat in list(self._seats.values()):
            seat.say()

    def farewells(self) -> Iterator[tuple[Link, Callable[[], bool | None]]]:
        """Of each seat the link to wait on until its sidecar has heard what was said last."""
        for seat in list(self._seats.values()):
            yield seat.route.link, lambda seat=seat: seat.settled or None  # type: ignore[misc]

    def _sit(self, partition: str) -> None:
        seat = Seat(
            self._streams.route_to(partition),
            self.channel,
            self.group,
            self._member,
            prefetch=self._prefetch,
            options=self._options,
            from_ns=self._from_ns,
            resume=None if self._resume is None else self._resume.get(partition, 0),
            message_bytes_max=self._streams.bytes_max,
            hand_over=self._handed,
        )
        with self.link.lock:
            if self._closed or partition in self._seats:
                return
            self._seats[partition] = seat
        seat.start()

    def _handed(self, seat: Seat, taken: Taken) -> None:
        """In the seat's thread."""
        with contextlib.suppress(Closed), self.link:
            if self._closed:
                return
            if isinstance(taken, list):
                seat.handed()
                self._inbox += taken
                self.counters.received += len(taken)
            elif isinstance(taken, MeshError):
                self._error = taken
            elif isinstance(taken, Cut):
                self.cuts.append((seat.partition, taken.first, taken.last))
            else:
                first, last, missing = taken
                self.gaps.append((seat.partition, first, last, missing))
                self.counters.lost += missing
            self.link.wake_all()

    # -- The rest of a core ------------------------------------------------------------------

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        raise AssertionError("it seeks nothing: its streams' finders do")

    def detach(self, peer: int, key: int, reason: str) -> None:
        raise AssertionError("it seeks nothing: its streams' finders do")

    def tick(self) -> None:
        """Say what was done; see to it that what waits here is not given to others, as long as the
        consumer takes any."""
        if not self._begun:
            return
        now = time.monotonic()
        self.look()
        if refusal := self._refusal:
            self._waits.say("%s waits: %s", self.link.what, refusal)
        else:
            self._waits.ended()
        for seat in list(self._seats.values()):
            busy = now - self._taken_at < seat.ack_wait_s
            if busy and now - seat.extended_at > seat.ack_wait_s / 3:
                seat.extended_at = now
                seat.extend(*(each.offset for each in list(self._inbox) if each._seat is seat))
            seat.say()

    def close(self, linger_ms: int) -> None:
        unseen: dict[Seat, list[int]] = {}
        with self.link.lock:
            self._closed = True
            while self._inbox:  # others get these; somebody may be taking one of them
                with contextlib.suppress(IndexError):
                    record = self._inbox.popleft()
                    unseen.setdefault(record._seat, []).append(record.offset)
        for seat in list(self._seats.values()):
            seat.close(unseen.get(seat, []))
        self.link.close()


class Consumer(Receiving[ConsumedRecord]):
    """A member of a group: iterate over it, or call `recv`. Safe from several threads and tasks,
    which then share its records."""

    def __init__(self, core: Consuming, owner: object, release: Callable[[], None]) -> None:
        super().__init__(core.link.what, owner, release)
        self._core = core

    @property
    def group(self) -> str:
        """Its name."""
        return self._core.group

    @property
    def partitions(self) -> frozenset[str]:
        """Those that it consumes."""
        return self._core.partitions

    @property
    def missing(self) -> frozenset[str]:
        """Partitions of the stream that this node has met and cannot reach now: their records come
        once it can."""
        return self._core.missing

    @property
    def committed(self) -> dict[str, int]:
        """Of each partition the offset below which the group has settled all, as it was heard last:
        see `flush`. Goes back only where a log has lost its tail: see `cuts`."""
        return {seat.partition: seat.committed for seat in list(self._core._seats.values())}

    @property
    def cuts(self) -> list[tuple[str, int, int]]:
        """What was delivered here and a log has lost since, the latest of these: partition, first
        and last offset. Only of streams that show records before they are on disk. Those
        that took their place come with the same offsets; to acknowledge a lost one does nothing."""
        return list(self._core.cuts)

    @property
    def gaps(self) -> list[tuple[str, int, int, int]]:
        """What retention removed before anybody of the group had settled it, the latest of these:
        partition, first and last offset, and how many records between them."""
        return list(self._core.gaps)

    @property
    def lost(self) -> int:
        """How many records retention removed so, in all."""
        return self._core.counters.lost

    def recv(self, timeout: float | None = None) -> ConsumedRecord:
        """The next record, blocking up to `timeout` seconds (None: for ever, 0: not at all).

        Raises `Timeout`, whose text says so if what came before has to be settled first
        (`prefetch`), or a sidecar's disk is too full for the group to begin; `NoSidecar`, which is
        a `Timeout`, if nobody has the stream yet (call again: what is appended later comes);
        `OptionsDiffer` and `InvalidOption` if the group cannot be had so; `StorageFailed`,
        `LogDamaged` if its partition cannot be read on; `PayloadTooLarge` if what comes next is
        over this node's `message_bytes_max`: that, and what follows there, is for others of the
        group; `Closed`.
        """
        core = self._core
        record = core.pop()
        if record is None:
            self._check_open()
            core.about_to_wait()
            try:
                record = core.link.wait(core.take, check_timeout(timeout), "record")
            except Timeout as late:
                raise core.explained(late) from None
        return record

    async def arecv(self, timeout: float | None = None) -> ConsumedRecord:
        """`recv` for asyncio. Cancelling it loses nothing."""
        core = self._core
        record = core.pop()
        if record is None:
            self._check_open()
            core.about_to_wait()
            try:
                record = await core.link.wait_async(
                    core.take, check_timeout(timeout), "record", give_back=core.give_back
                )
            except Timeout as late:
                raise core.explained(late) from None
        return record

    def resume_from(self, positions: Iterable[tuple[str, int]]) -> None:
        """Of each partition that is named, all records up to and including that offset are done
        with: who keeps `ConsumedRecord.position` where the records' effects are, knows. See
        docs/once.md.

        Before the first `recv`, and with ``order="exclusive"``. Raises `InvalidOption`; `recv` does
        if the stream's `durability` is another than ``"fsync"``: its offsets may be given again; or
        if the log ends before such an offset: then it is another one, or an older copy of it. Does
        not block.
        """
        done = {}
        for each in positions:
            match each:
                case (str(partition), int(offset)) if len(partition) == 16 and offset >= 0:
                    done[partition] = offset + 1
                case _:
                    text = "a position is a partition of 16 digits and an offset"
                    raise InvalidOption(f"{text}, not {each!r}")
        self._core.resume(done)

    def flush(self, *, timeout: float | None = 10.0) -> None:
        """Block until all that was said of records (`ack`, `nak`, `extend`, `reject`) is remembered
        by their sidecars, up to `timeout` seconds (None: for ever). Raises `Timeout`, `Closed`."""
        self._check_open()
        self._core.say()
        self._core.link.wait(self._is_settled, check_timeout(timeout), _ANSWERS, retry_s=_FLUSH_S)

    async def aflush(self, *, timeout: float | None = 10.0) -> None:
        """`flush` for asyncio."""
        self._check_open()
        self._core.say()
        await self._core.link.wait_async(
            self._is_settled, check_timeout(timeout), _ANSWERS, retry_s=_FLUSH_S
        )

    def close(self) -> None:
        """Leave the group: what was done is said, what is here and was not taken goes to others.
        Gives the sidecars up to a second to hear it, and logs which has not. Idempotent."""
        if self.closed:
            return
        deadline = deadline_of(_CLOSE_S)
        try:
            self._core.close(0)
            for link, is_heard in self._core.farewells():
                link.wait(is_heard, left_of(deadline), _HEARD, retry_s=_FLUSH_S)
        except Closed:
            return
        except Timeout:
            self._core.tell_unheard()
        finally:
            super().close()

    async def aclose(self) -> None:
        """`close` for asyncio."""
        if self.closed:
            return
        deadline = deadline_of(_CLOSE_S)
        try:
            self._core.close(0)
            for link, is_heard in self._core.farewells():
                await link.wait_async(is_heard, left_of(deadline), _HEARD, retry_s=_FLUSH_S)
        except Closed:
            return
        except Timeout:
            self._core.tell_unheard()
        finally:
            super().close()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _is_settled(self) -> bool | None:
        return self._core.settled() or None


def _is_before(one: ConsumedRecord, other: ConsumedRecord) -> bool:
    """Whether it came before the other, from the same partition."""
    return one._seat is other._seat and (one._heard, one.offset) < (other._heard, other.offset)
