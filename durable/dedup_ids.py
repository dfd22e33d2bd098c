"""Dedup ids that users give to appends: which were used lately, and for which record. No I/O.

An id is remembered for a window of the log's own clock, counted from the record that used it first:
a repeat within the window gets the original's offset and time and is not appended. It is at most
`limits.DEDUP_IDS_MAX` ids; beyond that the oldest are forgotten before their time, which is
counted. After that, or after the window, a repeat is appended like anything new.

The log's clock is the time in its batches, which never goes back. So what is remembered follows
from the records alone, and reading them again makes the same table.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator

import msgspec

from mesh import limits
from mesh.errors import InvalidOption

NS_PER_S = 1_000_000_000


class Original(msgspec.Struct, frozen=True):
    """Where the record is that a repeat repeats: what its receipt said."""

    offset: int
    time_ns: int


class UsedId(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A dedup id and the record that used it, as remembered and as written in a snapshot."""

    id: bytes
    offset: int
    time_ns: int


class DedupIds:
    """The ids of one partition. `forgotten` counts those forgotten before their time."""

    def __init__(self, window_s: float, forgotten: Counter[str]) -> None:
        if not 1e-9 <= window_s < 1e9:
            raise InvalidOption(f"dedup_window_s must be over 0 and under 1e9 s, not {window_s!r}")
        self._window_ns = round(window_s * NS_PER_S)
        self._forgotten = forgotten
        self._ids: OrderedDict[bytes, UsedId] = OrderedDict()
        """In the order of their times."""
        self._clock_ns = 0

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[UsedId]:
        return iter(self._ids.values())

    def restore(self, ids: Iterable[UsedId]) -> None:
        """Take over what a snapshot remembered, oldest first."""
        self._ids.update((used.id, used) for used in ids)
        if self._ids:
            self._clock_ns = next(reversed(self._ids.values())).time_ns
            self._forget()

    def seen(self, dedup_id: str | bytes, now_ns: int) -> Original | None:
        """The record that used `dedup_id` within the window before `now_ns`, if any.

        Raises `InvalidOption` for an id that cannot be one.
        """
        used = self._ids.get(as_bytes(dedup_id))
        if used is None or now_ns - used.time_ns >= self._window_ns:
            return None
        return Original(used.offset, used.time_ns)

    def add(self, dedup_id: str | bytes, offset: int, time_ns: int) -> None:
        """The record at `offset` used it; `time_ns` is the time of its batch."""
        key = as_bytes(dedup_id)
        ids = self._ids
        self._clock_ns = now_ns = max(time_ns, self._clock_ns)
        ids[key] = UsedId(key, offset, now_ns)
        ids.move_to_end(key)
        self._forget()

    def _forget(self) -> None:
        """Those that are out of the window, and those that are too many. The last one stays."""
        ids = self._ids
        while self._clock_ns - next(iter(ids.values())).time_ns >= self._window_ns:
            ids.popitem(last=False)
        while len(ids) > limits.DEDUP_IDS_MAX:
            ids.popitem(last=False)
            self._forgotten["dedup id"] += 1


def as_bytes(dedup_id: str | bytes) -> bytes:
    """A dedup id as it is compared and written: of text its UTF-8, so that ``"a"`` is ``b"a"``.

    Raises `InvalidOption` if it is empty, too long or neither.
    """
    try:
        key = dedup_id.encode() if isinstance(dedup_id, str) else dedup_id
    except UnicodeEncodeError:
        raise InvalidOption("dedup_id has lone surrogates, which UTF-8 cannot say") from None
    if not isinstance(key, bytes):
        raise InvalidOption(f"dedup_id must be str or bytes, not {type(key).__name__}")
    if not 1 <= len(key) <= limits.DEDUP_ID_BYTES_MAX:
        raise InvalidOption(
            f"dedup_id must have 1 to {limits.DEDUP_ID_BYTES_MAX:,} bytes, not {len(key):,}"
        )
    return key
