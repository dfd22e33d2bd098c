"""Where to read a partition for messages that a subscriber missed: from when on, and when again.

A recording appends a topic's messages in their order (`mesh.durable.recording`), so whoever reads
on from before the first that is missing comes by all of them, or they are not there. Where that is
only the clocks tell: a log has a message a little after its publisher says that it left, if both
clocks agree. So reading begins a little before that time, and if it turns out to have begun too
late, or nothing comes, further back: clocks may differ by anything. No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mesh import limits
from mesh.sockets.repairs import FlowKey, Want

_NS: Final = 1_000_000_000
SLACKS_NS: Final = (_NS // 4, 30 * _NS, None)
"""How much earlier to begin, each time: for one clock, or two that NTP keeps, a quarter of a second
is ample; half a minute for clocks that nobody keeps; then the whole log."""
PATIENCE_S: Final = 1.0
"""At its end, for the first of what is missing to come: a recording lags by what a sync takes."""


class Search:
    """For one subscriber and one partition."""

    def __init__(self) -> None:
        self._level = 0
        self._begun_ns: int | None = None
        """The time that reading began with. None: it did not, or has to begin again."""
        self._from_start = False
        self._done: dict[FlowKey, int] = {}
        """The last sequence of each topic that reading has come past."""
        self._known: dict[FlowKey, int] = {}
        """The last sequence of each topic that was wanted before reading could come past it."""
        self._at_end_since: float | None = None

    def begin(self, wants: Sequence[Want]) -> int | None:
        """The time to begin reading with, if that is to be done now. None: read on."""
        if self._begun_ns is not None and not any([self._is_behind(want) for want in wants]):
            return None
        slack = SLACKS_NS[self._level]
        since = min(want.since_ns for want in wants)
        self._begun_ns = 0 if slack is None else max(0, since - slack)
        self._done.clear()
        self._known = {}
        for want in wants:
            self._known[want.flow] = max(want.last, self._known.get(want.flow, 0))
        self._at_end_since = None
        return self._begun_ns

    def begun(self, *, from_start: bool) -> None:
        """Whether that is where the log begins."""
        self._from_start = from_start

    def _is_behind(self, want: Want) -> bool:
        """Whether reading may have come past what is wanted before it was wanted."""
        known = self._known.get(want.flow, 0)
        if want.last <= known:
            return False
        self._known[want.flow] = want.last
        done = self._done.get(want.flow)
        if done is not None:
            return done >= max(want.first, known + 1)
        assert self._begun_ns is not None
        slack = SLACKS_NS[self._level]
        return slack is not None and want.since_ns - slack < self._begun_ns

    def read(self, flow: FlowKey, first: int, last: int, wants: Sequence[Want]) -> bool:
        """Messages `first` to `last` of that topic stand next in the log; `wants` is what of the
        topic is missing, in order. False if reading began too late, and has to `begin` again."""
        self._at_end_since = None
        if flow not in self._done:
            if wants and first > wants[0].first and self._further_back():
                return False
            if len(self._done) >= limits.TRACKED_CHANNELS_MAX:
                self._done.clear()  # at worst some is read twice
        self._done[flow] = max(last, self._done.get(flow, 0))
        return True

    def at_end(self, wants: Sequence[Want], now: float) -> None:
        """There is nothing more, so far."""
        if self._at_end_since is None:
            self._at_end_since = now
        elif now - self._at_end_since >= PATIENCE_S:
            self._at_end_since = now
            if any(want.flow not in self._done for want in wants):
                self._further_back()

    def _further_back(self) -> bool:
        """Begin again from earlier on, if that is possible."""
        if self._from_start or self._level + 1 == len(SLACKS_NS):
            return False
        self._level += 1
        self._begun_ns = None
        return True
