"""What a subscriber has missed and may get yet: gaps, what was found of them, what came behind.

Promises, for each sender and topic by itself: what goes in comes out in order, each message at most
once; what is in a gap comes out if it is found, and else as a loss that says which it was, once
nothing was found for a while. Until then what came behind a gap is held here. Both what is held and
what was found out of turn are bounded in bytes, by whoever asks `full` and `crowded` before more.

No I/O, no clock: `now` is handed in. Knows neither sockets nor logs.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Iterator

import msgspec

from mesh.message import Run

FlowKey = tuple[int, str]
"""Whose sequence it is, and of which topic."""


class Want(msgspec.Struct, frozen=True):
    """Messages that are missing."""

    flow: FlowKey
    first: int
    last: int
    since_ns: int
    """The sender's wall clock at the last message before them."""


class Passed(msgspec.Struct, frozen=True):
    """Messages whose turn it is."""

    run: Run
    repaired: bool
    """Whether they were missed."""


class Lost(msgspec.Struct, frozen=True):
    """Messages that were not found."""

    flow: FlowKey
    first: int
    last: int


Outcome = Passed | Lost


class _Held(msgspec.Struct, frozen=True):
    run: Run
    cost: int


class _Gap(msgspec.Struct):
    first: int
    """The next one that is missing: all before it was passed on."""
    last: int
    since_ns: int
    deadline: float
    found: list[tuple[int, int, _Held]] = msgspec.field(default_factory=list)
    """What was found beyond that, in order: first, last."""


class _Waiting(msgspec.Struct):
    """A flow with a gap: gaps, and what came behind them, in order."""

    parts: deque[_Gap | _Held]
    end: int
    """The sequence behind all of it."""
    deadline: float = -math.inf
    """Until then none of its gaps is given up, since something was found."""


