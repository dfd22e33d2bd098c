"""An open batch: small messages of one channel that are to share the next frame. No I/O, no clock.

Whoever sends appends without a lock, which is what makes a busy channel cheap, and closes the batch
when it is full; the flusher (`mesh.sockets.flusher`) closes it when it gets old. Nothing is lost
between the two by this rule: who shuts a batch sets `room` to 0 *first* and looks at `items` after
that, and who appended looks at `room` again: if it is 0, nobody may have seen the item, and its
sender has to see to it under the lock.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final

import msgspec

BUSY_S: Final = 50e-6
"""A channel of which one message follows another this closely is busy. Sending one by itself takes
some 7 us, so that a loop that does nothing else is; who waits for an answer in between is not."""
MESSAGES_MAX: Final = 512
"""In one frame, of those that are waited for."""
LIST_MESSAGES_MAX: Final = 1024
"""In one frame, of those that are there already."""
BYTES_MAX: Final = 124 * 1024
"""Of the items in one frame. With what MessagePack adds, 3 bytes to each, with name and header it
stays within 128 KiB, which every peer lets in, however small its `message_bytes_max`."""
ITEM_BYTES_MAX: Final = 4096
"""A larger message travels in a frame of its own: sharing one would save it little."""

ALONE_BYTES_MIN: Final = 64 * 1024
"""A payload of so much travels by itself, as the receiver expects it."""
_STEP: Final = 64
_MANY: Final = 512
"""Among so many in a frame none is as large, nearly always."""
_ITEM_HEADER_BYTES: Final = 5
"""What MessagePack puts before bytes, at most."""

Item = bytes | msgspec.Raw
"""A payload: bytes as they are, anything else in MessagePack already."""


class Batch:
    """What was sent on a channel and has not left yet, in order."""

    __slots__ = ("item_bytes_max", "items", "message_bytes_max", "room")

    def __init__(self, message_bytes_max: int = ITEM_BYTES_MAX) -> None:
        self.items: list[Item] = []
        self.room = 0
        """Senders may append while there are fewer items. 0: the batch is shut."""
        self.message_bytes_max = message_bytes_max - _ITEM_HEADER_BYTES
        self.item_bytes_max = min(ITEM_BYTES_MAX, self.message_bytes_max)

    def begin(self, room: int = MESSAGES_MAX) -> None:
        """From now on senders may append, up to so many."""
        self.room = room

    def shut(self) -> None:
        """Nobody appends any more, but for those that have looked already."""
        self.room = 0

    def next(self, count_max: int = MESSAGES_MAX) -> list[Item]:
        """What the next frame is to hold at most, still in here."""
        return self.items[: min(count_max, MESSAGES_MAX)]

    def remove(self, count: int, size: int, room_max: int = MESSAGES_MAX) -> None:
        """The first `count`, of `size` bytes together, are on their way. How many may follow goes
        by how large they were, and is at most `room_max`, before anybody sees that there are
        fewer."""
        if self.room:
            fitting = max(1, BYTES_MAX * count // size) if count else self.room
            self.room = min(fitting, MESSAGES_MAX, room_max)
        del self.items[:count]

    def put_back(self, items: Sequence[Item]) -> None:
        """There was no room for them: they come first again."""
        self.items[:0] = items

    def give_up(self) -> int:
        """Nothing leaves any more: throw away what is here, and say how many that were. Whoever
        appends later still `withdraw`s its own."""
        count = len(self.items)
        del self.items[:count]
        return count

    def withdraw(self, item: Item) -> bool:
        """Take out an item that is still here; False if it has left."""
        for i, each in enumerate(self.items):
            if each is item:
                del self.items[i]
                return True
        return False


def leading(payloads: Sequence[Any], bytes_max: int) -> tuple[int, int]:
    """How many of `payloads`, from the first on, may share a frame, and their bytes, no more than
    `bytes_max` together. Raises `TypeError`, `BufferError` for what is no buffer.

    Joining them tells that in a fraction of the time that looking at each takes. It is done to some
    at a time, and not where the first or the last of those is large: the others are then, too, and
    a copy of them all may be more than there is memory."""
    count = size = 0
    while count < min(len(payloads), LIST_MESSAGES_MAX):
        some = payloads[count : count + _STEP]
        if len(some[0]) > bytes_max or len(some[-1]) > bytes_max:
            added = bytes_max + 1
        else:
            added = len(b"".join(some))
        if size + added > bytes_max:
            sizes = list(accumulate((memoryview(each).nbytes for each in some), initial=size))
            more = bisect_right(sizes, bytes_max) - 1
            count, size = count + more, sizes[more]
            break
        count += len(some)
        size += added
    if count < _MANY and any(len(each) >= ALONE_BYTES_MIN for each in payloads[:count]):
        return 0, 0
    return count, size


def fitting(items: Sequence[Item]) -> int:
    """How many of `items` one frame may hold."""
    return max(1, bisect_right(list(accumulate(map(len, items))), BYTES_MAX))
