"""What one producer has under way to one partition: numbered, in order, until its outcome is known.

Guarantee: records are in the log in the order in which they were submitted here, each once, however
often the connection breaks or either side's wait ends. What was refused was not written; what came
behind it is numbered anew and asked for again. A wait that ends changes nothing: its records stay
under way, and what is submitted later comes behind them.

All under the lock of its route's link, and driven by whoever waits or submits. That may be the main
thread, in which a Ctrl-C can come behind any call: what is between two queues then would be in
neither, so such steps are done with ``finally``. Knows no sockets.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from copy import copy
from typing import Final

import msgspec

from mesh import limits
from mesh.durable.batch import HEADER_BYTES, Batch
from mesh.durable.encoding import BATCH_BYTES, BATCH_RECORDS
from mesh.durable.outcomes import OPENS_AGAIN, Appended, Opened, Refused, error_of
from mesh.durable.protocol import Open
from mesh.durable.records import Item, NewRecord, batch_of
from mesh.durable.route import Ask, Route
from mesh.errors import (
    Busy,
    Closed,
    MeshError,
    OutcomeUnknown,
    PayloadTooLarge,
    StorageFailed,
)
from mesh.options import StreamOptions
from mesh.sockets.flusher import Flusher

_ASKS_MAX: Final = limits.PRODUCER_BATCHES // 2
"""Batches of a producer under way: half of what the log remembers of it, so that each of them can
be recognised if it has to be asked for again."""
_PAUSE_S: Final = 0.05
"""Before a log that was full is asked again; it doubles each time."""
_PAUSE_S_MAX: Final = 1.0
_REPLACE: Final = msgspec.structs.replace


class Pending:
    """A batch under way. Who waits for it, does so with its ask. An *open* one is made of `items`,
    to which others may come until it is asked for."""

    __slots__ = ("appended", "ask", "batch", "error", "items", "size")

    def __init__(self, batch: Batch | None, items: list[Item] | None = None, size: int = 0) -> None:
        self.batch = batch
        self.items = items
        self.size = size if batch is None else batch.header.size
        """Bytes, about."""
        self.ask: Ask | None = None
        self.appended: Appended | None = None
        self.error: MeshError | None = None

    @property
    def done(self) -> bool:
        return self.appended is not None or self.error is not None

    @property
    def count(self) -> int:
        """Of its records."""
        return len(self.items or ()) if self.batch is None else self.batch.header.count


class Appender:
    """See above."""

    def __init__(
        self,
        route: Route,
        stream: str,
        producer: int,
        options: StreamOptions | None,
        *,
        flusher: Flusher,
        bytes_max: int,
        waits: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`flusher` has open batches asked for. A message has `bytes_max` at most. `waits`: while
        the log is full; else its appends are refused."""
        self.route = route
        self.stream = stream
        self.producer = producer
        self.durability = "fsync"
        self.bytes_waiting = 0
        """Of all that is under way."""
        self.next_seq: int | None = None
        """Of the next record; None while that is not known."""
        self._options = options
        self._flusher = flusher
        self._waits = waits
        self._now = now
        self._pause_s = 0.0
        self._paused_until = 0.0
        self._open_bytes_max = min(BATCH_BYTES, bytes_max // 2, route.bytes_max // 2)
        self._epoch = 0
        self._opening: Ask | None = None
        self._claimed: list[Ask | None] = []
        """By who waits. None: who waits for what others have claimed, and looks again soon."""
        self._failed: MeshError | None = None
        """Nothing more can be appended."""
        self._queue: deque[Pending] = deque()
        """What has not been asked for, or has to be asked for again."""
        self._asked: deque[Pending] = deque()
        self._rewinding = False
        """Whether one was refused: those behind it are refused as well, and then go out again."""

    @property
    def idle(self) -> bool:
        """Whether nothing is under way. Under the link's lock: what is moved from one queue to the
        other is in neither for a moment."""
        return not self._queue and not self._asked

    @property
    def at_work(self) -> bool:
        """Whether something is under way. Takes the link's lock."""
        try:
            return self.route.link.run(lambda: not self.idle)
        except Closed:
            return not self.idle  # nothing moves any more

    @property
    def records_waiting(self) -> int:
        """How many records are under way."""
        return sum(each.count for each in (*self._asked, *self._queue))

    @property
    def paused(self) -> bool:
        """Whether nothing is asked for, as there was no room just now."""
        return self._pause_s > 0 and self._now() < self._paused_until

    def submit(self, batch: Batch) -> Pending:
        """Have it appended, behind all that was submitted before. Raises `ProducerFenced` and the
        like, if nothing can be any more."""
        pending = Pending(batch)
        self._enqueue(pending)
        self._send()
        return pending

    def submit_item(self, item: Item, size: int) -> tuple[Pending, int]:
        """Likewise one record, of so many bytes at most, and which of its batch it is: what comes
        closely behind another shares one."""
        if type(item) is NewRecord and item.unique:
            return self.submit(batch_of([item])), 0
        last = self._queue[-1] if self._queue else None
        if last is not None and last.items is not None and self._failed is None:
            if len(last.items) < BATCH_RECORDS and last.size + size <= self._open_bytes_max:
                last.items.append(item)
                last.size += size
                self.bytes_waiting += size
                return last, len(last.items) - 1
            self.advance(None)
        pending = Pending(None, [item], HEADER_BYTES + size)
        self._enqueue(pending)
        if not (self._asked and self._flusher.watch(self)):
            self._send()
            if self._queue:  # its producer is being opened
                self._flusher.watch(self)
        return pending, 0

    def _enqueue(self, pending: Pending) -> None:
        if self._failed is not None:
            raise copy(self._failed)  # what is raised holds on to whoever it went through
        try:
            self._queue.append(pending)
        finally:
            self.bytes_waiting += pending.size

    def close_batches(self) -> bool:
        """Have all that is open asked for: the flusher's. Takes the link's lock."""
        with contextlib.suppress(Closed):
            self.route.link.run(self._close_batches)
        return not self._queue

    def _close_batches(self) -> None:
        self.advance(None)
        if not self._queue or self.paused:  # then it is looked after as all others are
            self._flusher.forget(self)

    def submit_and_claim(self, batch: Batch) -> tuple[Pending, Ask | None]:
        """`submit`, and `claim` what it depends on: that is to `Route.travel` then."""
        pending = Pending(batch)
        self._enqueue(pending)
        self._send(alone=True)
        return pending, self.claim(pending)

    def begin(self) -> None:
        """Find out where its sequence stands."""
        if self.next_seq is None and self._opening is None and self._failed is None:
            with contextlib.suppress(Busy):  # then later
                self._opening = self.route.begin(Open(self.stream, self.producer, self._options))

    def claim(self, pending: Pending) -> Ask | None:
        """The ask that its outcome depends on, to wait with, if nobody else does; to be `released`.
        None: there is none, or more than one answer is missing; look again soon."""
        ask = self._ask_of(pending)
        free = ask if self._is_free(ask) else None
        self._claimed.append(free)
        return free

    def claim_last(self) -> Ask | None:
        """Likewise, the ask that all others are answered before."""
        ask = self._asked[-1].ask if self._asked else None
        free = ask if self._is_free(ask) else None
        self._claimed.append(free)
        return free

    def may_claim(self, pending: Pending) -> bool:
        """Whether `claim` has one to give."""
        return self._is_free(self._ask_of(pending))

    @property
    def may_claim_last(self) -> bool:
        return bool(self._asked) and self._is_free(self._asked[-1].ask)

    def _is_free(self, ask: Ask | None) -> bool:
        """Whether there is one, not answered yet, and nobody waits with it."""
        return ask is not None and ask not in self._claimed and self.route.reply(ask) is None

    def release(self, ask: Ask | None) -> None:
        """What was claimed: nobody waits with it any more, or without any."""
        self._claimed.remove(ask)
        if ask is not None and None in self._claimed:
            self.route.link.wake_all()  # they may have their outcome now, or this ask

    def depends_on(self, pending: Pending, ask: Ask) -> bool:
        """Whether its outcome depends on that still, and on nothing else."""
        return self._ask_of(pending) is ask

    def _ask_of(self, pending: Pending) -> Ask | None:
        return self._opening if pending.ask is None else pending.ask

    def advance(self, ask: Ask | None) -> None:
        """Take in what answers there are, those to `ask` first, and ask for what is next."""
        self.route.look(ask)
        self._opened()
        self._settle()
        self._send()

    # -- What is asked for -------------------------------------------------------------------

    def _send(self, *, alone: bool = False) -> None:
        if self._rewinding or not self._queue or self.paused:
            return
        if self.next_seq is None:
            self.begin()
            self._opened()  # within the process it may have been answered
        while (
            self._queue
            and self.next_seq is not None
            and not (self._asked and self.route.travels(self._asked[-1].ask))  # type: ignore[arg-type]
            and len(self._asked) < _ASKS_MAX
            and not self._rewinding
        ):
            pending = self._queue[0]
            batch = pending.batch
            if batch is None:
                assert pending.items is not None
                batch = pending.batch = batch_of(pending.items)
                pending.items = None
            header = _REPLACE(
                batch.header,
                producer=self.producer,
                producer_epoch=self._epoch,
                seq=self.next_seq,
            )
            pending.batch = batch = Batch(header, batch.body)
            alone = alone and not self._asked and len(self._queue) == 1
            append = self.route.append_alone if alone else self.route.append
            try:
                pending.ask = append(self.stream, batch)
            except Busy:
                return
            except PayloadTooLarge as error:  # for the sidecar, which takes less than this node
                pending.error = error
                self._passed_over(pending)
                continue
            self.next_seq += header.count
            try:
                self._queue.popleft()
            finally:
                self._asked.append(pending)

    def _passed_over(self, pending: Pending) -> None:
        """The first in the queue is not asked for."""
        try:
            self._queue.popleft()
        finally:
            self.bytes_waiting -= pending.size
        self.route.link.wake_all()

    def _opened(self) -> None:
        if self._opening is None:
            return
        reply = self.route.reply(self._opening)
        if reply is None:
            return
        self._opening = None
        if isinstance(reply, Opened):
            self._epoch, self.next_seq, self.durability = reply.epoch, reply.seq, reply.durability
            self._open_bytes_max = min(self._open_bytes_max, self.route.bytes_max // 2)
            self._pause_s = 0.0
        elif isinstance(reply, Refused):
            if self._waits_for(reply):
                self._pause()
            else:
                self._fail(error_of(reply), for_good=reply.code not in OPENS_AGAIN)
        elif isinstance(reply, MeshError):
            self._fail(reply)
        else:
            self._fail(StorageFailed("the sidecar's answer to the opening of a producer is none"))

    def give_up(self, error: MeshError) -> None:
        """What is under way is waited for no more, and nothing can be appended any more, as `error`
        says. Takes the lock."""

        def fail() -> list[Ask]:
            asks = [self._opening, *(each.ask for each in self._asked)]
            self._opening = None
            self._fail(error)
            return [ask for ask in asks if ask is not None]

        for ask in self.route.link.run(fail):
            self.route.abandon(ask)

    def _fail(self, error: MeshError, *, for_good: bool = True) -> None:
        """Nothing of what is under way can be appended, nor anything later if it is `for_good`."""
        self._failed = error if for_good else None
        for pending in self._asked:
            if pending.error is None and self._may_be_there(pending):
                text = f"whether it was written is not known: {error}"
                pending.error = OutcomeUnknown(text)
        for pending in (*self._asked, *self._queue):
            pending.error = pending.error or error
        self._asked.clear()
        self._queue.clear()
        self.bytes_waiting = 0
        self.route.link.wake_all()

    # -- What was answered -------------------------------------------------------------------

    def _settle(self) -> None:
        asked = self._asked
        if self._rewinding:
            self._rewind()
        while asked and not self._rewinding:
            reply = self.route.reply(asked[0].ask)  # type: ignore[arg-type]
            if reply is None:
                return
            self._settled(asked[0], reply)

    def _settled(self, pending: Pending, reply: object) -> None:
        assert pending.batch is not None
        header = pending.batch.header
        if isinstance(reply, Appended):
            pending.appended = reply
            self._pause_s = 0.0
            self._done(pending)
        elif isinstance(reply, Refused) and reply.code == "fenced":
            self._fail(error_of(reply))
        elif isinstance(reply, Refused) and reply.code == "gap" and reply.seq <= header.seq:
            # The log has lost what it had not promised to keep: go on from where it is, as it says
            # then. (If this had come before what was asked for first, that number would be taken.)
            self._again(None)
        elif isinstance(reply, Refused) and self._waits_for(reply):
            self._pause()
            self._again(header.seq)
        elif isinstance(reply, Refused) and reply.code == "unknown":
            if self._may_be_there(pending):
                pending.error = error_of(reply)
                self._done(pending)
            self._again(None)
        elif isinstance(reply, Refused) and not self._may_be_there(pending):
            pending.error = error_of(reply)
            self._done(pending)
            self._again(reply.seq if reply.code == "gap" else header.seq)
        else:  # it may have been written, and who comes next must not be taken for it
            why = reply.text if isinstance(reply, Refused) else str(reply)
            pending.error = OutcomeUnknown(f"whether it was written is not known: {why}")
            self._done(pending)
            self._again(None)

    def _done(self, pending: Pending) -> None:
        try:
            self._asked.popleft()
        finally:
            self.bytes_waiting -= pending.size

    def _waits_for(self, refused: Refused) -> bool:
        """Whether it is to be tried again, once there is room."""
        return self._waits and refused.code == "full"

    def _pause(self) -> None:
        self._pause_s = min(max(2 * self._pause_s, _PAUSE_S), _PAUSE_S_MAX)
        self._paused_until = self._now() + self._pause_s

    def _may_be_there(self, pending: Pending) -> bool:
        """Though it was refused: its disk is not sure, or an earlier connection brought it."""
        assert pending.ask is not None
        reply = self.route.reply(pending.ask)
        unsure = isinstance(reply, Refused) and reply.code == "unsure"
        return unsure or not self.route.sent_once(pending.ask)

    def _again(self, seq: int | None) -> None:
        """All that is still asked for will be refused; then it is asked for again, from `seq` on,
        or, if that is not known, after opening."""
        self._rewinding = True
        self.next_seq = seq
        self._rewind()

    def _rewind(self) -> None:
        asked = self._asked
        if any(self.route.reply(pending.ask) is None for pending in asked):  # type: ignore[arg-type]
            return
        while asked:
            pending = asked[-1]
            reply = self.route.reply(pending.ask)  # type: ignore[arg-type]
            if self.next_seq is None and self._may_be_there(pending):
                pending.error = OutcomeUnknown("the log no longer knows this producer")
            elif isinstance(reply, Appended):  # it was there before
                pending.appended = reply
            done = pending.done
            try:
                asked.pop()
            finally:
                if done:
                    self.bytes_waiting -= pending.size
                else:
                    pending.ask = None
                    self._queue.appendleft(pending)
        self._rewinding = False
        self.route.link.wake_all()
