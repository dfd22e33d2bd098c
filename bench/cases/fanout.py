"""How many messages a second go from one publisher to eight subscribers, each of which gets all?"""

from __future__ import annotations

from collections.abc import Iterator

from bench.case import Case, Selection
from bench.measure import throughput
from bench.rows import Result
from bench.setting import Setting

SIZE = 100


def run(selection: Selection) -> Iterator[Result]:
    for transport in ("ipc", "tcp"):
        if selection.takes(transport, SIZE):
            setting = Setting(transport=transport, size=SIZE, receivers=selection.scale.receivers)
            sides = selection.sides(("raw", "zenoh", "nng", "nats"))
            yield from throughput("fanout", setting, sides, selection.scale)


CASES = (Case("fanout", "one publisher, eight subscribers", run),)
