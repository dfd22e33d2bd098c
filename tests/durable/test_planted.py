"""That the machines of logs, partitions and groups, and the damage of every byte, find the faults
that they are for: each is planted here once. What it says tells that it was found for what it is.

A machine stops at the first example that fails: those it has left are for another Hypothesis, which
draws others.
"""

from __future__ import annotations

import logging

import pytest

from mesh import limits
from tests.durable import test_group_model, test_journal, test_log_faults
from tests.durable.test_groups_crashes import GroupMachine
from tests.durable.test_log_faults import LogMachine
from tests.durable.test_partition import PartitionMachine
from tests.support import planted_parts as parts
from tests.support.found_out import is_found_out
from tests.support.planted import (
    dedup_in_memory_only,
    receipt_before_the_sync,
    settled_with_its_neighbour,
)
from tests.support.planted_parts import Planting

pytestmark = [pytest.mark.slow, pytest.mark.damages]

LOST = "^lost|^invented|^missing|^forgotten|is damaged|Finding"
"""Or what is back, though it was cut off."""
FORGOTTEN = "^not on disk|^forgotten|^gone|is damaged"


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """What is torn, failed or given up is logged each time."""
    caplog.set_level(logging.CRITICAL)


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        (receipt_before_the_sync, LOST),
        (parts.sync_repeated_after_it_failed, LOST),
        (parts.directory_not_synced, LOST),
        (parts.bodies_not_checked, "^not what was appended"),
    ],
)
def test_the_machine_of_a_log_finds(planted: Planting, found: str) -> None:
    is_found_out(LogMachine, planted, found)


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        (receipt_before_the_sync, LOST),
        (parts.sync_repeated_after_it_failed, LOST),
        (parts.directory_not_synced, LOST),
        (parts.bodies_not_checked, "^not what was appended"),
        (dedup_in_memory_only, "^forgotten|^not what was appended"),
    ],
)
def test_the_machine_of_a_partition_finds(planted: Planting, found: str) -> None:
    is_found_out(PartitionMachine, planted, found)


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        (parts.journal_not_synced, FORGOTTEN),
        (parts.sync_repeated_after_it_failed, FORGOTTEN),
        (parts.directory_not_synced, FORGOTTEN),
        (parts.settled_in_memory_only, FORGOTTEN),
        (settled_with_its_neighbour, "^not what is left|^invented"),
    ],
)
def test_the_machine_of_groups_finds(planted: Planting, found: str) -> None:
    is_found_out(GroupMachine, planted, found)


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        (parts.settled_in_memory_only, "^settled|^retention took something else"),
        (parts.deliveries_counted_in_memory_only, "^deliveries"),
        (settled_with_its_neighbour, "^settled"),
    ],
)
def test_the_model_of_a_group_finds(
    planted: Planting, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "GROUP_WINDOW", test_group_model.WINDOW)
    monkeypatch.setattr(limits, "GROUP_MEMBERS_MAX", test_group_model.MEMBERS_MAX)
    is_found_out(test_group_model.AnyOrder, planted, found)


# -- Every byte


SEALED, _, LAST = test_log_faults.LOGS
INDEX = test_log_faults.NAMES[0]


@pytest.mark.parametrize(
    ("planted", "name", "fault", "found"),
    [
        (parts.bodies_not_checked, SEALED, "flipped", "not what was appended"),
        (parts.bodies_not_checked, LAST, "flipped", "not what was appended"),
        (parts.bodies_not_checked, SEALED, "zeroed", "not what was appended"),
        (parts.headers_not_checked, SEALED, "flipped", "not what was appended"),
        (parts.indexes_not_checked, INDEX, "flipped", "missing in silence"),
        (parts.state_not_checked, "state", "flipped", "missing in silence"),
    ],
)
def test_the_damage_of_every_byte_of_a_log_finds(
    planted: Planting, name: str, fault: str, found: str
) -> None:
    with planted(), pytest.raises(AssertionError, match=found):
        test_log_faults.damage_every_byte(name, fault)


def test_the_damage_of_every_byte_of_a_journal_finds_what_is_not_checked() -> None:
    flip_every_bit = (
        test_journal.test_whichever_bit_is_flipped_what_is_before_it_is_read_and_nothing_else
    )
    with parts.entries_not_checked(), pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        flip_every_bit(test_journal.PARTITION)
