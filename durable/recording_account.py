"""What a node published and has recorded: what waits for the log, and what became of it. No I/O.

Promises that the account adds up: every message that was taken is waiting, under way, recorded or
lost. What waits is bounded in bytes; what comes beyond is lost, and counted. One frame of a topic
is one batch of records, and its payloads stay as they are encoded.

Used under its owner's lock. Knows neither threads nor streams.
"""

from __future__ import annotations

from collections import deque

import msgspec

from mesh import limits
from mesh.durable.batch import Batch
from mesh.durable.records import BatchOrigin, batch_of_published
from mesh.sockets.outgoing import Outgoing


class Published(msgspec.Struct, frozen=True, gc=False):
    """A frame that has left."""

    origin: BatchOrigin
    """Of its first message."""
    message: Outgoing

    @property
    def count(self) -> int:
        return self.message.count

    @property
    def cost(self) -> int:
        """Bytes that it holds while it waits, about."""
        return len(self.message) + limits.RECORDING_FRAME_BYTES

    def batch(self) -> Batch:
        """It as a log keeps it."""
        payloads, headers = self.message.kept()
        return batch_of_published(self.origin, payloads, self.count, headers)


class Account:
    """See above. Counts messages."""

    def __init__(self, bytes_max: int) -> None:
        self.taken = 0
        self.recorded = 0
        self.lost = 0
        self._bytes_max = bytes_max
        self._bytes = 0
        self._waiting: deque[tuple[int, Published]] = deque()
        """With how many were taken before."""
        self._under_way: deque[tuple[int, int]] = deque()
        """Likewise, with how many they are."""
        self._until: int | None = None
        """What was taken after so many is not waited for."""

    @property
    def settled_to(self) -> int:
        """Of how many, from the first that was taken on, it is known what became of them."""
        for unsettled in (self._under_way, self._waiting):
            if unsettled:
                return unsettled[0][0]
        return self.taken

    @property
    def over(self) -> bool:
        """Whether all is settled that was taken before the end began."""
        return self._until is not None and self.settled_to >= self._until

    def has_room(self) -> bool:
        return self._bytes < self._bytes_max

    def take(self, published: Published) -> bool:
        """It is to be recorded; False if there is no room for it, so that it is lost."""
        if not self.has_room():
            self.missed(published.count)
            return False
        self._waiting.append((self.taken, published))
        self.taken += published.count
        self._bytes += published.cost
        return True

    def missed(self, count: int) -> None:
        """So many were to be taken, and are lost."""
        self.taken += count
        self.lost += count

    def first(self) -> Published | None:
        """The one that has waited longest."""
        return self._waiting[0][1] if self._waiting else None

    def submitted(self) -> None:
        """That one is under way."""
        at, published = self._waiting.popleft()
        self._bytes -= published.cost
        self._under_way.append((at, published.count))

    def refused(self) -> int:
        """That one is lost; says how many messages it has."""
        _, published = self._waiting.popleft()
        self._bytes -= published.cost
        self.lost += published.count
        return published.count

    def settle(self, *, recorded: bool) -> int:
        """What became of the one that has been under way for longest; how many messages it has."""
        _, count = self._under_way.popleft()
        if recorded:
            self.recorded += count
        else:
            self.lost += count
        return count

    def end(self) -> None:
        """What is taken from now on need not be recorded."""
        if self._until is None:
            self._until = self.taken

    def give_up(self) -> int:
        """All that is not settled is lost; says how many that are."""
        count = self.taken - self.recorded - self.lost
        self.lost += count
        self._waiting.clear()
        self._under_way.clear()
        self._bytes = 0
        return count
