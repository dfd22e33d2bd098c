"""A whole sidecar on a disk that does all it may, against what it said: producers that repeat what
they are not sure of, groups and their dead letters, readers, quotas, retention, idle time.

- What was acknowledged is there, once, where the receipt says, until retention may take it; what
  was refused is not. With a durability that may lose its last records so they go, and no others,
  and whoever had read them is told.
- What was settled is, after a crash if that was synced, after a kill if it was written; nothing is
  settled that nobody settled; and in the end everything is, with nothing left that nobody gets.
- Every question is answered once, in time; what the sidecar tells of itself is what the files say;
  and its logs are sound whenever they are opened.

And that the machine finds the faults that it is for: each is planted here once, and what it says
tells that it was found for what it is.
"""

from __future__ import annotations

import logging

import pytest
from hypothesis import settings

from tests.support import planted
from tests.support import planted_parts as parts
from tests.support.found_out import is_found_out
from tests.support.planted_parts import Planting
from tests.support.sidecar_machine import SidecarMachine

TestSidecar = SidecarMachine.TestCase
TestSidecar.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSidecar = pytest.mark.slow(TestSidecar)

LOST = (
    "^lost|^forgotten|^given before|^another is there|^it is not there|is damaged|Finding"
    "|is not known here|is the next"
)
"""A record, a group, or how far a producer had come."""


@pytest.mark.slow
@pytest.mark.damages
@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (parts.directory_not_synced, LOST),
        (planted.dedup_in_memory_only, f"{LOST}|^twice|^derived twice"),
        (planted.epochs_by_the_clock, "^given before"),
        (parts.settled_in_memory_only, "^forgotten"),
        (planted.settled_with_its_neighbour, "^nobody settled it|^invented"),
        (planted.letters_not_appended, "^nobody settled it|^invented"),
        (planted.retention_takes_what_is_not_settled, "^taken too soon"),
        (planted.quota_not_kept, "^over its quota"),
        (planted.cuts_not_told, "^it was not told what was lost"),
    ],
)
def test_the_machine_finds(fault: Planting, found: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    is_found_out(SidecarMachine, fault, found)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.damages
@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (planted.receipt_before_the_sync, LOST),
        (
            parts.sync_repeated_after_it_failed,
            f"{LOST}|^it may go",
        ),  # of a damaged log nothing does
        (parts.journal_not_synced, "^forgotten"),
        (planted.settled_before_it_is_written, "^forgotten"),
        (planted.readers_left_waiting, "^not answered"),
    ],
)
def test_the_machine_finds_in_the_end(
    fault: Planting, found: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    is_found_out(SidecarMachine, fault, found, examples_max=2000)
