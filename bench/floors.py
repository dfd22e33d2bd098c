"""The budgets of the design, and whether a run kept them.

The numbers are the design's own ("Budgets"), and are never loosened. What is compared with others
holds over every transport that is measured; the absolute ones are for a quiet machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from bench.rows import Result, Row

BUDGET = "budget"
"""The peer of a row that stands beside an absolute bound."""


@dataclass(frozen=True)
class Bound:
    """One line of the table."""

    what: str
    case: str
    size: int
    peer: str
    kind: Literal["rate", "time", "absolute", "least"]
    """``rate``: ours is at least so many times theirs. ``time``: at most. ``absolute``: ours is at
    most so much, whatever theirs. ``least``: at least."""
    floor: float | None
    goal: float | None
    transports: tuple[str, ...] = ("ipc", "tcp")

    def value(self, row: Row) -> float:
        if self.kind in ("absolute", "least"):
            return row.ours
        return row.ratio if self.kind == "rate" else 1 / row.ratio

    def held(self, value: float, bound: float) -> bool:
        return value >= bound if self.kind in ("rate", "least") else value <= bound

    def text(self, bound: float | None) -> str:
        if bound is None:
            return "-"
        return f"{'≥' if self.kind in ('rate', 'least') else '≤'} {bound:g}"


IPC = ("ipc",)
TCP = ("tcp",)
DISK = ("disk",)
BOUNDS = (
    Bound("topic 100 B, a call each", "topic", 100, "raw", "rate", 2.0, 3.0),
    Bound("the same, against zenoh", "topic", 100, "zenoh", "rate", None, 5.0),
    Bound("topic 16 B, a call each", "topic", 16, "raw", "rate", 1.4, 2.5),
    Bound("topic 100 B, many in a call", "topic-many", 100, "raw", "rate", 4.5, 6.0),
    Bound("queue 100 B, prefetch=1024", "queue", 100, "raw", "rate", 0.8, 2.0),
    Bound("service 16 B, p50", "service-p50", 16, "raw", "time", 1.4, 1.2),
    Bound("service 16 B, p99", "service-p99", 16, "raw", "time", 1.5, None),
    Bound("service in asyncio, p50", "service-asyncio-p50", 16, "raw", "time", 1.0, 0.7),
    Bound("topic 1 MiB", "topic", 1 << 20, "raw", "rate", 0.9, 1.0, IPC),
    Bound("append, embedded, p50", "append-p50", 100, "fdatasync", "time", 1.6, 1.3, DISK),
    Bound("append, by a sidecar, p50", "append-p50", 100, "fdatasync", "time", 2.5, 1.8, IPC),
    Bound("appends of many", "append-many", 100, "jetstream", "rate", 10.0, 20.0, TCP),
    Bound("consume, an ack for each", "consume", 100, "jetstream", "rate", 3.0, 5.0, TCP),
    Bound("replay in process, records/s", "replay", 100, "sqlite", "least", 1e6, None, DISK),
    Bound("2 GB: start to a record, s", "open", 1000, "jetstream", "absolute", 0.5, None, TCP),
    Bound("2 GB: memory of its host, MB", "open-rss", 1000, "jetstream", "absolute", 80, None, TCP),
    Bound("exec to first message, s", "join-local", 0, BUDGET, "absolute", 0.2, None, IPC),
    Bound("the same by mDNS, s", "join-mdns", 0, BUDGET, "absolute", 0.5, None, IPC),
    Bound("death noticed, s", "death", 0, BUDGET, "absolute", 0.2, None, IPC),
    Bound("idle RSS, MB", "idle-rss", 0, BUDGET, "absolute", 40.0, None, IPC),
    Bound("idle CPU, % of a core", "idle-cpu", 0, BUDGET, "absolute", 0.3, None, IPC),
    Bound("import mesh, s", "import", 0, BUDGET, "absolute", 0.1, None, IPC),
)
CASES = (
    "topic",
    "topic-many",
    "queue",
    "service",
    "service-asyncio",
    "append",
    "append-many",
    "consume",
    "replay",
    "open",
    "start",
    "death",
    "idle",
)
"""Those that are needed for all of them."""


@dataclass(frozen=True)
class Verdict:
    """What became of a bound over one transport."""

    bound: Bound
    transport: str
    row: Row | None
    """None: it was not measured."""

    @property
    def missed(self) -> bool:
        """Whether the floor was missed. Losses are no way to hold it."""
        if self.row is None or self.bound.floor is None:
            return False
        return bool(self.row.lost) or not self.bound.held(
            self.bound.value(self.row), self.bound.floor
        )

    @property
    def word(self) -> str:
        if self.row is None:
            return "not measured"
        if self.bound.floor is None:
            reached = self.bound.goal is not None and self._reached
            return "goal reached" if reached else "goal not reached"
        if self.missed:
            return "MISSED"
        return "held, goal reached" if self._reached else "held"

    @property
    def _reached(self) -> bool:
        assert self.row is not None
        goal = self.bound.goal
        return goal is not None and self.bound.held(self.bound.value(self.row), goal)


def judge(results: Iterable[Result]) -> list[Verdict]:
    """A verdict for each bound and transport."""
    rows = {(r.case, r.transport, r.size, r.peer): r for r in results if isinstance(r, Row)}
    return [
        Verdict(bound, transport, rows.get((bound.case, transport, bound.size, bound.peer)))
        for bound in BOUNDS
        for transport in bound.transports
    ]


def measured(verdicts: Iterable[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.row is not None]


def unmet(verdicts: Iterable[Verdict], *, all_of_them: bool) -> bool:
    """Whether any floor was missed or, if `all_of_them` were to be measured, was not."""
    return any(
        verdict.missed or (all_of_them and verdict.row is None and verdict.bound.floor is not None)
        for verdict in verdicts
    )


def sizes() -> set[int]:
    """Those that have bounds; 0 is for what has no size."""
    return {bound.size for bound in BOUNDS}


def budget_of(case: str) -> float:
    """The absolute bound of a case."""
    (floor,) = (bound.floor for bound in BOUNDS if bound.case == case and bound.kind == "absolute")
    assert floor is not None
    return floor


def lines(verdicts: Iterable[Verdict]) -> Iterator[str]:
    """The table, for people."""
    yield f"{'budget':30} {'over':4} {'measured':>9} {'floor':>7} {'goal':>7}"
    for verdict in verdicts:
        bound, row = verdict.bound, verdict.row
        measured = "-" if row is None else f"{bound.value(row):.3g}"
        yield (
            f"{bound.what:30} {verdict.transport:4} {measured:>9} {bound.text(bound.floor):>7} "
            f"{bound.text(bound.goal):>7}  {verdict.word}"
        )
