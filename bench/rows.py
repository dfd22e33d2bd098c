"""Results: one row for each case, setting and side compared with; as JSON and as a table.

A ratio above 1 always means that ours is better: ours over theirs of a rate, theirs over ours of a
time or a size.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Unit = Literal["msg/s", "calls/s", "rec/s", "us", "s", "MB", "%"]
RATES = ("msg/s", "calls/s", "rec/s")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result."""

    case: str
    transport: str
    size: int
    peer: str
    """The side ours is compared with; ``budget`` for an absolute bound."""
    ours: float
    theirs: float
    ratio: float
    low: float
    """Of the ratio over the rounds: the first quartile."""
    high: float
    """The third."""
    unit: Unit
    rounds: int
    lost: int
    """Messages lost by either side. A ratio beside losses says nothing."""
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A side that was not measured, or did not get to its end, and why."""

    case: str
    transport: str
    size: int
    peer: str
    skipped: str
    failed: bool = False
    """Whether it should have worked."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Alone:
    """What a side did where ours was not measured: a figure, and nothing to compare it with."""

    case: str
    transport: str
    size: int
    peer: str
    theirs: float
    unit: Unit
    rounds: int
    lost: int
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


Result = Row | Alone | Skipped


def better(ours: float, theirs: float, unit: Unit) -> float:
    """The ratio that is above 1 where ours is better."""
    top, bottom = (ours, theirs) if unit in RATES else (theirs, ours)
    return top / bottom if bottom > 0 else float("inf")


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def percentile(values: Sequence[float], percent: float) -> float:
    """Of `values`, by the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def figure(value: float, unit: Unit) -> str:
    """With three digits, and a letter for thousands and millions."""
    if unit in RATES:
        for bound, letter in ((1e6, "M"), (1e3, "k")):
            if value >= bound:
                return f"{value / bound:.3g} {letter}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def size_text(size: int) -> str:
    if not size:
        return ""
    for bound, unit in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= bound and size % bound == 0:
            return f"{size // bound} {unit}"
    return f"{size} B"


HEADER = ("case", "over", "size", "against", "ours", "theirs", "unit", "ratio", "quartiles", "lost")
WIDTHS = (26, 4, 7, 16, 9, 9, 7, 6, 12, 6)


def line(cells: Iterable[str]) -> str:
    shown = []
    for number, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True)):
        shown.append(f"{cell:<{width}}" if number < 4 else f"{cell:>{width}}")
    return " ".join(shown).rstrip()


def text(result: Result) -> str:
    """A line of the table."""
    where = (result.case, result.transport, size_text(result.size), result.peer)
    if isinstance(result, Skipped):
        what = "FAILED" if result.failed else "skipped"
        head = line((*where, *[""] * 6)).ljust(sum(WIDTHS[:4]) + 4)
        return f"{head} {what}: {result.skipped}"
    ours, ratio, spread = "-", "-", "-"
    if isinstance(result, Row):
        ours, ratio = figure(result.ours, result.unit), f"{result.ratio:.2f}"
        spread = f"{result.low:.2f}..{result.high:.2f}"
    theirs, lost = figure(result.theirs, result.unit), f"LOST {result.lost}" if result.lost else ""
    shown = line((*where, ours, theirs, result.unit, ratio, spread, lost))
    return f"{shown}  {result.note}".rstrip()