class Repairs:
    """See above."""

    def __init__(self, timeout_s: float, *, bytes_max: int, flows_max: int) -> None:
        """A gap of which nothing was found for `timeout_s` is given up."""
        self.flows: dict[FlowKey, _Waiting] = {}
        """Those with a gap: what comes of them has to be held."""
        self._timeout_s = timeout_s
        self._bytes_max = bytes_max
        self._flows_max = flows_max
        self._held = 0
        self._found = 0

    @property
    def full(self) -> bool:
        """Whether nothing more should come."""
        return self._held >= self._bytes_max

    @property
    def crowded(self) -> bool:
        """Whether nothing more should be looked for, until something was given up."""
        return self._found >= self._bytes_max

    def missed(self, flow: FlowKey, first: int, last: int, since_ns: int, now: float) -> bool:
        """Those are missing; False if no more can be looked for."""
        waiting = self.flows.get(flow)
        if waiting is None:
            if len(self.flows) >= self._flows_max:
                return False
            waiting = self.flows[flow] = _Waiting(deque(), first)
        first = max(first, waiting.end)  # a Ctrl-C may have it said twice
        if first > last:
            return True
        waiting.end = last + 1
        behind = waiting.parts[-1] if waiting.parts else None
        if isinstance(behind, _Gap):
            behind.last, behind.deadline = last, now + self._timeout_s
        else:
            waiting.parts.append(_Gap(first, last, since_ns, now + self._timeout_s))
        return True

    def hold(self, flow: FlowKey, run: Run, cost: int) -> None:
        """Those came, of a flow that has a gap. `cost`: their bytes, about."""
        waiting = self.flows[flow]
        first = max(_first(run), waiting.end)
        rest = _part(run, first, _last(run))
        if rest is not None:
            waiting.end = _last(rest) + 1
            waiting.parts.append(_Held(rest, cost))
            self._held += cost

    def found(self, flow: FlowKey, run: Run, cost: int, now: float) -> list[Outcome]:
        """Those were found, which are missing or not; what comes out of it."""
        waiting = self.flows.get(flow)
        if waiting is None:
            return []
        for part in waiting.parts:
            if not isinstance(part, _Gap):
                continue
            if part.first > _last(run):
                break
            if part.last >= _first(run) and self._put(part, run, cost):
                waiting.deadline = now + self._timeout_s
        return self._release(flow, waiting)

    def expire(self, now: float) -> list[Outcome]:
        """Give up what was not found in time."""
        outcomes: list[Outcome] = []
        for flow, waiting in list(self.flows.items()):
            while waiting.parts:
                gap = waiting.parts[0]
                assert isinstance(gap, _Gap), "or it was not released"
                if max(gap.deadline, waiting.deadline) > now:
                    break
                if self._give_up(flow, gap, outcomes):
                    gap.deadline = now + self._timeout_s
                outcomes += self._release(flow, waiting)
        return outcomes

    def extend(self, now: float) -> None:
        """Nothing was looked for until now, since nobody took what was found."""
        for waiting in self.flows.values():
            waiting.deadline = now + self._timeout_s

    def wants(self) -> list[Want]:
        """What is missing."""
        return [
            Want(flow, first, last, gap.since_ns)
            for flow, waiting in self.flows.items()
            for gap in waiting.parts
            if isinstance(gap, _Gap)
            for first, last in _holes(gap)
        ]

    def clear(self) -> None:
        self.flows.clear()
        self._held = self._found = 0

    def _put(self, gap: _Gap, run: Run, cost: int) -> bool:
        """Keep what of `run` is missing in `gap`; whether that was anything."""
        pieces = [
            _Held(part, cost)
            for first, last in list(_holes(gap))
            if (part := _part(run, first, last)) is not None
        ]
        for piece in pieces:
            insort(gap.found, (_first(piece.run), _last(piece.run), piece), key=_at)
            self._found += piece.cost
        return bool(pieces)

    def _release(self, flow: FlowKey, waiting: _Waiting) -> list[Outcome]:
        """What stands before the first gap of that flow, or before what is missing in it."""
        outcomes: list[Outcome] = []
        parts = waiting.parts
        while parts:
            part = parts[0]
            if isinstance(part, _Held):
                outcomes.append(Passed(part.run, repaired=False))
                self._held -= part.cost
            else:
                self._pass_found(part, outcomes)
                if part.first <= part.last:
                    return outcomes
            parts.popleft()
        del self.flows[flow]
        return outcomes

    def _pass_found(self, gap: _Gap, outcomes: list[Outcome]) -> None:
        passed = 0
        for first, last, piece in gap.found:
            if first != gap.first:
                break
            outcomes.append(Passed(piece.run, repaired=True))
            self._found -= piece.cost
            gap.first, gap.since_ns = last + 1, piece.run.origin.time_ns
            passed += 1
        if passed:
            gap.found = gap.found[passed:]

    def _give_up(self, flow: FlowKey, gap: _Gap, outcomes: list[Outcome]) -> bool:
        """What is missing before something that was found, if anything was, so that there may be
        more behind that; else all that is missing. Whether it was the former."""
        if not gap.found:
            outcomes.append(Lost(flow, gap.first, gap.last))
            gap.first = gap.last + 1
            return False
        while gap.found:
            if gap.found[0][0] > gap.first:
                outcomes.append(Lost(flow, gap.first, gap.found[0][0] - 1))
                gap.first = gap.found[0][0]
            self._pass_found(gap, outcomes)
        return True


def _at(found: tuple[int, int, _Held]) -> int:
    return found[0]


def _holes(gap: _Gap) -> Iterator[tuple[int, int]]:
    """What is missing in it."""
    first = gap.first
    for begin, end, _ in gap.found:
        if begin > first:
            yield first, begin - 1
        first = end + 1
    if first <= gap.last:
        yield first, gap.last


def _first(run: Run) -> int:
    return run.origin.seq + run.first


def _last(run: Run) -> int:
    return _first(run) + len(run) - 1


def _part(run: Run, first: int, last: int) -> Run | None:
    """Those of its messages from `first` to `last`; None if there are none."""
    low, high = max(0, first - _first(run)), min(len(run), last + 1 - _first(run))
    if low >= high:
        return None
    if high - low == len(run):
        return run
    return Run(run.payloads[low:high], run.first + low, run.origin)
