"""How many records a second get onto the disk, if many are appended at once?

Each side as it is fastest; all of a block is on the disk before its time ends. Over ``disk`` the
log is in the process that appends.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench import disk
from bench.case import Case, Selection
from bench.measure import throughput
from bench.rows import Result
from bench.setting import Setting
from bench.teams_log import AppendManyTeam

SIZE = 100
PEERS = ("sqlite", "jetstream")


def run(selection: Selection) -> Iterator[Result]:
    for transport in ("disk", "tcp"):
        if selection.takes(transport, SIZE):
            yield from throughput(
                "append-many",
                Setting(transport=transport, size=SIZE, many=True),
                selection.sides(PEERS),
                selection.scale,
                AppendManyTeam,
                unit="rec/s",
                note=disk.note(),
            )


CASES = (Case("append-many", "durable appends in batches, as fast as each side does them", run),)
