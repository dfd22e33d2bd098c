"""Does batching delay messages that come one at a time? 100 a second, timed one way."""

from __future__ import annotations

from collections.abc import Iterator

from bench.case import Case, Selection
from bench.measure import trickle
from bench.rows import Result
from bench.setting import Setting

SIZE = 100
HZ = 100.0
VARIANTS = {"ours-unbatched": {"batch_window_ms": 0}}


def run(selection: Selection) -> Iterator[Result]:
    if selection.takes("ipc", SIZE):
        sides = selection.sides(("ours-unbatched", "raw", "zenoh"))
        yield from trickle("trickle", Setting(size=SIZE), sides, selection.scale, HZ, VARIANTS)


CASES = (Case("trickle", "one-way latency at 100 messages a second", run),)
