"""Waiting for what was submitted to an `mesh.durable.appender.Appender`, in a thread or a task."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from copy import copy
from typing import Any, Final

import msgspec

from mesh.durable.appender import Appender, Pending
from mesh.durable.batch import Batch
from mesh.durable.outcomes import OFFSET_UNKNOWN
from mesh.durable.route import Ask
from mesh.errors import Busy, MeshError, Timeout
from mesh.message import Receipt
from mesh.timeouts import Deadline, deadline_of, left_of

WINDOW_BYTES: Final = 16 * 1024 * 1024
"""Under way at one time: who appends more waits."""
AGAIN_S: Final = 0.05
"""How often who waits without an ask of its own looks again."""
_RECEIPT: Final = "receipt"
_ROOM: Final = "room for an append"


class Appending(msgspec.Struct, frozen=True, eq=False):
    """An append under way, from `Stream.append_nowait`. Wait for it, or ``await`` it; or do not,
    and have `Stream.flush` do so for all."""

    _appender: Appender
    _pending: Pending
    _index: int | None = None
    """Which of its batch it is; None: all of it."""

    @property
    def partition(self) -> str:
        """Whose log it is to be in."""
        return self._appender.route.partition

    @property
    def done(self) -> bool:
        """Whether its outcome is known here. Does not block, nor look."""
        return self._pending.done

    def give_up(self, error: MeshError) -> None:
        """See `Appender.give_up`: all of its producer at that partition. Raises `Closed`."""
        self._appender.give_up(error)

    def __repr__(self) -> str:
        state = "done" if self.done else "under way"
        return f"<append to stream {self._appender.stream!r} at {self.partition} {state}>"

    def wait(self, timeout: float | None = None) -> Receipt:
        """Block until its outcome is known, up to `timeout` seconds (None: for ever). Raises what
        `Stream.append` raises. From any thread, any number of times."""
        wait(self._appender, self._pending, deadline_of(timeout))
        return receipt_of(self._appender, self._pending, self._index)

    def __await__(self) -> Generator[Any, None, Receipt]:
        yield from await_(self._appender, self._pending, None).__await__()
        return receipt_of(self._appender, self._pending, self._index)


def wait(appender: Appender, pending: Pending, deadline: Deadline | None) -> None:
    """Block until its outcome is known. Raises `Timeout`, `Closed`."""
    if not pending.done:
        link = appender.route.link
        _wait(appender, pending, link.run(lambda: appender.claim(pending)), deadline)


def append(appender: Appender, batch: Batch, deadline: Deadline | None) -> Receipt:
    """Have it appended, and block until its outcome is known. Raises what `Stream.append` does."""
    pending, ask = appender.route.link.run(lambda: appender.submit_and_claim(batch))
    _wait(appender, pending, ask, deadline)
    return receipt_of(appender, pending)


def _wait(appender: Appender, pending: Pending, ask: Ask | None, deadline: Deadline | None) -> None:
    """With the `ask` that was claimed, and then whichever it takes."""
    link, route = appender.route.link, appender.route
    while True:
        try:
            if ask is not None:
                route.travel(ask, left_of(deadline))
            link.wait(
                _attempt(appender, pending, ask),
                left_of(deadline),
                _RECEIPT,
                slot=ask,
                retry_s=None if ask is not None else AGAIN_S,
            )
        finally:
            with link.lock:
                appender.release(ask)
        if _is_taken_in(appender, pending):
            return
        ask = link.run(lambda: appender.claim(pending))


async def await_(appender: Appender, pending: Pending, deadline: Deadline | None) -> None:
    """`wait` for asyncio."""
    link = appender.route.link
    while not _is_taken_in(appender, pending):
        ask = link.run(lambda: appender.claim(pending))
        try:
            await link.wait_async(
                _attempt(appender, pending, ask),
                left_of(deadline),
                _RECEIPT,
                slot=ask,
                retry_s=None if ask is not None else AGAIN_S,
            )
        finally:
            with link.lock:
                appender.release(ask)


def _is_taken_in(appender: Appender, pending: Pending) -> bool:
    """Whether its outcome is known. A hand-over only says that the answer is here: it is taken in
    before anybody looks whom to wait with."""
    if not pending.done:
        appender.route.link.run(lambda: appender.advance(None))
    return pending.done


def _attempt(appender: Appender, pending: Pending, ask: Ask | None) -> Callable[[], bool | None]:
    if ask is None:
        return lambda: _look(appender, pending)

    def attempt() -> bool | None:
        for first in (ask, None):  # who goes on waiting has to have read all there is
            appender.advance(first)
            if pending.done or not appender.depends_on(pending, ask):
                return True
        return None

    return attempt


def _look(appender: Appender, pending: Pending) -> bool | None:
    """Of who waits without an ask, until there is an outcome, or one to wait with."""
    if not pending.done:
        appender.advance(None)
    return pending.done or appender.may_claim(pending) or None


def wait_for_room(
    appender: Appender, deadline: Deadline | None, begun: Sequence[Pending] = ()
) -> None:
    """Block until less than `WINDOW_BYTES` are under way. Raises `Closed`; and `Busy` if that takes
    longer than `deadline`: then of the call no more is under way than was `begun` before, which
    goes on."""
    if appender.bytes_waiting >= WINDOW_BYTES:
        try:
            appender.route.link.wait(
                lambda: _has_room(appender), left_of(deadline), _ROOM, retry_s=AGAIN_S
            )
        except Timeout as late:
            raise _no_room(appender, late, begun) from None


async def await_room(
    appender: Appender, deadline: Deadline | None, begun: Sequence[Pending] = ()
) -> None:
    """`wait_for_room` for asyncio."""
    if appender.bytes_waiting >= WINDOW_BYTES:
        try:
            await appender.route.link.wait_async(
                lambda: _has_room(appender), left_of(deadline), _ROOM, retry_s=AGAIN_S
            )
        except Timeout as late:
            raise _no_room(appender, late, begun) from None


def _no_room(appender: Appender, late: Timeout, begun: Sequence[Pending]) -> MeshError:
    for each in begun:
        if each.error is not None:  # it comes first, as where there is room
            return copy(each.error)
    count = sum(each.count for each in begun)
    what = f"only the first {count:,} records of this are begun" if count else "nothing of this is"
    under_way = f"{WINDOW_BYTES >> 20} MiB are under way to partition {appender.route.partition}"
    return Busy(f"{late}: {under_way}, and {what}")


def _has_room(appender: Appender) -> bool | None:
    if appender.bytes_waiting >= WINDOW_BYTES:
        appender.advance(None)
    return appender.bytes_waiting < WINDOW_BYTES or None


def flush(appender: Appender, deadline: Deadline | None, what: str) -> None:
    """Block until nothing is under way. Raises `Timeout`, `Closed`."""
    link = appender.route.link
    while appender.at_work:
        ask = link.run(appender.claim_last)
        try:
            link.wait(_progress(appender, ask), left_of(deadline), what, slot=ask, retry_s=AGAIN_S)
        finally:
            with link.lock:
                appender.release(ask)


async def aflush(appender: Appender, deadline: Deadline | None, what: str) -> None:
    """`flush` for asyncio."""
    link = appender.route.link
    while appender.at_work:
        ask = link.run(appender.claim_last)
        try:
            await link.wait_async(
                _progress(appender, ask), left_of(deadline), what, slot=ask, retry_s=AGAIN_S
            )
        finally:
            with link.lock:
                appender.release(ask)


def _progress(appender: Appender, ask: Ask | None) -> Callable[[], bool | None]:
    def attempt() -> bool | None:
        appender.advance(None)
        if ask is None:
            return appender.idle or appender.may_claim_last or None
        return appender.idle or appender.route.reply(ask) is not None or None

    return attempt


def receipt_of(appender: Appender, pending: Pending, index: int | None = None) -> Receipt:
    """Of one whose outcome is known, or of one record in it. Raises that, if it is an error."""
    if pending.error is not None:
        raise copy(pending.error)
    appended = pending.appended
    assert appended is not None
    return Receipt(
        appender.route.partition,
        None if appended.offset == OFFSET_UNKNOWN else appended.offset + (index or 0),
        appended.count if index is None else 1,
        appended.time_ns,
        "fsynced" if appender.durability == "fsync" else "written",
        appended.repeated,
    )


def join(receipts: list[Receipt], receipt: Receipt) -> None:
    """Append it, or make one range of it and the last."""
    if receipts and receipt.offset is not None:
        last = receipts[-1]
        follows = last.offset is not None and last.offset + last.count == receipt.offset
        if follows and last.partition == receipt.partition and not receipt.repeated:
            receipts[-1] = msgspec.structs.replace(last, count=last.count + receipt.count)
            return
    receipts.append(receipt)
