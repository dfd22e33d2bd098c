"""What a case is, and how much of it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.rows import Result


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is run."""

    rounds: int
    """Blocks of each side, in turn."""
    block_s: float
    """About how long a block of a throughput takes; 0: `block_count` messages, uncalibrated."""
    block_count: int = 0
    calls: int
    """Round trips of each side in all, in blocks of `BLOCK_CALLS`."""
    fresh: int
    """Fresh processes for a figure of starting."""
    receivers: int
    """Of a fan-out."""
    topics: int
    idle_s: float
    trickle: int
    """Messages of one block of a trickle."""
    records: int
    """Of a log that is replayed."""
    log_bytes: int
    """Of a log that is opened, payloads only."""
    sizes_max: int | None = None
    """Measure only so many of a case's sizes. None: all."""


FULL = Scale(
    rounds=9,
    block_s=0.3,
    calls=10_000,
    fresh=7,
    receivers=8,
    topics=10_000,
    idle_s=10,
    trickle=50,
    records=1_000_000,
    log_bytes=2 * 10**9,
)
QUICK = Scale(
    rounds=3,
    block_s=0.08,
    calls=1000,
    fresh=3,
    receivers=8,
    topics=10_000,
    idle_s=2,
    trickle=25,
    records=100_000,
    log_bytes=10**8,
    sizes_max=2,
)
TINY = Scale(
    rounds=1,
    block_s=0,
    block_count=200,
    calls=50,
    fresh=1,
    receivers=2,
    topics=50,
    idle_s=0.1,
    trickle=5,
    records=200,
    log_bytes=10**5,
    sizes_max=1,
)
"""For the tests: that everything works, no figures."""

BLOCK_CALLS = 50
"""Round trips of one block."""
BLOCK_CALLS_AT_ONCE = 20
"""Of each of several callers."""


@dataclass(frozen=True)
class Selection:
    """What of a case is wanted. None: all."""

    scale: Scale
    transports: frozenset[str] | None = None
    sizes: frozenset[int] | None = None
    peers: frozenset[str] | None = None

    def takes(self, transport: str, size: int) -> bool:
        if self.transports is not None and transport not in self.transports:
            return False
        return self.sizes is None or size in self.sizes

    def some(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Those of a case's sizes that are wanted."""
        if self.sizes is not None:
            return tuple(size for size in sizes if size in self.sizes)
        return sizes[: self.scale.sizes_max]

    def sides(self, peers: tuple[str, ...]) -> tuple[str, ...]:
        """Ours and those of `peers` that are wanted."""
        if self.peers is None:
            return ("ours", *peers)
        return ("ours", *(peer for peer in peers if peer in self.peers))


@dataclass(frozen=True)
class Case:
    """One question."""

    name: str
    question: str
    run: Callable[[Selection], Iterator[Result]]
