"""The cases, one file for each question."""

from __future__ import annotations

from bench.case import Case
from bench.cases import queue, service, topic

CASES: dict[str, Case] = {
    case.name: case for module in (topic, queue, service) for case in module.CASES
}
