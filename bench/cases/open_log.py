"""How long does a host take to open a large log, and how much memory has it while it serves it?

The host was ended properly before. The time is from its start until somebody who waited for it has
the first record; the memory is the most that it had until a part of the log had been read. The log
may still be in the memory of the kernel, as it is after an upgrade or a crash of the program.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench import disk
from bench.case import Case, Selection
from bench.measure import Field, rates
from bench.rows import Result
from bench.setting import Setting
from bench.teams_log import OpenTeam

SIZE = 1000
PEERS = ("jetstream",)
ROUNDS_MAX = 3
SERVED_MAX = 200_000
"""Records that are read."""


def run(selection: Selection) -> Iterator[Result]:
    if not selection.takes("tcp", SIZE):
        return
    scale = selection.scale
    records, rounds = scale.log_bytes // SIZE, min(scale.fresh, ROUNDS_MAX)
    served = min(records, SERVED_MAX)
    setting = Setting(transport="tcp", size=SIZE, records=records)
    note = f"{scale.log_bytes / 1e9:g} GB, {disk.note()}"
    field = Field("open", setting, selection.sides(PEERS), note)
    with field.opened(OpenTeam) as teams:
        found = field.rounds(teams, rounds, lambda _, team: team.reopened(served))
    lost = {side: team.lost for side, team in teams.items()}
    times = {side: [took for took, _ in blocks] for side, blocks in found.items()}
    sizes = {side: [size for _, size in blocks] for side, blocks in found.items()}
    rates(field, times, "s", lost)
    rates(field, sizes, "MB", lost, suffix="-rss")
    yield from field.results


CASES = (Case("open", "start of a log's host to the first record, and its memory", run),)
