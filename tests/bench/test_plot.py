"""The plots show what was measured, and losses as nobody's speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.plot import draw, latencies, rates, records, waits


def a_row(case: str, size: int, peer: str, ours: float, theirs: float, **more: Any) -> Any:
    return {"case": case, "transport": "ipc", "size": size, "peer": peer, "lost": 0} | {
        "ours": ours,
        "theirs": theirs,
        **more,
    }


ROWS = [
    a_row("topic", 16, "raw", 3.0, 1.0),
    a_row("topic", 100, "raw", 2.0, 1.5),
    a_row("topic", 16, "zenoh", 3.0, 0.5),
    a_row("topic", 16, "nng", 3.0, 9.0, lost=4),
    a_row("topic-many", 16, "raw", 8.0, 1.0),
    a_row("topic", 16, "raw", 1.0, 1.0, transport="tcp"),
    a_row("service-p50", 16, "raw", 80.0, 66.0),
    a_row("service-p99", 16, "raw", 150.0, 120.0),
    a_row("service-asyncio-p50", 16, "raw", 1.0, 1.0),
    {"case": "topic", "transport": "ipc", "size": 16, "peer": "nats", "skipped": "has no ipc"},
    a_row("append-p50", 100, "fdatasync", 180.0, 120.0, transport="disk"),
    a_row("append-p50", 100, "sqlite", 180.0, 130.0, transport="disk"),
    a_row("append-p50", 100, "fdatasync", 240.0, 121.0),
    a_row("append-p99", 100, "fdatasync", 900.0, 800.0),
    a_row("append-many", 100, "sqlite", 9e5, 1e5, transport="disk"),
    a_row("append-many", 100, "jetstream", 5e5, 2e4, transport="tcp"),
    a_row("consume", 100, "jetstream", 2e5, 1e4, transport="tcp"),
]


def test_rates_are_by_side_and_size_and_lost_ones_are_left_out() -> None:
    assert rates(ROWS, "ipc") == {
        "ours": {16: 3.0, 100: 2.0},
        "raw": {16: 1.0, 100: 1.5},
        "zenoh": {16: 0.5},
        "many": {16: 8.0},
    }


def test_latencies_are_by_side_and_percentile() -> None:
    assert latencies(ROWS, "ipc", 16) == {
        "ours": {"p50": 80.0, "p99": 150.0},
        "raw": {"p50": 66.0, "p99": 120.0},
    }


def test_waits_are_by_side_and_place_and_a_bare_sync_is_where_it_is_made() -> None:
    assert waits(ROWS) == {
        "ours": {"in process": 180.0, "over ipc": 240.0},
        "fdatasync": {"in process": 120.0},
        "sqlite": {"in process": 130.0},
    }


def test_records_are_by_side_and_what_is_done_with_them() -> None:
    assert records(ROWS) == {
        "ours": {"append": 5e5, "consume,\nacknowledge each": 2e5},
        "jetstream": {"append": 2e4, "consume,\nacknowledge each": 1e4},
    }


@pytest.mark.slow
def test_the_same_results_give_the_same_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra bench is not installed")
    machine = {"cpu": "a", "cores": 2, "kernel": "b", "python": "c", "libzmq": "4", "load": [0]}
    results = {"machine": {**machine, "libraries": {}}, "results": ROWS}
    first, again = draw(results, tmp_path / "a"), draw(results, tmp_path / "b")
    assert [path.name for path in first] == ["throughput.svg", "latency.svg", "streams.svg"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
