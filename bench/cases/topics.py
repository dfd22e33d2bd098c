"""What do many topics cost? One node sends to 10,000 in turn, another subscribes by a pattern."""

from __future__ import annotations

from collections.abc import Iterator

from bench.case import Case, Selection
from bench.measure import throughput
from bench.rows import Result
from bench.setting import Setting

SIZE = 100


def run(selection: Selection) -> Iterator[Result]:
    if selection.takes("ipc", SIZE):
        setting = Setting(size=SIZE, topics=selection.scale.topics)
        sides = selection.sides(("raw", "zenoh"))
        yield from throughput("topics-10000", setting, sides, selection.scale)


CASES = (Case("topics-10000", "10,000 topics, sent to in turn", run),)
