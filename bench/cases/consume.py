"""How many records a second does a group's one member take, with a call to acknowledge each?

They are in the log before the block begins; it ends when the last acknowledgement has left, and
afterwards the log is asked whether it has got them all.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench import disk
from bench.case import Case, Selection
from bench.measure import throughput
from bench.rows import Result
from bench.setting import Setting
from bench.teams_log import ConsumeTeam

SIZE = 100
PEERS = ("jetstream", "jetstream_push")


def run(selection: Selection) -> Iterator[Result]:
    if selection.takes("tcp", SIZE):
        setting, sides = Setting(transport="tcp", size=SIZE), selection.sides(PEERS)
        scale, note = selection.scale, disk.note()
        yield from throughput(
            "consume", setting, sides, scale, ConsumeTeam, unit="rec/s", note=note
        )


CASES = (Case("consume", "a group's records, each acknowledged by a call", run),)
