"""That what a log is put through finds the faults that it is for: each is planted here once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mesh.errors import LogDamaged
from tests.support.planted import receipt_before_the_sync
from tests.support.planted_parts import (
    Planting,
    bodies_not_checked,
    directory_not_synced,
    memory_believed_after_a_failed_sync,
    sync_repeated_after_it_failed,
)
from tests.support.trials import ended_at_every_operation, failed_every_time

pytestmark = pytest.mark.slow


def is_found_out(planted: Planting, trial: Callable[[], object]) -> None:
    found = r"^lost|^invented|^gone|^not what was appended|is damaged"
    with planted(), pytest.raises((AssertionError, LogDamaged), match=found):
        trial()


@pytest.mark.parametrize(
    "planted", [receipt_before_the_sync, directory_not_synced, bodies_not_checked]
)
def test_what_does_not_survive_a_crash_is_found_out(planted: Planting) -> None:
    is_found_out(planted, lambda: ended_at_every_operation("crash"))


@pytest.mark.damages
@pytest.mark.parametrize(
    "planted", [sync_repeated_after_it_failed, memory_believed_after_a_failed_sync]
)
def test_what_does_not_survive_a_failed_sync_is_found_out(planted: Planting) -> None:
    is_found_out(planted, lambda: failed_every_time("sync"))
