"""A consumer's place in its group at one partition: it joins, fetches, and says what was done.

A thread of its own asks for more and hands over what comes, as long as the consumer takes it; what
was done is gathered, and said when there is much of it, when the consumer waits, and at every tick.
What a sidecar that restarted has forgotten is said again by joining again.

In a group with an order, a record that is handed back takes along what is behind it. What of that
is here, or was sent before the sidecar had heard of it, is *recalled*: the consumer passes it over,
and it comes again in its turn.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from itertools import count, repeat
from typing import Final

from mesh import limits
from mesh.durable.consumed import ConsumedRecord
from mesh.durable.cursor import Cut
from mesh.durable.deliveries import AskedOptions, Settlements
from mesh.durable.derivations import OFFSET_END
from mesh.durable.held import Held
from mesh.durable.intervals import Intervals
from mesh.durable.outcomes import Refused, error_of
from mesh.durable.protocol import (
    Delivered,
    Fetch,
    Join,
    Joined,
    Reply,
    Settle,
    Settled,
    read_batch,
)
from mesh.durable.reading import run_of
from mesh.durable.route import Ask, Route, answer
from mesh.durable.waiting import Order
from mesh.errors import Closed, MeshError, StorageFailed
from mesh.sockets.frame import Malformed

logger = logging.getLogger(__name__)

_AGAIN_S: Final = 0.2
"""Before a sidecar that refused for the time being is asked again."""
_SETTLES_MAX: Final = 64
"""Under way at one time; what comes then is gathered."""
_FOR_NOW: Final = ("closed", "missing", "storage", "unknown")
"""Codes of refusals after which it joins again."""
_CUTS_MAX: Final = 64
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
        hand_over: Callable[[Seat, Taken], bool],
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
        self._fetches = count(1)
        self._fetched = 0
        """Number of the last of these of which all was handed over."""
        self._log_epoch = 0
        """The log's when this joined; 0 before."""
        self._end = 0
        """Behind all that was delivered and is there still."""
        self._cuts: list[tuple[int, int]] = []
        """Under `_lock`. A log epoch, and an offset: records from there on that were written under
        an earlier epoch were cut off. Both ascend."""
        self._closed = False
        self._pause = threading.Event()
        # What was done, and not said yet. Under `_lock`.
        self._lock = threading.Lock()
        self._done_first = self._done_end = 0
        """The range that the last acknowledgements made."""
        self._acks = Intervals()
        self._naks: list[tuple[int, float]] = []
        self._extends: list[int] = []
        self._rejects: list[tuple[int, str]] = []
        self._unseen = Intervals()
        self._unsaid = 0
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
            if self._cuts and self._is_gone(offset, log_epoch):
                return
            if offset == self._done_end and self._done_end:
                self._done_end = offset + 1
            else:
                self._gather()
                self._done_first, self._done_end = offset, offset + 1
            self._unsaid += 1
            enough = self._unsaid >= self._say_at
        if enough:
            self.say()

    def nak(self, record: ConsumedRecord, delay_s: float) -> None:
        with self._lock:
            self._held.discard(record.offset)
            if self._cuts and self._is_gone(record.offset, record.log_epoch):
                return
            lane = self._lane_of(record)
            if lane is not None:
                if self.recalled(record):
                    return  # or it is taken back once more, as it is here again, or under way
                self._all_taken(record._heard)
                self.handed_back.pop(lane, None)
                self.handed_back[lane] = record.offset, self._last_said + 1
            self._naks.append((record.offset, delay_s))
            self._unsaid += 1
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
            self._extends += offsets
            self._unsaid += len(offsets)
        self.say()

    def reject(self, offset: int, log_epoch: int, reason: str) -> None:
        reason = reason[: limits.REASON_CHARACTERS_MAX]
        reason = reason.encode(errors="backslashreplace").decode()  # a file's name may be no text
        with self._lock:
            self._held.discard(offset)
            if self._cuts and self._is_gone(offset, log_epoch):
                return
            self._rejects.append((offset, reason))
            self._unsaid += 1
        self.say()

    def say(self, *, leave: bool = False) -> None:
        """Say what was done, if it was not said yet. Does not block."""
        if not (self._unsaid and self._log_epoch) and not leave:
            return  # who has not joined, is not known there
        try:
            self.route.link.run(lambda: self._say(leave))
        except Closed:
            return

    @property
    def settled(self) -> bool:
        """Whether all that was done was said, and is remembered. Under the link's lock."""
        self.route.look(self._said[0][0] if self._said else None)
        self._hear()
        return not self._said and not self._unsaid

    def _say(self, leave: bool) -> None:
        """Under the link's lock."""
        self._hear()
        if len(self._said) >= _SETTLES_MAX and not leave:
            return
        with self._lock:
            self._gather()
            said = Settlements(
                tuple(self._acks),
                tuple(self._naks),
                tuple(self._extends),
                tuple(self._rejects),
                tuple(self._unseen),
            )
            self._acks, self._naks, self._extends, self._rejects = Intervals(), [], [], []
            self._unsaid, log_epoch = 0, self._log_epoch
            self._last_said += 1
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
        self._said.append((self.route.begin(query), query))

    def _gather(self) -> None:
        if self._done_end > self._done_first:
            self._acks.add(self._done_first, self._done_end)
            self._done_first = self._done_end = 0

    def _is_gone(self, offset: int, log_epoch: int) -> bool:
        """Whether a record was cut off since it was delivered. Under `_lock`."""
        return offset >= self._kept_since(log_epoch)

    def _kept_since(self, log_epoch: int) -> int:
        """Below that nothing was cut off since the log had that epoch. Under `_lock`."""
        return min((at for epoch, at in self._cuts if log_epoch < epoch), default=OFFSET_END)

    def _cut(self, at: int, log_epoch: int) -> None:
        """What was delivered from there on was cut off before that epoch: what was done about it
        must not be said of the records that come in its place. Under `_lock`."""
        cuts = [cut for cut in self._cuts if cut[1] < at]
        self._cuts = [*cuts, (log_epoch, at)][-_CUTS_MAX:]
        self._gather()
        self._acks.discard(at, OFFSET_END)
        self._naks = [each for each in self._naks if each[0] < at]
        self._extends = [each for each in self._extends if each < at]
        self._rejects = [each for each in self._rejects if each[0] < at]

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
        acks, rejects = query.said.acks, query.said.rejects
        with self._lock:
            kept = self._kept_since(query.log_epoch)
            for first, end in acks:
                self._acks.add(first, min(end, kept))
            self._rejects[:0] = [each for each in rejects if each[0] < kept]
            self._unsaid += len(acks) + len(rejects)

    # -- What comes: its own thread ----------------------------------------------------------

    def close(self, unseen: Iterable[int] = ()) -> None:
        """Fetch no more. What was done is said, and that it leaves, and which records nobody has
        seen. Does not block."""
        if self._closed:
            return
        with self._lock:
            for offset in unseen:
                self._unseen.add(offset, offset + 1)
        self._closed = True
        self._pause.set()
        self.say(leave=True)
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
                    self._pause.wait(_AGAIN_S)
        except Closed:
            return
        except MeshError as error:
            self._hand_over(self, error)
        except Malformed as fault:
            text = f"sidecar {self.partition} sent what cannot be decoded: {fault.reason}"
            self._hand_over(self, StorageFailed(text))

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
        self.refusal = reply.text if isinstance(reply, Refused) and reply.code == "storage" else ""
        if isinstance(reply, Joined):
            self.ack_wait_s = reply.options.ack_wait_s
            self._order = reply.options.order
            self._joined(reply)
            self.say()
            return True
        if isinstance(reply, Refused) and reply.code not in _FOR_NOW:
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
                self._cut(cut.first, reply.log_epoch)
        if cut is not None:
            self._hand_over(self, cut)

    def _fetch(self) -> None:
        """Until it has to join again, or is closed."""
        while not self._closed:
            query = Fetch(
                self._stream, self.group, self._member, next(self._fetches), limits.READ_WAIT_MS
            )
            reply = self._ask(lambda query=query: query)  # type: ignore[misc]
            if isinstance(reply, Delivered):
                self._deliver(reply, query.number)
            elif isinstance(reply, Refused) and reply.code not in _FOR_NOW:
                raise error_of(reply)
            else:
                return

    def _ask(self, query: Callable[[], Join | Fetch]) -> Reply | None:
        """`query` is made under the link's lock, so that nothing is said meanwhile, nor anything
        asked once it has left. None: it is closed."""
        route = self.route
        ask = route.link.run(lambda: None if self._closed else route.begin(query()))
        if ask is None:
            return None
        return answer(route, ask, None, "records", stopped=lambda: self._closed, refused=False)

    def _deliver(self, reply: Delivered, number: int) -> None:
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
            base = max((each for each in bases if each <= first), default=None)
            if base is None or batches[base][0].end < end:
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
        if not records or self._hand_over(self, records):
            self._fetched = number
