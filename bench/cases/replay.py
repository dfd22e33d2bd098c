"""How many records a second are read from a log, from its start to its end?

A block is the whole log, which was written just before: the disk itself is not read. Over ``disk``
the log is in the process that reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench import disk
from bench.case import Case, Selection
from bench.measure import throughput
from bench.rows import Result
from bench.setting import Setting
from bench.teams_log import ReplayTeam

SIZE = 100
PEERS = ("sqlite", "jetstream")
ROUNDS_MAX = 3
"""Whole logs are long blocks."""


def run(selection: Selection) -> Iterator[Result]:
    scale = selection.scale
    records, rounds = scale.records, min(scale.rounds, ROUNDS_MAX)
    for transport in ("disk", "tcp"):
        if selection.takes(transport, SIZE):
            yield from throughput(
                "replay",
                Setting(transport=transport, size=SIZE, records=records),
                selection.sides(PEERS),
                replace(scale, block_s=0, block_count=records, rounds=rounds),
                ReplayTeam,
                unit="rec/s",
                note=f"{records:,} records, {disk.note()}",
            )


CASES = (Case("replay", "a log from its start, every payload looked into", run),)
