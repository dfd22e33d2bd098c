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


@pytest.mark.long
@pytest.mark.timeout(430)
@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("dedup_in_memory_only", {"duplicate"}),
        ("settled_with_its_neighbour", {"unseen", "reordered"}),
        ("settled_in_memory_only", {"acked again"}),
        ("settled_before_it_is_written", {"acked again"}),
    ],
)
def test_what_does_not_survive_killing_is_found_out(
    tmp_path: Path, planted: str, found: set[str]
) -> None:
    """The last of them is there for moments only, and may take a few runs."""
    for seed in range(12):
        (folder := tmp_path / str(seed)).mkdir()
        killed = ("sidecar", "producer")
        judgement = run(folder, seconds=8, seed=seed, producers=2, killed=killed, planted=planted)
        if found & {finding.kind for finding in judgement.findings}:
            return
    raise AssertionError(f"{planted} was not found")
