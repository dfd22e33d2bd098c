"""Recording topics into a stream: `Node.record`.

Guarantee: every message that this node publishes on a topic of the pattern, while it is recorded,
is in the log once, or under way, or counted in `Recording.lost`. It says which message it was
(`Record.origin`), so that a subscriber can fill a gap from the log (`mesh.durable.repairer`).

The publisher's own node records, so that nothing is recorded twice, and what no subscriber got is
recorded as well. A thread does it: who publishes waits for nothing, but for room where its topic
waits for that (``when_full="wait"``), as for any subscriber that is full.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from mesh import limits
from mesh.durable.appending import Appending
from mesh.durable.complaint import Complaint
from mesh.durable.encoding import AROUND_BYTES
from mesh.durable.producing import Producing
from mesh.durable.recording_account import Account, Published
from mesh.durable.records import BatchOrigin
from mesh.errors import (
    Busy,
    Closed,
    MeshError,
    NoSidecar,
    OutcomeUnknown,
    PayloadTooLarge,
    Timeout,
)
from mesh.names import check_pattern
from mesh.options import check_timeout
from mesh.sockets.control import Offer, OfferKind
from mesh.sockets.home import Counters, Unhurried
from mesh.sockets.link import Link
from mesh.sockets.outgoing import Outgoing

logger = logging.getLogger(__name__)

_LOOK_S: Final = 0.25
"""How often it is looked whether the end has come, while there is no sidecar."""
_ANSWER_S: Final = 0.05
"""Longest wait for one answer before it is looked whether more is to be recorded."""
_UNDER_WAY_MAX: Final = 96
"""Batches: a little less than an appender asks for at a time."""
_AGAIN_S: Final = 1.0
"""After the log has refused the producer itself, another is tried."""
_GONE_S: Final = 5.0
"""How long a log that went may take to come back: longer than a sidecar takes to start again."""


class Recorder(Unhurried):
    """The core of one recording, and its thread."""

    kind = "stream"
    seeks: OfferKind | None = None

    def __init__(
        self,
        node: int,
        pattern: str,
        into: str,
        bytes_max: int,
        producing: Callable[[], Producing],
        offer: Callable[[str], int],
        withdraw: Callable[[int], object],
        send: Callable[[], object],
        is_there: Callable[[str], bool],
    ) -> None:
        """Of node `node`, whose messages have `bytes_max` at most. `producing` makes a new producer
        for the stream `into`. `offer` tells others of a partition that has some of the recording,
        and returns the key that `withdraw` takes that back with. `send` sends what a topic still
        gathers for a batch. `is_there` says whether a partition can be reached. Raises
        `InvalidName`."""
        self.channel = check_pattern(pattern)
        self.into = into
        self.counters = Counters()
        self.link = Link(f"recording of {pattern!r}")
        self.account = Account(limits.RECORDING_BYTES_MAX)
        self._node = node
        self._bytes_max = bytes_max
        self._producing_of = producing
        self._offer = offer
        self._withdraw = withdraw
        self.send = send
        self._bell = threading.Condition(self.link.lock)
        self._asleep = False
        self._deadline = math.inf
        self._producing: Producing | None = None
        self._partitions: dict[str, int] = {}
        """With the keys of their offers."""
        self._under_way: deque[Appending] = deque()
        self._refused_until = -math.inf
        self._is_there = is_there
        self._gone_since: float | None = None
        """When it was first seen that the partition of what is under way is not there."""
        self._look_at = 0.0
        self._loses = Complaint(logger)
        self._refusal = ""
        """Why nothing is recorded just now, where nobody is there to record."""
        self._thread = threading.Thread(target=self._work, name=f"mesh record {into}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # -- What is published: under the lock of its topics ---------------------------------------

    def has_room(self) -> bool:
        return self.account.has_room()

    def take(
        self, channel: str, waits: bool, seq: int, time_ns: int, message: Outgoing, missed: int
    ) -> None:
        origin = BatchOrigin(self._node, channel, seq, time_ns, waits)
        with self.link.lock:
            if self.link.closed:
                missed += message.count
            elif not self.account.take(Published(origin, message)):
                self.counters.dropped["not recorded"] += message.count
            elif self._asleep:
                self._asleep = False
                self._bell.notify()
            if missed:
                self.account.missed(missed)
                self.counters.dropped["not recorded"] += missed

    # -- The rest of a core --------------------------------------------------------------------

    def attach(self, peer: int, offer: Offer, endpoint: str) -> None:
        raise AssertionError("a recording seeks nobody")

    def detach(self, peer: int, key: int, reason: str) -> None:
        raise AssertionError("a recording seeks nobody")

    def tick(self) -> None:
        """Nothing is to be done now and then."""

    def finish(self) -> None:
        """Record what was taken, however long that takes, and end. Does not block."""
        with self.link.lock:
            self.account.end()
            self._bell.notify()

    def close(self, linger_ms: int) -> None:
        with contextlib.suppress(Closed):
            self.send()
        with self.link.lock:
            self.account.end()
            self._deadline = min(self._deadline, time.monotonic() + linger_ms / 1000)
            self._bell.notify()

    def explained(self, late: Timeout) -> Timeout:
        """`late`, which says so if there is nobody to record."""
        return NoSidecar(f"{late}: {self._refusal}") if self._refusal else late

    def join(self, timeout: float) -> None:
        """Wait for the end of the thread."""
        self._thread.join(timeout)

    # -- The thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._is_over():
                if self._step():
                    continue
                if self._under_way:
                    self._await()
                else:
                    self._sleep()
        except Closed:
            pass  # the node is, and with it the way to the log
        finally:
            self.link.close(first=self._conclude)

    def _is_over(self) -> bool:
        return self.account.over or time.monotonic() >= self._deadline

    def _step(self) -> bool:
        """Have the next frame be under way; False if there is none, or it has to wait."""
        if self._producing is None:
            self._producing = self._producing_of()
        published = self.account.first()
        if self._under_way and time.monotonic() >= self._look_at:
            self._look_where_it_is()
        if len(self._under_way) >= _UNDER_WAY_MAX:
            return False
        try:
            if not self._partitions:
                self._bound(self._producing.bind(_LOOK_S).route.partition)
            if published is None:
                return False
            if time.monotonic() < self._refused_until:
                raise MeshError("the log refused before")
            batch = published.batch()
            if (size := batch.header.size + AROUND_BYTES) > self._bytes_max:
                raise PayloadTooLarge(f"record of {size:,} bytes over {self._bytes_max:,}")
            appending = self._producing.submit(batch, _LOOK_S)
        except NoSidecar as error:  # tried again until the end
            if published is not None and not self._refusal:
                logger.warning("%s into %r waits: %s", self.link.what, self.into, error)
                self._refusal = str(error)
            return True
        except Busy:
            return True  # likewise
        except Closed:
            raise
        except MeshError as error:
            if published is not None:
                self._first_is_lost(error)
            return True
        with self.link.lock:
            self.account.submitted()
        self._under_way.append(appending)
        self._bound(appending.partition)
        self._reap()
        return True

    def _bound(self, partition: str) -> None:
        self._refusal = ""
        if partition not in self._partitions:
            self._partitions[partition] = self._offer(partition)
            if len(self._partitions) > limits.RECORDING_PARTITIONS_MAX:
                self._withdraw(self._partitions.pop(next(iter(self._partitions))))

    def _look_where_it_is(self) -> None:
        """A log that went and does not come back is left for another, if there is one: what is
        under way to it is not known to be there."""
        now = time.monotonic()
        self._look_at = now + _LOOK_S
        partition = self._under_way[0].partition
        if self._is_there(partition):
            self._gone_since = None
        elif self._gone_since is None:
            self._gone_since = now
        elif now - self._gone_since > _GONE_S:
            other = self._producing_of()
            with contextlib.suppress(NoSidecar):
                other.bind(0)
                self._leave(partition, other)

    def _leave(self, partition: str, other: Producing) -> None:
        self._gone_since, self._producing = None, other
        error = OutcomeUnknown(f"partition {partition} has been gone for {_GONE_S:g} s")
        self._under_way[0].give_up(error)
        self._reap()

    def _first_is_lost(self, error: MeshError) -> None:
        """It was refused before it was under way."""
        self._settled(self.account.refused, error)
        if not isinstance(error, PayloadTooLarge) and time.monotonic() >= self._refused_until:
            # Its producer can append no more: what is under way is told so as well.
            self._producing, self._refused_until = None, time.monotonic() + _AGAIN_S

    def _await(self) -> None:
        """For the outcome of the first that is under way."""
        appending = self._under_way[0]
        try:
            appending.wait(_ANSWER_S)
        except Timeout:
            return
        except Closed:
            if not appending.done:
                raise
        except MeshError:
            pass  # told where it is settled
        self._reap()

    def _reap(self) -> None:
        while self._under_way and self._under_way[0].done:
            try:
                self._under_way.popleft().wait(0)
            except MeshError as error:
                self._settled(partial(self.account.settle, recorded=False), error)
            else:
                self._settled(partial(self.account.settle, recorded=True), None)

    def _settled(self, settle: Callable[[], int], error: MeshError | None) -> None:
        with self.link.lock:
            count = settle()
            if error is not None:
                self.counters.dropped["not recorded"] += count
            if not self.link.alone:
                self.link.wake_all()
        if error is None:
            self._loses.ended()
        else:
            text, reason = "%s into %r loses messages: %s", type(error).__name__
            self._loses.say(text, self.link.what, self.into, error, reason=reason)

    def _sleep(self) -> None:
        with self._bell:
            if self.account.first() is None and not self._is_over():
                self._asleep = True
                self._bell.wait(None if self._deadline == math.inf else _LOOK_S)
                self._asleep = False

    def _conclude(self) -> None:
        """Under the lock."""
        for key in self._partitions.values():
            self._withdraw(key)
        if lost := self.account.give_up():
            self.counters.dropped["not recorded"] += lost
            logger.warning(
                "%s into %r ended with %d messages not recorded%s",
                self.link.what,
                self.into,
                lost,
                self._refusal and f": {self._refusal}",
            )


class Recording:
    """What `Node.record` returns. Recording goes on if this is forgotten, until `close`, or until
    the node is closed. Safe from several threads."""

    def __init__(self, core: Recorder, owner: object, release: Callable[[], None]) -> None:
        self._core = core
        self._owner = owner
        self._release = release

    @property
    def pattern(self) -> str:
        """Of the topics that are recorded."""
        return self._core.channel

    @property
    def stream(self) -> str:
        """The name of the stream that it is recorded into."""
        return self._core.into

    @property
    def recorded(self) -> int:
        """How many messages are in the log. Does not block."""
        return self._core.account.recorded

    @property
    def lost(self) -> int:
        """How many messages could not be recorded, or are not known to be: no room for those that
        wait for the log, or in the log; no log until the end. Does not block."""
        return self._core.account.lost

    def __repr__(self) -> str:
        return f"<{self._core.link.what} into {self.stream!r}>"

    def flush(self, *, timeout: float | None = 10.0) -> None:
        """Block until all that was published before is recorded, or counted as lost, up to
        `timeout` seconds (None: for ever). Raises `Timeout`, and of these `NoSidecar` if nobody is
        there to record; `Closed`."""
        wait_s, attempt = check_timeout(timeout), self._awaiting()
        try:
            self._core.link.wait(attempt, wait_s, self._awaited)
        except Timeout as late:
            raise self._core.explained(late) from None
        except Closed:
            if not attempt():
                raise

    async def aflush(self, *, timeout: float | None = 10.0) -> None:
        """`flush` for asyncio."""
        wait_s, attempt = check_timeout(timeout), self._awaiting()
        try:
            await self._core.link.wait_async(attempt, wait_s, self._awaited)
        except Timeout as late:
            raise self._core.explained(late) from None
        except Closed:
            if not attempt():
                raise

    def close(self) -> None:
        """Record nothing that is published from now on; what was before still is. Does not block;
        idempotent."""
        self._release()

    def _awaiting(self) -> Callable[[], bool | None]:
        self._core.send()
        account = self._core.account
        taken = account.taken
        return lambda: account.settled_to >= taken or None

    @property
    def _awaited(self) -> str:
        return f"answer for all that was published on {self.pattern!r}"
