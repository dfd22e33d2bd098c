"""How long does a durable append take, from the call until the record is on the disk?

Over ``disk`` the log is in the process that appends, over ipc and tcp in another. A bare `write`
and `fdatasync` of as many bytes stands beside all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench import disk
from bench.case import Case, Selection
from bench.measure import latency
from bench.rows import Result
from bench.setting import TRANSPORTS, Setting
from bench.teams_log import AppendTeam

SIZE = 100
PEERS = ("fdatasync", "sqlite", "jetstream")


def run(selection: Selection) -> Iterator[Result]:
    for transport in TRANSPORTS:
        if selection.takes(transport, SIZE):
            setting = Setting(transport=transport, size=SIZE)
            sides = selection.sides(PEERS)
            scale, note = selection.scale, disk.note()
            yield from latency("append", setting, sides, scale, AppendTeam, note=note)


CASES = (Case("append", "one durable append at a time, waiting for each", run),)
