"""A consumer's place in its group at one partition: it joins, fetches, and says what was done.

A thread of its own asks for more and hands over what comes, as long as the consumer takes it; what
was done is gathered, and said when there is much of it, when the consumer waits, and at every tick.
What a sidecar that restarted has forgotten is said again by joining again.

In a group with an order, a record that is handed back takes along what is behind it. What of that
is here, or was sent before the sidecar had heard of it, is *recalled*: the consumer passes it over,
and it comes again in its turn.
"""

from __future__ import annotations

import contextlib
import threading
import time
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from itertools import count, repeat
from typing import Final

from mesh import limits
from mesh.durable.consumed import ConsumedRecord
from mesh.durable.cursor import Cut
from mesh.durable.deliveries import AskedOptions, Settlements
from mesh.durable.held import Held
from mesh.durable.outcomes import ASK_AGAIN_S, JOINS_AGAIN, TOLD_MEANWHILE, Refused, error_of
from mesh.durable.protocol import (
    Delivered,
    Fetch,
    Join,
    Joined,
    Reply,
    Settle,
    Settled,
    read_batch,
    room_for_settlements,
)
from mesh.durable.reading import run_of
from mesh.durable.route import Ask, Route, answer
from mesh.durable.unsaid import Unsaid
from mesh.durable.waiting import Order
from mesh.errors import Busy, Closed, MeshError, PayloadTooLarge, StorageFailed
from mesh.sockets.frame import Malformed

_SETTLES_MAX: Final = 64
"""Under way at one time; what comes then is gathered."""
_UNDECODABLE: Final = "its payload cannot be decoded"


Taken = list[ConsumedRecord] | tuple[int, int, int] | Cut | MeshError
"""Records, or what retention took (first, last, how many), or what was delivered and then cut off,
or why there will be none."""


