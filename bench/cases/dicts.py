"""How many messages a second, if the payload is a dict? The others pack it by MessagePack too."""

from __future__ import annotations

from collections.abc import Iterator

from bench.case import Case, Selection
from bench.measure import throughput
from bench.rows import Result
from bench.setting import Setting

SIZE = 100
"""About what the dict has when packed."""


def run(selection: Selection) -> Iterator[Result]:
    if selection.takes("ipc", SIZE):
        sides = selection.sides(("raw", "zenoh"))
        setting = Setting(size=SIZE, shape="dict")
        yield from throughput("dict", setting, sides, selection.scale)


CASES = (Case("dict", "a dict of seven fields as the payload", run),)
