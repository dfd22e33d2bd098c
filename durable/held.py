"""What a consumer has of one partition and has said nothing of, as its sidecar sees it.

It tells who waits for more why none comes, and is careful: what may be with others does not count.
"""

from __future__ import annotations

from collections.abc import Iterable


class Held:
    """See above. To be called under the seat's lock."""

    def __init__(self, records_max: int) -> None:
        self._records_max = records_max
        """What a sidecar lets it have at a time."""
        self._until: dict[int, float] = {}
        """By offset: when its lease is over."""

    def add(self, offsets: range, until: float, now: float) -> None:
        """They were delivered, once more maybe."""
        if len(self._until) > 2 * self._records_max:
            self._forget(now)
        self._until.update(dict.fromkeys(offsets, until))

    def extend(self, offsets: Iterable[int], until: float) -> None:
        self._until.update(dict.fromkeys(self._until.keys() & offsets, until))

    def discard(self, offset: int) -> None:
        """It is settled, handed back, or lost, if it was not before."""
        self._until.pop(offset, None)

    def discard_from(self, offset: int) -> None:
        """It was handed back, and maybe some of those behind it are with it."""
        self._until = {each: until for each, until in self._until.items() if each < offset}

    def clear(self) -> None:
        """A sidecar may know nothing of them: they come again."""
        self._until.clear()

    def count(self, now: float) -> int:
        self._forget(now)
        return len(self._until)

    def _forget(self, now: float) -> None:
        """What was not settled in time goes to others."""
        self._until = {offset: until for offset, until in self._until.items() if until > now}