class Seat:
    """See above."""

    def __init__(
        self,
        route: Route,
        stream: str,
        group: str,
        member: str,
        *,
        prefetch: int,
        options: AskedOptions,
        from_ns: int | None,
        resume: int | None,
        message_bytes_max: int,
        hand_over: Callable[[Seat, Taken], object],
    ) -> None:
        self.route = route
        self.partition = route.partition
        self.group = group
        self.ack_wait_s = 30.0
        self._order: Order = "any"
        self.committed = 0
        """All records of the group below that are settled, as heard last."""
        self.refusal = ""
        """Why it cannot join now, if it is the sidecar's disk that keeps it from that."""
        self.extended_at = time.monotonic()
        self._stream = stream
        self._member = member
        self._prefetch = prefetch
        self._options = options
        self._from_ns = from_ns
        self._resume = resume
        self._message_bytes_max = message_bytes_max
        self._hand_over = hand_over
        self._number = int(route.partition, 16)
        self._fetching = 0
        """Number of the last `Fetch`."""
        self._fetched = 0
        """Number of the last of which all was handed over. Under the lock of whom it is handed to.
        """
        self._log_epoch = 0
        """The log's when this joined; 0 before."""
        self._end = 0
        """Behind all that was delivered and is there still."""
        self._closed = False
        self._left = False
        """Whether it was said that it leaves. Under the link's lock."""
        self._pause = threading.Event()
        # What was done. Under `_lock`.
        self._lock = threading.Lock()
        self._unsaid = Unsaid(self._room)
        self._held = Held(prefetch)
        self._last_said = 0
        """Number of the last `Settle` that was made."""
        self._heard = 0
        """Number of the last `Settle` that the sidecar had heard when it sent the latest records.
        """
        self.handed_back: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        """By lane, which is a key, or ``b""`` for all with ``order="exclusive"``: the offset that
        was handed back, and the number of the `Settle` that says so. Numbers ascend."""
        self._say_at = max(1, prefetch // 4)
        self._said: deque[tuple[Ask, Settle]] = deque()
        self._thread = threading.Thread(
            target=self._work, name=f"mesh consumer {group} {self.partition}", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    # -- What was done: any thread -----------------------------------------------------------

    def ack(self, offset: int, log_epoch: int) -> None:
        with self._lock:
            self._held.discard(offset)
            enough = self._unsaid.ack(offset, log_epoch) >= self._say_at
        if enough:
            self.say()

    def nak(self, record: ConsumedRecord, delay_s: float) -> None:
        with self._lock:
            self._held.discard(record.offset)
            if self._unsaid.is_gone(record.offset, record.log_epoch):
                return
            lane = self._lane_of(record)
            if lane is not None:
                if self.recalled(record):
                    return  # or it is taken back once more, as it is here again, or under way
                self._held.discard_from(record.offset)
                self._all_taken(record._heard)
                self.handed_back.pop(lane, None)
                number = self._last_said + 1 + self._unsaid.messages_before_nak
                self.handed_back[lane] = record.offset, number
            self._unsaid.nak(record.offset, delay_s)
        self.say()

    def recalled(self, record: ConsumedRecord) -> bool:
        """Whether it was handed back, or one before it, with which it goes: it comes again."""
        lane = self._lane_of(record)
        if lane is None:
            return False
        offset, number = self.handed_back.get(lane, (0, 0))
        return record._heard < number and record.offset >= offset

    def passes_over(self, record: ConsumedRecord) -> bool:
        """Likewise, of one that the consumer is about to take."""
        if not self.handed_back or not self.recalled(record):
            return False
        with self._lock:
            self._held.discard(record.offset)
        return True

    @property
    def unsettled(self) -> int:
        """How many records are here, of which nothing was said yet."""
        with self._lock:
            return self._held.count(time.monotonic())

    def nothing_here(self) -> None:
        """The consumer has taken all that came."""
        with self._lock:
            self._all_taken(self._heard)

    def _all_taken(self, heard: int) -> None:
        """The consumer has taken all that was sent before so much was heard. Under `_lock`."""
        handed_back = self.handed_back
        while handed_back and handed_back[first := next(iter(handed_back))][1] <= heard:
            del handed_back[first]

    def _lane_of(self, record: ConsumedRecord) -> bytes | None:
        return record.key if self._order == "key" else b"" if self._order == "exclusive" else None

    def extend(self, *offsets: int) -> None:
        with self._lock:
            self._held.extend(offsets, time.monotonic() + self.ack_wait_s)
            self._unsaid.extend(offsets)
        self.say()

    def reject(self, offset: int, log_epoch: int, reason: str) -> None:
        with self._lock:
            self._held.discard(offset)
            if self._unsaid.is_gone(offset, log_epoch):
                return
            self._unsaid.reject(offset, reason)
        self.say()

    def say(self) -> None:
        """Say what was done, if it was not said yet. Does not block."""
        if not (self._unsaid.count and self._log_epoch) and not self._leaves:
            return  # who has not joined, is not known there
        try:
            self.route.link.run(self._say)
        except (Busy, Closed, PayloadTooLarge):
            return  # it is said later, if it can be

    @property
    def settled(self) -> bool:
        """Whether all that was done was said, and is remembered. Under the link's lock."""
        self.route.look(self._said[0][0] if self._said else None)
        self._hear()
        return not self._said and not self._unsaid.count and not self._leaves

    @property
    def unheard(self) -> bool:
        """Whether records were done with, and it is not known whether that is remembered."""
        with contextlib.suppress(Closed):
            self.route.link.run(lambda: self.settled)
        return self._unsaid.settles or any(
            query.said.acks or query.said.rejects for _, query in list(self._said)
        )

    @property
    def _leaves(self) -> bool:
        """Whether it has yet to say that it leaves."""
        return self._closed and not self._left

    def _say(self) -> None:
        """Under the link's lock. Raises `Busy`, `PayloadTooLarge`: nothing of that is lost."""
        self._hear()
        more = True
        while more and (self._leaves or len(self._said) < _SETTLES_MAX):
            with self._lock:
                said, log_epoch = self._unsaid.take(), self._log_epoch
                more = self._unsaid.count > 0
                self._last_said += 1
            leave = self._leaves and not more
            query = Settle(
                self._stream,
                self.group,
                self._member,
                log_epoch,
                said,
                leave,
                self._last_said,
                self._fetched,
            )
            try:
                ask = self.route.begin(query)
            except (Busy, PayloadTooLarge):
                with self._lock:
                    self._put_back(said, log_epoch)
                raise
            self._left = self._left or leave
            self._said.append((ask, query))

    def _put_back(self, said: Settlements, log_epoch: int) -> None:
        """The last message could not be sent. Under `_lock`."""
        self._unsaid.put_back(said, log_epoch)
        self._unsaid.bound(self._room)  # a sidecar may take less than it did
        for lane, (offset, number) in self.handed_back.items():
            if number > self._last_said:  # what was to be said in the next is said in the one after
                self.handed_back[lane] = offset, number + 1

    @property
    def _room(self) -> int:
        """For what one message says, in bytes."""
        bytes_max = min(self._message_bytes_max, self.route.bytes_max)
        return room_for_settlements(self._stream, self.group, self._member, bytes_max)

    def _hear(self) -> None:
        """Forget what was confirmed. Under the link's lock."""
        while self._said and (reply := self.route.reply(self._said[0][0])) is not None:
            _, query = self._said.popleft()
            if not isinstance(reply, Settled):
                self._say_again(query)
                continue
            with self._lock:
                if query.log_epoch == self._log_epoch:
                    self.committed = max(self.committed, reply.committed)

    def _say_again(self, query: Settle) -> None:
        """That was refused: by a sidecar that is about to close, say. What it was to take back it
        does by itself."""
        said = Settlements(query.said.acks, rejects=query.said.rejects)
        with self._lock:
            self._unsaid.put_back(said, query.log_epoch)

    # -- What comes: its own thread, but for its end ----------------------------------------

    def handed(self) -> None:
        """All that was fetched is where it can be taken. Under the lock of whoever may close this,
        so that it is either taken, or among what nobody has seen."""
        self._fetched = self._fetching

    def close(self, unseen: Iterable[int] = ()) -> None:
        """Fetch no more. What was done is said, and that it leaves, and which records nobody has
        seen. Does not block."""
        if self._closed:
            return
        with self._lock:
            self._unsaid.add_unseen(unseen)
        self._closed = True
        self._pause.set()
        self.say()
        try:
            self.route.link.run(self.route.link.wake_all)
        except Closed:
            return

    def _work(self) -> None:
        try:
            while not self._closed:
                if self._join():
                    self._fetch()
                if not self._closed:
                    self._pause.wait(ASK_AGAIN_S)
        except Closed:
            return
        except MeshError as error:
            self._give_up(error)
        except Malformed as fault:
            text = f"sidecar {self.partition} sent what cannot be decoded: {fault.reason}"
            self._give_up(StorageFailed(text))

    def _give_up(self, error: MeshError) -> None:
        """There will be no more here: others are to have what there is, also those that wait for
        this one's turn to end."""
        self._hand_over(self, error)
        self.close()

    def _join(self) -> bool:
        reply = self._ask(
            lambda: Join(
                self._stream,
                self.group,
                self._member,
                self._prefetch,
                self._options,
                self._from_ns,
                self._resume,
                self._log_epoch,
                self._last_said,
                self._message_bytes_max,
            )
        )
        self.refusal = (
            reply.text if isinstance(reply, Refused) and reply.code in TOLD_MEANWHILE else ""
        )
        if isinstance(reply, Joined):
            self.ack_wait_s = reply.options.ack_wait_s
            self._order = reply.options.order
            self._joined(reply)
            self.say()
            return True
        if isinstance(reply, Refused) and reply.code not in JOINS_AGAIN:
            raise error_of(reply)
        return False

    def _joined(self, reply: Joined) -> None:
        cut: Cut | None = None
        with self._lock:
            self._held.clear()
            self._log_epoch = reply.log_epoch
            known = self.committed if reply.cut_at is None else 0
            self.committed = max(known, reply.committed)
            if reply.cut_at is not None and reply.cut_at < self._end:
                cut = Cut(reply.cut_at, self._end - 1)
                self._end = cut.first
                self._unsaid.cut(cut.first, reply.log_epoch)
        if cut is not None:
            self._hand_over(self, cut)

    def _fetch(self) -> None:
        """Until it has to join again, or is closed."""
        while not self._closed:
            reply = self._ask(self._next_fetch)
            if isinstance(reply, Delivered):
                self._deliver(reply)
            elif isinstance(reply, Refused) and reply.code not in JOINS_AGAIN:
                raise error_of(reply)
            else:
                return

    def _next_fetch(self) -> Fetch:
        self._fetching += 1
        return Fetch(self._stream, self.group, self._member, self._fetching, limits.READ_WAIT_MS)

    def _ask(self, query: Callable[[], Join | Fetch]) -> Reply | None:
        """`query` is made under the link's lock, so that nothing is said meanwhile, nor anything
        asked once it has left. None: it is closed, or there is no room for a question now."""
        route = self.route
        try:
            ask = route.link.run(lambda: None if self._closed else route.begin(query()))
        except Busy:
            return None
        if ask is None:
            return None
        return answer(route, ask, None, "records", stopped=lambda: self._closed, refused=False)

    def _deliver(self, reply: Delivered) -> None:
        for gap in reply.gaps:
            self._hand_over(self, gap)
        batches = {}
        for data in reply.delivery.batches:
            header, body = read_batch(memoryview(data), self._number)
            batches[header.offset] = (header, body)
        self._heard = reply.heard
        records: list[ConsumedRecord] = []
        bases = sorted(batches)
        for first, end, deliveries in reply.delivery.grants:
            base = bases[max(0, bisect_right(bases, first) - 1)] if bases else None
            if base is None or base > first or batches[base][0].end < end:
                raise StorageFailed(f"sidecar {self.partition} granted what it did not send")
            header, body = batches[base]
            self._end = max(self._end, end)
            with self._lock:
                now = time.monotonic()
                self._held.add(range(first, end), now + self.ack_wait_s, now)
            try:
                run = run_of(self._stream, self.partition, header, body, first, end)
            except Malformed:
                for offset in range(first, end):
                    self.reject(offset, header.log_epoch, _UNDECODABLE)
                continue
            assert run is not None
            records += map(
                ConsumedRecord,
                run.payloads,
                count(run.first),
                repeat(run.source),
                repeat(deliveries),
                repeat(self),
                repeat(reply.heard),
            )
        self._hand_over(self, records)
