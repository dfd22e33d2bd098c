"""The cases, one file for each question."""

from __future__ import annotations

from bench.case import Case
from bench.cases import dicts, fanout, life, lz4, queue, service, topic, topics, trickle

CASES: dict[str, Case] = {
    case.name: case
    for module in (topic, fanout, topics, dicts, lz4, trickle, queue, service, life)
    for case in module.CASES
}
