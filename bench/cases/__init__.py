"""The cases, one file for each question."""

from __future__ import annotations

from bench.case import Case
from bench.cases import (
    append,
    append_many,
    consume,
    dicts,
    fanout,
    life,
    lz4,
    open_log,
    queue,
    replay,
    service,
    topic,
    topics,
    trickle,
)

CASES: dict[str, Case] = {
    case.name: case
    for module in (
        *(topic, fanout, topics, dicts, lz4, trickle, queue, service, life),
        *(append, append_many, replay, consume, open_log),
    )
    for case in module.CASES
}
