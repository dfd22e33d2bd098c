"""How many messages a second go from one publisher to one subscriber?

Ours waits for room (``when_full="wait"``), as the others do: nobody may lose any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench.case import Case, Selection
from bench.measure import throughput
from bench.rows import Result
from bench.setting import Setting

SIZES = (100, 16, 1000, 64 * 1024, 1 << 20)


def _run(
    name: str,
    base: Setting,
    peers: tuple[str, ...],
    selection: Selection,
    sizes: tuple[int, ...] = SIZES,
) -> Iterator[Result]:
    for transport in ("ipc", "tcp"):
        for size in selection.some(sizes):
            if selection.takes(transport, size):
                setting = replace(base, transport=transport, size=size)
                yield from throughput(name, setting, selection.sides(peers), selection.scale)


def per_call(selection: Selection) -> Iterator[Result]:
    return _run("topic", Setting(), ("raw", "zenoh", "nng", "nats"), selection)


def copied(selection: Selection) -> Iterator[Result]:
    return _run("topic-bytes", Setting(views=False), ("raw",), selection, (1 << 20,))


def many(selection: Selection) -> Iterator[Result]:
    return _run("topic-many", Setting(many=True), ("raw",), selection)


def messages(selection: Selection) -> Iterator[Result]:
    setting = Setting(many=True, messages=True)
    return _run("topic-messages", setting, ("raw",), selection, (100,))


CASES = (
    Case("topic", "one publisher, one subscriber, a call for each message", per_call),
    Case("topic-bytes", "large payloads as bytes of one's own; the raw side copies none", copied),
    Case("topic-many", "by send_many and recv_many(…).payloads; others have no such call", many),
    Case("topic-messages", "the same, looking at each message that recv_many returns", messages),
)
