"""Every case runs, tiny, with all sides that are installed here; those that are not are named."""

from __future__ import annotations

import importlib.util
import re

import pytest

from bench.case import TINY, Selection
from bench.cases import CASES
from bench.measure import throughput
from bench.rows import Row, Skipped
from bench.setting import Setting
from bench.sides import SIDES, module_of

OVER_TCP = ("topic", "lz4", "queue", "service", "service-asyncio")
OF_LOGS = {
    ("append", "disk"): {"fdatasync", "sqlite"},
    ("append", "ipc"): {"fdatasync"},
    ("append", "tcp"): {"fdatasync", "jetstream"},
    ("append-many", "disk"): {"sqlite"},
    ("append-many", "tcp"): {"jetstream"},
    ("replay", "disk"): {"sqlite"},
    ("replay", "tcp"): {"jetstream"},
    ("consume", "tcp"): {"jetstream", "jetstream_push"},
    ("open", "tcp"): {"jetstream"},
}
"""Who is measured, where he is installed."""
NOT_HERE = {"lz4"} | {name for name, _ in OF_LOGS}
RUNS = [
    *((name, "ipc") for name in CASES if name not in NOT_HERE),
    *((name, "tcp") for name in OVER_TCP),
]
NOT_AN_OPTION = ("Node has no option compress=", "Node has no option batch_window_ms=")
ALONE = ("start", "death", "idle")
"""Measured beside a budget."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "transport"), RUNS)
def test_every_case_gets_to_its_end_and_loses_nothing(name: str, transport: str) -> None:
    results = list(CASES[name].run(Selection(TINY, transports=frozenset({transport}))))
    rows = [result for result in results if isinstance(result, Row)]
    measured = {"budget"} if name in ALONE else {"raw"}
    if name == "service-uvloop" and not importlib.util.find_spec("uvloop"):
        measured = set()
    assert {row.peer for row in rows} >= measured
    for row in rows:
        assert (row.transport, row.lost) == (transport, 0)
        assert row.ours > 0
        assert row.theirs > 0
        assert row.low <= row.high
    assert results
    for result in results:
        if isinstance(result, Skipped):
            assert not result.failed, result.skipped
            reasons = {module_of(side).missing() for side in SIDES}
            if name == "service-uvloop":
                reasons.add("uvloop is not installed (extra: bench)")
            assert result.skipped in {*reasons, *NOT_AN_OPTION, f"has no {transport}"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "transport"), OF_LOGS)
def test_every_case_of_logs_gets_to_its_end_on_a_disk_and_loses_nothing(
    name: str, transport: str
) -> None:
    results = list(CASES[name].run(Selection(TINY, transports=frozenset({transport}))))
    figures = [result for result in results if not isinstance(result, Skipped)]
    there = {side for side in OF_LOGS[name, transport] if module_of(side).missing() is None}
    assert {figure.peer for figure in figures} == there
    for figure in figures:
        assert (figure.transport, figure.lost) == (transport, 0)
        assert figure.theirs > 0
        assert re.search(r"\bon (?!tmpfs|ramfs)\w+$", figure.note)
    assert not [result for result in results if isinstance(result, Skipped) and result.failed]


@pytest.mark.slow
def test_who_is_not_installed_is_named_as_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    absent = ("zenoh", "pynng", "nats")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else there(name)
    )
    results = list(throughput("topic", Setting(transport="tcp", size=16), SIDES, TINY))
    assert [(r.peer, r.skipped) for r in results if isinstance(r, Skipped)] == [
        ("zenoh", "eclipse-zenoh is not installed (extra: bench)"),
        ("nng", "pynng is not installed (extra: bench)"),
        ("nats", "nats-py is not installed (extra: bench)"),
        ("fdatasync", "has no publisher and no subscriber"),
        ("sqlite", "has no tcp"),
        ("jetstream", "nats-py is not installed (extra: bench)"),
        ("jetstream_push", "nats-py is not installed (extra: bench)"),
    ]
    assert [r.peer for r in results if isinstance(r, Row)] == ["raw"]


@pytest.mark.slow
def test_a_variant_that_the_node_has_no_option_for_is_named_as_skipped() -> None:
    variants = {"ours-odd": {"no_such_option": 1}, "ours-few": {"buffer_messages": 50}}
    sides = ("ours", "ours-odd", "ours-few")
    skipped, row = throughput("topic", Setting(size=16), sides, TINY, variants=variants)
    assert isinstance(skipped, Skipped)
    assert (skipped.peer, skipped.skipped) == ("ours-odd", "Node has no option no_such_option=")
    assert isinstance(row, Row)
    assert row.peer == "ours-few"


@pytest.mark.slow
def test_a_side_that_fails_does_not_take_the_others_with_it() -> None:
    variants = {"ours-wrong": {"port": -1}}
    sides = ("ours", "ours-wrong", "raw")
    failed, row = throughput("topic", Setting(size=16), sides, TINY, variants=variants)
    assert isinstance(failed, Skipped)
    assert failed.failed
    assert "port must be an integer from 0 to 65,535, not -1" in failed.skipped
    assert isinstance(row, Row)
    assert row.peer == "raw"
