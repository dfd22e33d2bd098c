"""What a consumer has done with records of one partition, and has not said yet.

It is said in messages of bounded size. What was handed back goes first, so that it is known
beforehand which message says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

from mesh import limits
from mesh.durable.deliveries import Settlements
from mesh.durable.derivations import OFFSET_END
from mesh.durable.intervals import Intervals

T = TypeVar("T")

_ITEM_BYTES: Final = 20
"""What is said of an offset or a range takes that at most, but for a reason's text."""
_CUTS_MAX: Final = 64


class Unsaid:
    """See above. To be called under the seat's lock."""

    def __init__(self, bytes_max: int) -> None:
        """`bytes_max`: of what one message says."""
        self.bound(bytes_max)
        self.count = 0
        """How much there is to say: each thing done counts, and of what is left by a message that
        was full, its ranges."""
        self._done_first = self._done_end = 0
        """What was acknowledged in a row, and is not in `_acks` yet: nearly all comes in a row, and
        takes no search so. Empty: both 0."""
        self._acks = Intervals()
        self._naks: list[tuple[int, float]] = []
        self._extends: list[int] = []
        self._rejects: list[tuple[int, str]] = []
        self._unseen = Intervals()
        self._cuts: list[tuple[int, int]] = []
        """A log epoch, and an offset: records from there on that were written under an earlier
        epoch were cut off. Both ascend."""

    def bound(self, bytes_max: int) -> None:
        """One message says no more than that from now on."""
        self._items_max = min(max(1, bytes_max // _ITEM_BYTES), limits.SETTLED_MAX)

    @property
    def messages_before_nak(self) -> int:
        """How many messages there will be before the one that says what is handed back next."""
        return len(self._naks) // self._items_max

    @property
    def settles(self) -> bool:
        """Whether some of it is that a record needs not come again."""
        return bool(self._acks or self._done_end or self._rejects)

    def ack(self, offset: int, log_epoch: int) -> int:
        """Returns how much there is to say."""
        if self._cuts and self.is_gone(offset, log_epoch):
            return self.count
        if offset == self._done_end and offset:
            self._done_end = offset + 1
        else:
            self._gather()
            self._done_first, self._done_end = offset, offset + 1
        self.count += 1
        return self.count

    def nak(self, offset: int, delay_s: float) -> None:
        self._naks.append((offset, delay_s))
        self.count += 1

    def extend(self, offsets: Iterable[int]) -> None:
        before = len(self._extends)
        self._extends += offsets
        self.count += len(self._extends) - before

    def reject(self, offset: int, reason: str) -> None:
        self._rejects.append((offset, reason[: limits.REASON_CHARACTERS_MAX]))
        self.count += 1

    def add_unseen(self, offsets: Iterable[int]) -> None:
        """They are here, and nobody was shown them."""
        for offset in offsets:
            self._unseen.add(offset, offset + 1)
            self.count += 1

    def take(self) -> Settlements:
        """As much of it as one message may say."""
        self._gather()
        room = self._items_max
        naks = _taken(self._naks, room)
        room -= len(naks)
        acks = self._acks.take(room)
        room -= len(acks)
        extends = _taken(self._extends, room)
        room -= len(extends)
        rejects: list[tuple[int, str]] = []
        for offset, reason in self._rejects:
            text = self._fitting(reason)
            room -= 1 + -(-len(text) // _ITEM_BYTES)
            if room < 0:
                break
            rejects.append((offset, text.decode(errors="ignore")))
        del self._rejects[: len(rejects)]
        unseen = self._unseen.take(max(0, room))
        said = Settlements(
            tuple(acks),
            tuple(naks),
            tuple(extends),
            tuple(rejects),
            tuple(unseen),
        )
        self._count()
        return said

    def _fitting(self, reason: str) -> bytes:
        """As much of it as there is room for in a message that says nothing else."""
        text = reason.encode(errors="backslashreplace")  # a file's name may be no text
        return text[: (self._items_max - 1) * _ITEM_BYTES]

    def put_back(self, said: Settlements, log_epoch: int) -> None:
        """That was not heard: what of it was not cut off since is to be said once more."""
        said = said.below(self._kept_since(log_epoch))
        for first, end in said.acks:
            self._acks.add(first, end)
        for first, end in said.unseen:
            self._unseen.add(first, end)
        self._naks[:0] = said.naks
        self._extends[:0] = said.extends
        self._rejects[:0] = said.rejects
        self._count()

    def is_gone(self, offset: int, log_epoch: int) -> bool:
        """Whether a record was cut off since it was delivered."""
        return bool(self._cuts) and offset >= self._kept_since(log_epoch)

    def cut(self, at: int, log_epoch: int) -> None:
        """What was delivered from there on was cut off before that epoch: what was done about it
        must not be said of the records that come in its place."""
        cuts = [cut for cut in self._cuts if cut[1] < at]
        self._cuts = [*cuts, (log_epoch, at)][-_CUTS_MAX:]
        self._gather()
        for ranges in (self._acks, self._unseen):
            ranges.discard(at, OFFSET_END)
        self._naks = [each for each in self._naks if each[0] < at]
        self._extends = [each for each in self._extends if each < at]
        self._rejects = [each for each in self._rejects if each[0] < at]
        self._count()

    def _kept_since(self, log_epoch: int) -> int:
        """Below that nothing was cut off since the log had that epoch."""
        return min((at for epoch, at in self._cuts if log_epoch < epoch), default=OFFSET_END)

    def _gather(self) -> None:
        if self._done_end > self._done_first:
            self._acks.add(self._done_first, self._done_end)
            self._done_first = self._done_end = 0

    def _count(self) -> None:
        self.count = sum(
            len(each)
            for each in (self._acks, self._naks, self._extends, self._rejects, self._unseen)
        )


def _taken(items: list[T], most: int) -> list[T]:
    """The first of them, which are taken out."""
    taken = items[:most]
    del items[:most]
    return taken
