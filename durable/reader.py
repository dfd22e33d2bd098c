"""Reading one partition on and on: over its route, with what comes next under way already.

Where the log is in this process it is read directly, as long as there is something to read. For one
thread or task at a time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable

from mesh import limits
from mesh.durable.batch import Header
from mesh.durable.cursor import Cursor, Cut, Gap
from mesh.durable.outcomes import ASK_AGAIN_S, FOLLOWS_AGAIN, Refused, error_of
from mesh.durable.protocol import Batches, Read, Reply, read_batch
from mesh.durable.reading import Run, run_of
from mesh.durable.route import Ask, LocalRoute, Route, answer, expected
from mesh.errors import LogDamaged, MeshError, Timeout
from mesh.sockets.frame import Malformed

logger = logging.getLogger(__name__)

Chunk = list[Run] | Gap | Cut


class PartitionReader:
    """See above. `offset` is where it has come to."""

    def __init__(self, route: Route, stream: str, message_bytes_max: int) -> None:
        """`message_bytes_max`: what this node lets in."""
        self.route = route
        self._message_bytes_max = message_bytes_max
        self.partition = route.partition
        self.offset = 0
        self.log_epoch: int | None = None
        """The log's when what is below `offset` was read: see `Cursor.log_epoch`."""
        self.end = 0
        """As of the last answer: behind the last record there."""
        self.follow = False
        self._stream = stream
        self._number = int(route.partition, 16)
        self._ask: Ask | None = None
        self._cursor: Cursor | None = None

    # -- Asking ------------------------------------------------------------------------------

    def asking(self) -> Ask:
        """The question that is to be answered next. Under the lock of the route's link."""
        if self._ask is None:
            wait_ms = limits.READ_WAIT_MS if self.follow else 0
            self._ask = self.route.begin(
                Read(
                    self._stream,
                    self.offset,
                    limits.READ_BYTES,
                    wait_ms,
                    self.log_epoch or 0,
                    self._message_bytes_max,
                )
            )
        return self._ask

    def answered(self, reply: Reply) -> Chunk | None:
        """What it was answered: some records, or what is missing, or was cut off; an empty list if
        there is nothing more; None if there is nothing so far. Raises `LogDamaged`, or what it
        was refused with."""
        self._ask = None
        if isinstance(reply, Refused):
            if not (self.follow and reply.code in FOLLOWS_AGAIN):
                raise error_of(reply)
            return None
        found = expected(Batches, reply, self.route)
        self.end = max(self.end, found.end)
        self.log_epoch = found.log_epoch or None
        if found.cut_at is not None and found.cut_at < self.offset:
            cut = Cut(found.cut_at, self.offset - 1)
            self.offset = found.cut_at
            return cut
        if found.gap_end > self.offset:
            gap = Gap(self.offset, found.gap_end - 1)
            self.offset = found.gap_end
            return gap
        runs = self._runs(map(self._batch, found.batches))
        if isinstance(runs, Gap):
            return runs
        if runs or not self.follow:
            if runs and (self.follow or self.offset < self.end):
                self.route.link.run(self.asking)  # while these are used
            return runs
        return None

    # -- Within the process ------------------------------------------------------------------

    def direct(self) -> Chunk | None:
        """What can be read without asking: some records, or what is missing, or was cut off. None:
        nothing, or the log is elsewhere. In any thread, without the lock; reads the disk."""
        if not isinstance(self.route, LocalRoute) or self._ask is not None:
            return None
        if self._cursor is None:
            log = self.route.log(self._stream)
            if log is None:
                return None
            self._cursor = Cursor(log, self.offset)
        cursor = self._cursor
        if (cursor.offset, cursor.log_epoch) != (self.offset, self.log_epoch):
            # It has asked since, or stopped before a batch that nobody can read.
            cursor.move(self.offset)
            cursor.log_epoch = self.log_epoch
        found = cursor.read(limits.READ_BYTES)
        self.log_epoch = cursor.log_epoch
        if not isinstance(found, list):
            self.offset = cursor.offset
            return found
        return self._runs((each.header, each.body) for each in found) or None

    # -- What is in batches ------------------------------------------------------------------

    def _batch(self, data: memoryview) -> tuple[Header, memoryview]:
        try:
            return read_batch(data, self._number)
        except Malformed:
            raise _damaged(self.partition, self.offset) from None

    def _runs(self, batches: Iterable[tuple[Header, memoryview]]) -> list[Run] | Gap:
        """Their records, up to one whose records nobody can read; if that is the first, it is a
        gap."""
        runs: list[Run] = []
        for header, body in batches:
            try:
                run = run_of(self._stream, self.partition, header, body, self.offset)
            except Malformed:
                return runs or self._passed_over(header)
            if run is not None:
                runs.append(run)
                self.offset = header.end
        return runs

    def _passed_over(self, header: Header) -> Gap:
        """Its records are as whoever appended them sent them, and nobody can read them."""
        gap = Gap(max(self.offset, header.offset), header.end - 1)
        what = f"records {gap.first} to {gap.last} of partition {self.partition}"
        logger.error("stream %r: %s are malformed, and passed over", self._stream, what)
        self.offset = header.end
        return gap

    def forget(self) -> None:
        """What was asked is not waited for any more."""
        self._ask = None

    def close(self) -> None:
        if self._ask is not None:
            self.route.abandon(self._ask)
            self.forget()
        if self._cursor is not None:
            self._cursor.close()
            self._cursor = None


def read(
    reader: PartitionReader,
    timeout: float | None,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Chunk:
    """What comes next. Blocks until there is something, or nothing more, or it is `stopped`. Raises
    `LogDamaged`, `StorageFailed`, `PayloadTooLarge` if what comes next is more than this node lets
    in, `Timeout`, `Closed`."""
    while True:
        chunk = None if stopped() else reader.direct()
        if chunk is not None:
            return chunk
        ask = reader.route.link.run(reader.asking)
        what = "part of a stream"
        try:
            reply = answer(reader.route, ask, timeout, what, stopped=stopped, refused=False)
        except Timeout:
            reader.forget()
            raise
        if reply is None:
            reader.forget()
            return []
        chunk = reader.answered(reply)
        if chunk is not None:
            return chunk
        if isinstance(reply, Refused):
            with contextlib.suppress(Timeout):
                reader.route.link.wait(lambda: stopped() or None, ASK_AGAIN_S, what)


def _damaged(partition: str, offset: int) -> MeshError:
    return LogDamaged(f"a batch of partition {partition}", 0, offset, "it is malformed")
