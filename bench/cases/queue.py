"""How many tasks a second go through a queue, to one worker and to four?"""

from __future__ import annotations

from collections.abc import Iterator

from bench.case import Case, Selection
from bench.measure import throughput
from bench.rows import Result
from bench.setting import Setting
from bench.teams import QueueTeam

SIZE = 100


def _run(name: str, workers: int, selection: Selection) -> Iterator[Result]:
    for transport in ("ipc", "tcp"):
        if selection.takes(transport, SIZE):
            setting = Setting(transport=transport, size=SIZE, receivers=workers)
            sides = selection.sides(("raw", "nng"))
            yield from throughput(name, setting, sides, selection.scale, QueueTeam)


CASES = (
    Case("queue", "one pusher, one worker, prefetch=1024", lambda s: _run("queue", 1, s)),
    Case("queue-4", "one pusher, four workers, prefetch=1024", lambda s: _run("queue-4", 4, s)),
)
