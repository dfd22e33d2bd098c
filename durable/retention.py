"""What a log may give up: whole segments, from the front. Decides only; no I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Keep(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a log is keep. What several of these allow to go, goes."""

    bytes_max: int | None = None
    """Bytes of all segments. None: as many as come."""
    age_s_max: float | None = None
    """Seconds since a record was appended. None: for ever."""
    count_max: int | None = None
    """Records. None: as many as come."""


class Sealed(msgspec.Struct, frozen=True):
    """A segment that is not appended to any more."""

    size: int
    end: int
    """The offset behind its last record."""
    time_ns: int
    """Of its last batch."""


def trim_to(
    sealed: Sequence[Sealed], last_bytes: int, end: int, keep: Keep, now_ns: int, acked: int | None
) -> int | None:
    """The offset below which records may go now; None if all have to stay.

    `sealed`: the segments from the first on, but for the last, which has `last_bytes` and never
    goes; `end`: of the log. `acked`: below that every group has acknowledged all, where that is
    reason enough for them to go; None where it is not.
    """
    size = last_bytes + sum(segment.size for segment in sealed)
    offset = None
    for segment in sealed:
        if not (
            (keep.bytes_max is not None and size > keep.bytes_max)
            or (keep.count_max is not None and end - segment.end >= keep.count_max)
            or (keep.age_s_max is not None and now_ns - segment.time_ns > keep.age_s_max * 1e9)
            or (acked is not None and segment.end <= acked)
        ):
            break
        offset = segment.end
        size -= segment.size
    return offset
