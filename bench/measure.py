"""Measuring sides against each other: in the same run, in short blocks, one after the other.

Each round gives each side one block; who begins changes from round to round, so that what else the
machine does hits all alike. A ratio is the median over the rounds of each round's own ratio.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from bench.case import BLOCK_CALLS, BLOCK_CALLS_AT_ONCE, Scale
from bench.disk import NoPlace
from bench.processes import Failed
from bench.rows import Alone, Result, Row, Skipped, Unit, better, percentile, quartiles
from bench.setting import Setting
from bench.sides import module_of
from bench.teams import CallTeam, FlowTeam, LatencyTeam, RateTeam, Team, opened
from mesh import Node

T = TypeVar("T")
TeamT = TypeVar("TeamT", bound=Team)

PERCENTILES = (("p50", 50.0, 1), ("p99", 99.0, 100), ("p99.9", 99.9, 1000))
"""Name, percentile, and the fewest values that have one."""
GROUPS = 10
"""Blocks of round trips are too short for a percentile of their own: the spread is that over so
many groups of blocks."""
COUNT_MAX = 2_000_000
_READY = object()


class Field:
    """The sides that are measured at one setting, and what has become of them."""

    def __init__(self, case: str, setting: Setting, sides: tuple[str, ...], note: str = "") -> None:
        self.case = case
        self.setting = setting
        self.sides = sides
        self.note = note
        """What stands beside each of its figures."""
        self.results: list[Result] = []

    def skip(self, side: str, why: str, *, failed: bool = False) -> None:
        self.results.append(
            Skipped(
                case=self.case,
                transport=self.setting.transport,
                size=self.setting.size,
                peer=side,
                skipped=why,
                failed=failed,
            )
        )

    def teams(self, make: type[TeamT], variants: dict[str, dict[str, Any]]) -> dict[str, TeamT]:
        """A team for each side that can be measured; the others are named as skipped."""
        found = {}
        for side in self.sides:
            setting = self.setting
            why = _missing(side, setting) or _lacking(side, make.ROLES)
            if why is None and side in variants:
                setting, why = _variant(setting, variants[side])
            if why is not None:
                self.skip(side, why)
                continue
            try:
                found[side] = make(side, setting)
            except NoPlace as error:
                self.skip(side, str(error))
        return found

    def rounds(
        self, teams: dict[str, TeamT], number: int, block: Callable[[str, TeamT], T]
    ) -> dict[str, list[T]]:
        """What `block` returned for each side and round. A side that fails is left out."""
        found: dict[str, list[T]] = {side: [] for side in teams}
        for turn in range(number):
            sides = list(found)
            start = turn % len(sides) if sides else 0
            order = sides[start:] + sides[:start]
            for side in order if turn % 2 == 0 else reversed(order):
                if (value := self.attempt(side, teams[side], block)) is None:
                    del found[side]
                else:
                    found[side].append(value)
        return found

    def attempt(self, side: str, team: TeamT, do: Callable[[str, TeamT], T]) -> T | None:
        """What `do` returned; None if the side failed, which is noted."""
        try:
            return do(side, team)
        except Failed as error:
            self.skip(side, str(error), failed=True)
            team.close()
            return None

    def left(self, teams: dict[str, TeamT]) -> dict[str, TeamT]:
        """Those that have not failed."""
        failed = {result.peer for result in self.results if isinstance(result, Skipped)}
        return {side: team for side, team in teams.items() if side not in failed}

    @contextmanager
    def opened(
        self, make: type[TeamT], variants: dict[str, dict[str, Any]] | None = None
    ) -> Iterator[dict[str, TeamT]]:
        """The teams that could be opened: all at once, step by step; closed in the end."""
        teams = self.teams(make, variants or {})
        with opened(list(teams.values())):
            opening = {side: team.opening() for side, team in teams.items()}
            while opening:
                for side, steps in list(opening.items()):
                    if self.attempt(side, teams[side], partial(_last_step, steps)) is not False:
                        del opening[side]
            yield self.left(teams)

    def against(self, found: dict[str, T]) -> Iterator[tuple[str, T, T]]:
        """(side, ours, its own) of each other side, where both were found."""
        first, *others = self.sides
        for side in others:
            if first in found and side in found:
                yield side, found[first], found[side]

    def alone(self, found: dict[str, T]) -> Iterator[tuple[str, T]]:
        """(side, its own) of each other side, where ours was not found."""
        first, *others = self.sides
        if first not in found:
            yield from ((side, found[side]) for side in others if side in found)

    def row(
        self,
        peer: str,
        ours: float,
        theirs: float,
        ratios: list[float],
        *,
        unit: Unit,
        rounds: int,
        lost: int,
        suffix: str = "",
        ratio: float | None = None,
        note: str = "",
    ) -> None:
        low, high = quartiles(ratios)
        self.results.append(
            Row(
                case=self.case + suffix,
                transport=self.setting.transport,
                size=self.setting.size,
                peer=peer,
                ours=ours,
                theirs=theirs,
                ratio=statistics.median(ratios) if ratio is None else ratio,
                low=low,
                high=high,
                unit=unit,
                rounds=rounds,
                lost=lost,
                note="; ".join(filter(None, (note, self.note))),
            )
        )

    def figure(
        self, peer: str, value: float, *, unit: Unit, rounds: int, lost: int, suffix: str = ""
    ) -> None:
        self.results.append(
            Alone(
                case=self.case + suffix,
                transport=self.setting.transport,
                size=self.setting.size,
                peer=peer,
                theirs=value,
                unit=unit,
                rounds=rounds,
                lost=lost,
                note=self.note,
            )
        )


def throughput(
    case: str,
    setting: Setting,
    sides: tuple[str, ...],
    scale: Scale,
    make: type[RateTeam] = FlowTeam,
    variants: dict[str, dict[str, Any]] | None = None,
    unit: Unit = "msg/s",
    note: str = "",
) -> Iterator[Result]:
    """Messages per second of each of `sides`, the first of them ours."""
    field = Field(case, setting, sides, note)
    with field.opened(make, variants) as teams:
        counts = {
            side: count
            for side, team in teams.items()
            if (count := field.attempt(side, team, lambda _, team: _calibrated(team, scale)))
        }
        teams = {side: teams[side] for side in counts}
        found = field.rounds(teams, scale.rounds, lambda side, team: team.block(counts[side]))
    rates(field, found, unit, {side: team.lost for side, team in teams.items()})
    yield from field.results


def latency(
    case: str,
    setting: Setting,
    sides: tuple[str, ...],
    scale: Scale,
    make: type[LatencyTeam] = CallTeam,
    at_once: int = 1,
    variants: dict[str, dict[str, Any]] | None = None,
    note: str = "",
) -> Iterator[Result]:
    """Percentiles of the round trip; with several `at_once` also calls per second."""
    field = Field(case, setting, sides, note)
    most = BLOCK_CALLS if at_once == 1 else BLOCK_CALLS_AT_ONCE
    each = max(1, min(most, scale.calls // at_once))
    rounds = max(1, scale.calls // (each * at_once))
    with field.opened(make, variants) as teams:
        field.rounds(teams, 2 if scale.block_s else 1, lambda _, team: team.calls(each, at_once))
        found = field.rounds(field.left(teams), rounds, lambda _, team: team.calls(each, at_once))
    taken = {side: [block["latencies"] for block in blocks] for side, blocks in found.items()}
    percentiles(field, taken, rounds, {side: team.lost for side, team in teams.items()})
    if at_once > 1:
        per_s = {
            side: [block["count"] / block["elapsed"] for block in blocks]
            for side, blocks in found.items()
        }
        rates(field, per_s, "calls/s", suffix="-rate")
    yield from field.results


def trickle(
    case: str,
    setting: Setting,
    sides: tuple[str, ...],
    scale: Scale,
    hz: float,
    variants: dict[str, dict[str, Any]],
) -> Iterator[Result]:
    """Percentiles of the time on the way, of messages that come one at a time."""
    field = Field(case, setting, sides)
    with field.opened(FlowTeam, variants) as teams:
        count = scale.trickle
        found = field.rounds(teams, scale.rounds, lambda _, team: team.trickle(count, hz))
    percentiles(field, found, scale.rounds, {side: team.lost for side, team in teams.items()})
    yield from field.results


def rates(
    field: Field,
    found: dict[str, list[float]],
    unit: Unit,
    lost: Mapping[str, int] | None = None,
    suffix: str = "",
) -> None:
    """Rows for the rates, or whatever else `unit` is of, of the blocks that each side did."""
    for side, mine, other in field.against(found):
        losses = {s: lost[s] for s in (field.sides[0], side)} if lost else {}
        losers = [s for s, number in losses.items() if number]
        field.row(
            side,
            statistics.median(mine),
            statistics.median(other),
            [better(a, b, unit) for a, b in zip(mine, other, strict=True)],
            unit=unit,
            rounds=len(mine),
            lost=sum(losses.values()),
            suffix=suffix,
            note=f"lost by {' and '.join(losers)}" if losers else "",
        )
    for side, other in field.alone(found):
        median, gone = statistics.median(other), (lost or {}).get(side, 0)
        field.figure(side, median, unit=unit, rounds=len(other), lost=gone, suffix=suffix)


def percentiles(
    field: Field,
    taken: dict[str, list[list[float]]],
    rounds: int,
    lost: Mapping[str, int] | None = None,
) -> None:
    """Rows for the percentiles of the blocks of seconds that each side took."""
    for suffix, percent, least in PERCENTILES:
        for side, *both in field.against(taken):
            if _count(both[0]) < least:
                continue
            mine, other = (
                percentile([v for block in blocks for v in block], percent) * 1e6 for blocks in both
            )
            groups = (_grouped(blocks, percent, least) for blocks in both)
            spread = [better(a, b, "us") for a, b in zip(*groups, strict=True)]
            field.row(
                side,
                mine,
                other,
                spread,
                unit="us",
                rounds=rounds,
                lost=sum((lost or {}).get(s, 0) for s in (field.sides[0], side)),
                suffix=f"-{suffix}",
                ratio=better(mine, other, "us"),
            )
        for side, blocks in field.alone(taken):
            if _count(blocks) >= least:
                value = percentile([v for block in blocks for v in block], percent) * 1e6
                gone = (lost or {}).get(side, 0)
                field.figure(side, value, unit="us", rounds=rounds, lost=gone, suffix=f"-{suffix}")


def _count(blocks: list[list[float]]) -> int:
    return sum(map(len, blocks))


def _grouped(blocks: list[list[float]], percent: float, least: int) -> list[float]:
    """The percentile of each group of blocks, none of which has fewer values than it takes."""
    groups = max(1, min(GROUPS, len(blocks), _count(blocks) // least))
    return [
        percentile([value for block in blocks[start::groups] for value in block], percent)
        for start in range(groups)
    ]


def _last_step(steps: Iterator[None], side: str, team: Team) -> bool:
    """Take a step; whether there was none left."""
    return next(steps, _READY) is _READY


def _missing(side: str, setting: Setting) -> str | None:
    """Why a side cannot be measured at a setting; None if it can."""
    module = module_of(side)
    why: str | None = module.missing()
    if why is None and setting.uvloop and importlib.util.find_spec("uvloop") is None:
        return "uvloop is not installed (extra: bench)"
    if why is None and setting.transport not in module.TRANSPORTS:
        return f"has no {setting.transport}"
    return why


def _lacking(side: str, roles: tuple[str, ...]) -> str | None:
    """Which role of these a side has not; None if it has all."""
    lacking = [role for role in roles if role not in module_of(side).ROLES]
    return f"has no {' and no '.join(lacking)}" if lacking else None


def _variant(setting: Setting, options: dict[str, Any]) -> tuple[Setting, str | None]:
    """The setting with these options of our node, and which of them it does not have."""
    known = inspect.signature(Node).parameters
    unknown = [f"{name}=" for name in options if name not in known]
    why = f"Node has no option {', '.join(unknown)}" if unknown else None
    return dataclasses.replace(setting, options=options), why


def _calibrated(team: RateTeam, scale: Scale) -> int:
    """How many messages take about a block's time; measuring it is the warm-up too."""
    if not scale.block_s:
        return scale.block_count
    count = 16
    while True:
        rate = team.block(count)
        if count / rate >= scale.block_s / 3 or count >= COUNT_MAX or team.lost:
            return max(16, min(COUNT_MAX, int(rate * scale.block_s)))
        count = min(COUNT_MAX, max(count * 2, int(rate * scale.block_s / 2)))
