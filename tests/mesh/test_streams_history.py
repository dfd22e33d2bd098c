"""Streams under fire: producers, sidecars, consumers and a reader are killed at random moments and
come back, and what they saw is what a stream without faults would have shown them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.history import Judgement
from tests.support.stream_run import run


def clean(judgement: Judgement, appends_min: int) -> None:
    """`appends_min`: so that there was something to judge, on however busy a machine."""
    assert not judgement.findings, str(judgement)[:10_000]
    assert judgement.judged["appended"] > appends_min
    assert judgement.judged["acked"] > appends_min / 10


@pytest.mark.slow
def test_a_few_seconds_of_killing_show_no_fault(tmp_path: Path) -> None:
    clean(run(tmp_path, seconds=5, seed=1, producers=2, consumers=2), 100)


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_minute_of_killing_shows_no_fault(tmp_path: Path, seed: int) -> None:
    clean(run(tmp_path, seconds=60, seed=seed), 2000)
