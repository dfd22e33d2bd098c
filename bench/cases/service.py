"""How long does a call of a service take, and how many go at once?"""

from __future__ import annotations

from collections.abc import Iterator

from bench.case import Case, Selection
from bench.measure import latency
from bench.rows import Result
from bench.setting import Setting
from bench.teams import AsyncCallTeam, CallTeam

SIZES = (16, 1000)
AT_ONCE = 64
THREADS = 8


def _run(
    name: str,
    selection: Selection,
    *,
    peers: tuple[str, ...],
    sizes: tuple[int, ...] = SIZES,
    team: type[CallTeam] = CallTeam,
    at_once: int = 1,
    uvloop: bool = False,
) -> Iterator[Result]:
    for transport in ("ipc", "tcp"):
        for size in selection.some(sizes):
            if selection.takes(transport, size):
                setting = Setting(transport=transport, size=size, uvloop=uvloop)
                sides = selection.sides(peers)
                yield from latency(name, setting, sides, selection.scale, team, at_once)


def blocking(selection: Selection) -> Iterator[Result]:
    return _run("service", selection, peers=("raw", "zenoh", "nng"))


def threads(selection: Selection) -> Iterator[Result]:
    return _run("service-threads", selection, peers=("raw",), sizes=(16,), at_once=THREADS)


def in_asyncio(selection: Selection) -> Iterator[Result]:
    return _run("service-asyncio", selection, peers=("raw", "nats"), team=AsyncCallTeam)


def many_in_asyncio(selection: Selection) -> Iterator[Result]:
    return _run(
        "service-asyncio-64",
        selection,
        peers=("raw", "nats"),
        sizes=(16,),
        team=AsyncCallTeam,
        at_once=AT_ONCE,
    )


def in_uvloop(selection: Selection) -> Iterator[Result]:
    return _run(
        "service-uvloop",
        selection,
        peers=("raw",),
        sizes=(16,),
        team=AsyncCallTeam,
        uvloop=True,
    )


CASES = (
    Case("service", "round trip of a blocking call, one at a time", blocking),
    Case("service-threads", f"{THREADS} threads call at once", threads),
    Case("service-asyncio", "round trip in asyncio, one at a time", in_asyncio),
    Case("service-asyncio-64", f"{AT_ONCE} calls in flight in asyncio", many_in_asyncio),
    Case("service-uvloop", "round trip in asyncio with uvloop on both ends", in_uvloop),
)
