"""Every promise in docs/guarantees.md names tests, and the tests exist; so do those
of planted faults in CONTRIBUTING.md."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "guarantees.md").read_text()
PLANTED = (ROOT / "CONTRIBUTING.md").read_text()
NAMED = sorted(set(re.findall(r"`(\w+/test_\w+\.py)::(test_\w+)`", DOCUMENT + PLANTED)))


def test_every_promise_names_a_test() -> None:
    tables = DOCUMENT.split("## What is lost")[0]
    lines = tables.splitlines()
    rows = [
        line
        for line, below in pairwise(lines)
        if line.startswith("| ") and not below.startswith("|---")
    ]
    assert len(rows) > 75
    for row in rows:
        assert "::test_" in row, row


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_the_named_test_exists(file: str, test: str) -> None:
    source = (ROOT / "tests" / file).read_text()
    assert re.search(rf"^(async )?def {test}\(", source, re.MULTILINE)
